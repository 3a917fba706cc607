"""What web servers do: cut lines go on where they broke off, passwords stay where they belong, odd headers are odd."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from gan_dist.data.remote.fetch import RetryPolicy, fetch, masked
from gan_dist.utils.errors import GanDistError, UserError

DATA = np.random.default_rng(0).bytes(500_000)
OTHER = DATA[:-1] + bytes([DATA[-1] ^ 1])
CHANGED = np.random.default_rng(1).bytes(500_000)
QUICK = RetryPolicy(tries=3, backoff_s=0.01, stall_s=5)
Handle = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(handle: Handle) -> Iterator[str]:
    """Yields the address of a server whose GET is `handle`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handle(self)

        def log_message(self, *_: Any) -> None: ...

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        web.server_close()


def get(address: str, log: list[str] | None = None) -> bytes:
    """Returns what is fetched, by however many attempts."""
    got: list[bytes] = []

    def receive(chunks: Iterator[bytes]) -> None:
        got.append(b"".join(chunks))

    fetch(address, receive, retry=QUICK, log=(log if log is not None else []).append)
    return got[-1]


class Cut:
    """Sends at most a part of `contents[n]` to the n-th request, from where it is asked."""

    ignores_conditions = False

    def __init__(self, contents: list[bytes], part: int, headers: dict[str, str], versions: list[str] | None = None):
        self.contents, self.part, self.headers, self.versions = contents, part, headers, versions
        self.ranges: list[str | None] = []

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        nth = len(self.ranges)
        data = self.contents[min(nth, len(self.contents) - 1)]
        version = self.versions[min(nth, len(self.versions) - 1)] if self.versions else None
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if version and asked and request.headers.get("If-Range") != version and not self.ignores_conditions:
            asked = None
        start = int(asked.split("=")[1].rstrip("-")) if asked and "Accept-Ranges" in self.headers else 0
        request.send_response(206 if start else 200)
        for name, value in self.headers.items():
            request.send_header(name, value)
        if version:
            request.send_header("ETag", version)
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        request.wfile.write(data[start : start + self.part])


RANGES = {"Accept-Ranges": "bytes"}


@pytest.mark.parametrize("versions", [None, ['"v1"']])
def test_a_cut_line_goes_on_where_it_broke_off(versions: list[str] | None) -> None:
    cut, log = Cut([DATA], 170_000, RANGES, versions), list[str]()
    with server(cut) as address:
        assert get(f"{address}/a.tar", log) == DATA
    assert len(cut.ranges) >= 3 and None not in cut.ranges[1:]
    assert all("going on from byte" in line for line in log) and len(log) == len(cut.ranges) - 1
    overlap = 0 if versions else 2**16
    assert cut.ranges[1] == f"bytes={170_000 - overlap}-"


def test_a_server_without_ranges_is_asked_for_all_again() -> None:
    cut = Cut([DATA], 170_000, {})
    with server(cut) as address, pytest.raises(GanDistError, match="connection lost after 170000 of 500000 bytes"):
        get(f"{address}/a.tar")
    assert cut.ranges == [None] * 3


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("versions", [None, ['"v1"', '"v2"']])
def test_a_file_that_changed_meanwhile_is_fetched_anew(versions: list[str] | None, ignores: bool) -> None:
    """By its version, also where the server does not look at it, or by the bytes that are asked for twice: never half
    of one file and half of another."""

    class Once(Cut):
        def __call__(self, request: BaseHTTPRequestHandler) -> None:
            self.part = 170_000 if not self.ranges else len(DATA)
            super().__call__(request)

    cut = Once([DATA, CHANGED], 0, RANGES, versions)
    cut.ignores_conditions = ignores
    with server(cut) as address:
        assert get(f"{address}/a.tar") == CHANGED


