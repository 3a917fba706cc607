"""Bytes at an http or https address: a broken transfer goes on where it broke off, a password stays with its host.

Read by the standard library: unlike curl's exit status, it tells a 404 from a lost connection.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from http.client import BadStatusLine, HTTPException, IncompleteRead, InvalidURL
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from gan_dist.utils.errors import UserError

CHUNK = 2**20
TRANSIENT = {408, 425, 429}
"""HTTP statuses below 500 after which another attempt may succeed."""
_OVERLAP = 2**16
"""Bytes that are asked for again where the server names no version of the file: they prove that it is the same."""
_PASSWORD = re.compile(r"(?<=//)([^/?#:\s]*:)?[^/?#\s]+(?=@)")
_SECRET = re.compile(
    r"([?&#;][^=&#;\s]*(?:token|sig|secret|passw|pwd|auth|credential|rlkey|resourcekey|(?:api|access)_?-?key)"
    r"[^=&#;\s]*=|[?&#;]key=(?=[\w-]{16,}(?:[&#;\s]|$)))[^&#;\s]*",  # a short `key` may be a file's name
    re.IGNORECASE,
)
_LONE_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_SAFE = "/%:=&?~+!$,;'@()*[]"


class AttemptFailed(Exception):
    """This attempt failed; another may succeed."""


def redacted(address: str) -> str:
    """Returns the address as messages may show it: without user, password and query, which may hold secrets."""
    if address.startswith("pipe:") or "://" not in address:
        return address
    return re.sub(r"(?<=//)[^/]*@", "", re.split(r"[?#]", address)[0])


def masked(text: str) -> str:
    """Returns a text, such as an address or a command with some, as it may be kept: with *** for each password, token
    and signature in an address."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1***", text))


@dataclass
class Transfer:
    """How far the bytes of an address have come. `received`: passed on; `total`: in all, None if unknown; `version`:
    what the server calls this version of the file; `ranges`: whether it can send a part; `tail`: the last bytes."""

    received: int = 0
    total: int | None = None
    version: str = ""
    ranges: bool = False
    tail: bytes = b""

    @property
    def resumable(self) -> bool:
        """Returns whether the next request can go on from here."""
        return self.ranges and self.received > 0