@pytest.mark.parametrize("length", ["none", "-5", "", "1e3", "\u00b2", "9" * 30])
def test_nonsense_lengths_are_passed_over(length: str) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", length)
        request.end_headers()
        request.wfile.write(DATA[:1000])

    with server(handle) as address:
        try:
            assert get(f"{address}/a.tar") == DATA[:1000]
        except GanDistError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"GARBAGE\r\n\r\n", r"is no HTTP \('GARBAGE\\r\\n'\)"),
        (b"HTTP/1.1 99999 X\r\n\r\n", "is no HTTP"),
        (b"", "closed connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n" + DATA[:9], "several lengths"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\ncut", "connection lost after 3 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ""),
    ],
)
def test_what_is_no_answer_is_one_line(answer: bytes, message: str) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(answer)

    with server(handle) as address:
        if not message:
            assert get(address) == b"abc"  # the length of what comes in chunks is theirs
            return
        with pytest.raises(GanDistError, match=message) as caught:
            get(address)
    assert "\n" not in str(caught.value) and "\r" not in str(caught.value)


QUOTED = {
    "/with space.tar?a=b c": "/with%20space.tar?a=b%20c",
    "/m\u00fc.tar": "/m%C3%BC.tar",
    "/a%20b": "/a%20b",
}


@pytest.mark.parametrize(("path", "seen"), QUOTED.items())
def test_addresses_are_quoted_where_they_must_be(path: str, seen: str) -> None:
    asked = []

    def handle(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        request.send_response(200)
        request.end_headers()

    with server(handle) as address:
        get(address + path)
    assert asked == [seen]


@pytest.mark.parametrize("address", ["http://", "http://a b/c", "http://[::1/x", "http://x:port/a"])
def test_what_is_no_address_is_one_line_at_once(address: str) -> None:
    with pytest.raises(UserError) as caught:
        get(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_password_stays_with_its_host(code: int, elsewhere: bool) -> None:
    seen: list[str | None] = []

    def store(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("Authorization"))
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"data")

    with server(store) as other:

        def first(request: BaseHTTPRequestHandler) -> None:
            if request.path == "/there":
                store(request)
                return
            assert request.headers["Authorization"]
            request.send_response(code)
            request.send_header("Location", f"{other}/there" if elsewhere else "/there")
            request.end_headers()

        with server(first) as address:
            assert get(address.replace("//", "//user:secret@") + "/a.tar") == b"data"
    assert [value is not None for value in seen] == [not elsewhere]


def test_a_password_in_a_redirect_is_used_there() -> None:
    seen: list[str | None] = []

    def store(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("Authorization"))
        request.send_response(200)
        request.end_headers()

    with server(store) as other:

        def first(request: BaseHTTPRequestHandler) -> None:
            request.send_response(302)
            request.send_header("Location", other.replace("//", "//me:mine@") + "/there")
            request.end_headers()

        with server(first) as address:
            get(address + "/a.tar")
    assert seen == ["Basic bWU6bWluZQ=="]


class Parts:
    """Answers with `first` bytes of DATA, and to what asks for a part with what `rest` makes of its start. `whole` and
    `part`: headers of the two."""

    def __init__(self, first: int, rest: Callable[[int], bytes], whole: dict[str, str], part: dict[str, str]) -> None:
        self.first, self.rest, self.whole, self.part = first, rest, whole, part
        self.count = 0

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        self.count += 1
        asked = request.headers.get("Range")
        start = int(asked.split("=")[1].rstrip("-")) if asked else 0
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(len(DATA) - start), **self.whole}
        sent = DATA[: self.first if self.count < 4 else None]
        if asked:
            sent = self.rest(start)
            headers = {"Accept-Ranges": "bytes", "Content-Length": str(max(len(sent), len(DATA) - start)), **self.part}
            headers["Content-Range"] = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        request.send_response(206 if asked else 200)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(sent)


def test_a_part_that_is_longer_than_it_says_does_not_go_on_for_ever() -> None:
    """As of a server that says 206 and sends all."""
    version = {"ETag": '"v"'}
    parts = Parts(200_000, lambda start: DATA, version, version)
    with server(parts) as address:
        assert get(address) == DATA
    assert parts.count <= 6


def test_a_time_that_an_answer_does_not_repeat_is_no_other_file() -> None:
    when = {"Last-Modified": "Fri, 27 Nov 2026 12:00:00 GMT"}
    parts = Parts(170_000, lambda start: DATA[start : start + 170_000], when, {})
    with server(parts) as address:
        assert get(address) == DATA
    assert parts.count == 3


def test_an_answer_that_lost_its_version_is_not_gone_on_with() -> None:
    other = bytes(reversed(DATA))
    cut = Cut([DATA, other], 170_000, RANGES, ['"v1"', ""])
    cut.ignores_conditions = True
    with server(cut) as address:
        assert get(f"{address}/a.tar") == other