class _SameOrigin(HTTPRedirectHandler):
    """Follows redirects; a password goes along to the same scheme, host and port alone."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        plain, password = _without_password(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, plain)  # type: ignore[arg-type]
        if request is not None:
            if not password and urlsplit(plain)[:2] == urlsplit(req.full_url)[:2]:
                password = req.unredirected_hdrs.get("Authorization", "")
            if password:
                request.add_unredirected_header("Authorization", password)
        return request


_OPENER = build_opener(_SameOrigin)


def _without_password(address: str) -> tuple[str, str]:
    """Returns the address without user and password, quoted where it must be, and the header that they become."""
    parts = urlsplit(address)
    user, _, host = parts.netloc.rpartition("@")
    password = "Basic " + base64.b64encode(unquote(user).encode()).decode() if user else ""
    path, query = (quote(_LONE_PERCENT.sub("%25", part), safe=_SAFE) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, host, path, query, "")), password


def read(address: str, stall_s: float, transfer: Transfer) -> Iterator[bytes]:
    """Yields the bytes at an address that `transfer` has not had yet, and keeps it up to date.

    Raises:
        AttemptFailed: what may pass: no connection, a lost one, a stall, a server's error; the file changed meanwhile.
        UserError: the server refuses, or there is no such address.
    """
    try:
        plain, password = _without_password(address)
        if not urlsplit(plain).netloc:
            raise InvalidURL("it names no host")
        request = Request(plain, headers={"Accept-Encoding": "identity", "User-Agent": "gan_dist"})
        if password:
            request.add_unredirected_header("Authorization", password)
        overlap = b"" if transfer.version else transfer.tail
        start = transfer.received - len(overlap)
        if start or overlap:
            request.add_header("Range", f"bytes={start}-")
            if transfer.version:
                request.add_header("If-Range", transfer.version)
        with _OPENER.open(request, timeout=stall_s) as response:
            _check_start(response, transfer, start if start or overlap else 0)
            for data in _unpacked(response, transfer):
                if overlap:
                    common = min(len(data), len(overlap))
                    if data[:common] != overlap[:common]:
                        transfer.ranges = False
                        raise AttemptFailed("the file changed meanwhile")
                    data, overlap = data[common:], overlap[common:]
                    if not data:
                        continue
                if transfer.total is not None and transfer.received + len(data) > transfer.total:
                    transfer.ranges = False
                    raise AttemptFailed(f"the server sends more than the {transfer.total} bytes that it told")
                transfer.received += len(data)
                transfer.tail = (transfer.tail + data)[-_OVERLAP:]
                yield data
    except HTTPError as error:
        error.close()
        if error.code == 416 and transfer.received:
            transfer.ranges = False
            raise AttemptFailed("the file changed meanwhile") from None
        if error.code >= 500 or error.code in TRANSIENT:
            raise AttemptFailed(f"HTTP status {error.code} {error.reason}") from None
        said = re.sub(r"\w+://\S*", lambda found: redacted(found[0]), " ".join(str(error.reason).split()))
        raise UserError(f"{redacted(address)}: HTTP status {error.code} {said}; is the address right?") from None
    except TimeoutError:
        raise AttemptFailed(f"stalled: no data for {stall_s:g} s after {transfer.received} bytes") from None
    except (InvalidURL, ValueError) as error:
        raise UserError(f"{redacted(address)} is not an address that can be fetched: {error}") from None
    except (OSError, HTTPException) as error:
        after = f" after {transfer.received} bytes" if transfer.received else ""
        raise AttemptFailed(reason(error) + after) from None
    if transfer.total is not None and transfer.received != transfer.total:
        raise AttemptFailed(f"connection lost after {transfer.received} of {transfer.total} bytes")


def _unpacked(response: Any, transfer: Transfer) -> Iterator[bytes]:
    """Yields what an answer holds, also if the server compressed it, which it was not asked for."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        yield from iter(lambda: response.read1(CHUNK), b"")
        return
    if coding not in ("gzip", "x-gzip"):
        raise ValueError(f"the server compressed it ({coding})")
    transfer.total, transfer.ranges = None, False  # they are of what is compressed
    unpacking, began = zlib.decompressobj(31), False
    try:
        while packed := response.read1(CHUNK):
            began = True
            while packed := packed.lstrip(b"\0") if unpacking.eof else packed:  # zeros may fill it up
                if unpacking.eof:  # several streams are one file
                    unpacking = zlib.decompressobj(31)
                if data := unpacking.decompress(packed):
                    yield data
                packed = unpacking.unused_data
    except zlib.error as error:
        raise AttemptFailed(f"it cannot be unpacked ({error})") from None
    if began and not unpacking.eof:
        raise AttemptFailed("connection lost: what the server compressed is not complete")


def _check_start(response: Any, transfer: Transfer, start: int) -> None:
    """Reads what the headers say of the file. Raises AttemptFailed unless the answer begins at byte `start` of the same
    file."""
    headers = response.headers
    if transfer.received == 0:
        if response.status == 206:
            raise AttemptFailed("the server sent a part of the file that was not asked for")
        lengths = {length.strip() for length in headers.get_all("Content-Length", [])}
        if len(lengths) > 1:
            raise AttemptFailed("the server states several lengths")
        length = "" if headers.get("Transfer-Encoding") else "".join(lengths)  # which tells the length otherwise
        transfer.total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        transfer.version = _version(headers)
        transfer.ranges = "bytes" in headers.get("Accept-Ranges", "")
        return
    place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    same = place is not None and int(place[1]) == start
    if place is not None and place[2] != "*" and transfer.total is not None:
        same = same and int(place[2]) == transfer.total
    # some servers pass over the condition; a time need not be repeated, a tag must be (RFC 9110, 15.3.7)
    if transfer.version and (_version(headers) or transfer.version.startswith('"')):
        same = same and _version(headers) == transfer.version
    if response.status != 206 or not same:
        transfer.ranges = False
        raise AttemptFailed("the server does not go on where it broke off, or the file changed meanwhile")


def _version(headers: Message) -> str:
    """Returns what a server calls this version of a file, if that proves that two are the same."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def reason(error: Exception) -> str:
    """Returns what went wrong in one line, in the system's words where it has any."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, IncompleteRead):
        return "connection lost"
    if isinstance(cause, BadStatusLine) and not isinstance(cause, ConnectionError):
        return f"the server's answer is no HTTP ({str(cause)[:40]!r})"
    return " ".join((getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).split())