def test_a_percent_sign_may_mean_itself() -> None:
    asked: list[str] = []

    def handle(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"x")

    with server(handle) as address:
        for name in ("100%.tar", "a%20b.tar", "50% off.tar"):
            get(f"{address}/{name}")
    assert [path.rpartition("/")[2] for path in asked] == ["100%25.tar", "a%20b.tar", "50%25%20off.tar"]


@pytest.mark.parametrize("coding", ["gzip", "x-gzip"])
def test_what_a_server_compresses_unasked_is_unpacked(coding: str) -> None:
    """Also where the connection breaks in the middle."""
    packed, count = gzip.compress(DATA), 0

    def handle(request: BaseHTTPRequestHandler) -> None:
        nonlocal count
        count += 1
        request.send_response(200)
        request.send_header("Content-Encoding", coding)
        request.send_header("Accept-Ranges", "bytes")
        request.end_headers()  # without a length: only what is unpacked tells whether it is whole
        request.wfile.write(packed[: 100_000 if count == 1 else None])

    with server(handle) as address:
        assert get(address) == DATA and count == 2


@pytest.mark.parametrize("fill", [b"", bytes(1000)])
def test_several_streams_that_a_server_calls_one_coding_are_all_unpacked(fill: bytes) -> None:
    """As `cat a.tar.gz b.tar.gz` makes them, which some servers take for an encoding."""

    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Encoding", "gzip")
        request.end_headers()
        request.wfile.write(gzip.compress(DATA[:1000]) + fill + gzip.compress(DATA[1000:]) + fill)

    with server(handle) as address:
        assert get(address) == DATA


def test_a_redirect_that_is_refused_tells_no_secret() -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", "s3://bucket/a.tar?whatever=hidden")
        request.end_headers()

    with server(handle) as address, pytest.raises(UserError, match="s3://bucket") as caught:
        get(f"{address}/a")
    assert "hidden" not in str(caught.value)


def test_a_part_that_was_not_asked_for_and_unknown_codings_are_refused() -> None:
    def answer(status: int, name: str, value: str) -> Handle:
        def handle(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            request.send_header(name, value)
            request.send_header("Content-Length", "100")
            request.end_headers()
            request.wfile.write(DATA[:100])

        return handle

    part, brotli = answer(206, "Content-Range", "bytes 100-199/500000"), answer(200, "Content-Encoding", "br")
    with server(part) as address, pytest.raises(GanDistError, match="a part of the file that was not asked for"):
        get(address)
    with server(brotli) as address, pytest.raises(UserError, match=r"compressed it \(br\)"):
        get(address)


def test_a_redirect_that_goes_round_is_one_line() -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", request.path)
        request.end_headers()

    with server(handle) as address, pytest.raises(UserError, match="infinite loop") as caught:
        get(f"{address}/a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:p:w%40@host:80/a.tar", "https://me:***@host:80/a.tar"),
        ("https://host/a?x=1&X-Amz-Signature=ab/c&y=2#z", "https://host/a?x=1&X-Amz-Signature=***&y=2#z"),
        ("https://host/a?sv=3&SIG=s%3D&api_key=k&accessKey=k", "https://host/a?sv=3&SIG=***&api_key=***&accessKey=***"),
        ("pipe:curl https://a:b@h/{}?token=c | cat", "pipe:curl https://a:***@h/{}?token=*** | cat"),
        ("https://abc@host/a.tar#token=x", "https://***@host/a.tar#token=***"),
        ("https://u:p@ss@host/a.tar", "https://u:***@host/a.tar"),
        ("https://me@x.org:pw@host:80/a.tar", "https://me@x.org:***@host:80/a.tar"),
        ("https://host/a.tar?rlkey=y;token=z&pwd=", "https://host/a.tar?rlkey=***;token=***&pwd=***"),
        (f"https://host/a.tar?key={'x1-' * 9}&v=1", "https://host/a.tar?key=***&v=1"),
        *((text, text) for text in ("http://host:80/a@b.tar", "https://h/?key=a/b.tar", "https://h/?key=A", "/a:b@c")),
    ],
)
def test_secrets_are_not_kept(text: str, kept: str) -> None:
    assert masked(text) == kept
