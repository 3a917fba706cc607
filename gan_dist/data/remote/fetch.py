"""Bytes from an address, with patience but never for ever: retries with backoff, stalls cut off, faults named.

http and https are read by the standard library: it tells a 404 from a cut line, which an exit status of curl does not.
Everything else (`pipe:`, gs, hf, ...) is opened by webdataset.
"""

from __future__ import annotations

import base64
import itertools
import os
import random
import re
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, url2pathname, urlopen

from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled

CHUNK = 2**20
SLOWEST = 1024
"""Bytes a second below which an answer counts as stalled: some servers send a byte now and then, for ever."""
TRANSIENT = {408, 425, 429}
"""HTTP statuses below 500 that ask to come again."""


@dataclass(frozen=True)
class Patience:
    """How long to try: `tries` in all, waiting `backoff_s`, twice that, ... in between; `stall_s` without bytes ends
    one. The defaults give up on a dead source after some three minutes, before ranks give up on one another."""

    tries: int = 6
    backoff_s: float = 0.5
    stall_s: float = float(os.environ.get("GAN_DIST_FETCH_STALL_S") or 30)


class _Lost(Exception):
    """This attempt failed; another may not."""


def member(base: str, name: str) -> str:
    """Returns the address of file `name` in the folder at address `base`.

    In a `pipe:` command the name replaces `{}`, or is appended after a slash; elsewhere it goes before a query.
    """
    if base.startswith("pipe:"):
        return base.replace("{}", name) if "{}" in base else f"{base.rstrip('/')}/{name}"
    path, mark, query = base.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def shown(address: str) -> str:
    """Returns the address as messages may tell it: without password and query, which may hold secrets."""
    if address.startswith("pipe:"):
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch(
    address: str,
    receive: Callable[[Iterator[bytes]], str | None],
    *,
    patience: Patience | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Gives the bytes at `address` to `receive`, which returns what is wrong with them, or None when they are right.

    A failed transfer is tried again with backoff, and each time `say` is told; wrong bytes are fetched once more.

    Raises:
        UserError: the source answers, but with wrong bytes, or refuses.
        GanDistError: it could not be reached, cut the line or stalled every time.
        Cancelled: `cancelled()` became true.
    """
    patience, wrong = patience or Patience(), 0
    for attempt in itertools.count(1):
        try:
            with closing(_chunks(address, patience.stall_s, cancelled)) as chunks:
                fault = receive(chunks)
            if fault is None:
                return
            wrong += 1
            if wrong == 2:
                raise UserError(
                    f"{shown(address)} {fault}; fetched twice, so the copy there is damaged: mend it "
                    "(`gan-dist verify` where it lies) or name another source"
                )
        except _Lost as lost:
            fault = str(lost)
            if attempt >= patience.tries:
                raise GanDistError(
                    f"{shown(address)} cannot be fetched: {fault} ({attempt} tries); run the same command again"
                ) from None
        say(f"{shown(address)}: {fault}; trying again")
        # Spread out: the ranks of a job that lost a server together should not come back together.
        until = time.monotonic() + patience.backoff_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        while time.monotonic() < until:
            raise_if_cancelled(cancelled)
            time.sleep(min(0.1, patience.backoff_s))


def _chunks(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Generator[bytes]:
    """Yields what stands at an address. Raises _Lost for what may pass, UserError for what will not."""
    scheme = address.partition(":")[0].lower()
    reader = {"http": _http, "https": _http, "file": _file}.get(scheme, _process)
    began, received = time.monotonic(), 0
    for data in reader(address, stall_s, cancelled):
        raise_if_cancelled(cancelled)
        received += len(data)
        if (now := time.monotonic()) - began > stall_s:
            if received < SLOWEST * stall_s:
                raise _Lost(f"it stalled: {received} bytes in {now - began:.0f} s")
            began, received = now, 0
        yield data


def _http(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    parts = urlsplit(address)
    headers = {"Accept-Encoding": "identity", "User-Agent": "gan_dist"}
    if "@" in parts.netloc:
        user, _, host = parts.netloc.rpartition("@")
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
        address = urlunsplit(parts._replace(netloc=host))
    received, expected = 0, None
    try:
        with urlopen(Request(address, headers=headers), timeout=stall_s) as response:
            expected = response.headers.get("Content-Length")
            while data := response.read1(CHUNK):
                received += len(data)
                yield data
    except HTTPError as error:
        error.close()
        if error.code >= 500 or error.code in TRANSIENT:
            raise _Lost(f"HTTP status {error.code} {error.reason}") from None
        raise UserError(f"{shown(address)}: HTTP status {error.code} {error.reason}; is the address right?") from None
    except TimeoutError:
        raise _Lost(f"it stalled: nothing for {stall_s:g} s after {received} bytes") from None
    except (OSError, HTTPException) as error:
        raise _Lost(_reason(error) + (f" after {received} bytes" if received else "")) from None
    except ValueError as error:
        raise UserError(f"{shown(address)} is not an address that can be fetched: {error}") from None
    if expected is not None and received != int(expected):
        raise _Lost(f"the line was cut after {received} of {expected} bytes")


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def file_of(address: str) -> Path:
    """Returns the path that a `file:` address names. Raises UserError for one on another host."""
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{address}: expected file:///PATH, found a host named {parts.netloc}")
    return Path(url2pathname(parts.path))


def _file(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    path = file_of(address)
    try:
        with path.open("rb") as stream:
            while data := stream.read(CHUNK):
                yield data
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except OSError as error:
        raise _Lost(_reason(error)) from None


def _process(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    """Yields what a program prints: the command of a `pipe:`, or the one that webdataset runs for a scheme."""
    from webdataset.gopen import Pipe, gopen

    command = address.removeprefix("pipe:") if address.startswith("pipe:") else None
    if address.startswith("s3://"):  # webdataset has no opener of its own for it
        command = f"aws s3 cp --only-show-errors {shlex.quote(address)} -"
    try:
        # A session of its own: a stalled command is ended with all that its shell has started.
        pipe: Any = (
            Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True)
            if command is not None
            else gopen(address, "rb")
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{shown(address)} cannot be opened ({error})") from None
    if not isinstance(pipe, Pipe):  # an opener of somebody else's, which must see to its own stalls
        with pipe:
            yield from iter(lambda: pipe.read(CHUNK), b"")
        return
    out, heard = pipe.stream.fileno(), time.monotonic()
    try:
        while True:
            raise_if_cancelled(cancelled)
            if not select.select([out], [], [], 0.2)[0]:
                if time.monotonic() - heard > stall_s:
                    raise _Lost(f"it stalled: nothing for {stall_s:g} s")
                continue
            if not (data := os.read(out, CHUNK)):
                break
            heard = time.monotonic()
            yield data
        status = pipe.proc.wait(stall_s)
    except subprocess.TimeoutExpired:
        raise _Lost("its command does not end") from None
    finally:
        _end(pipe.proc, command is not None)
        pipe.stream.close()
    if status == 127 and command is not None:
        raise UserError(f"{shown(address)}: the shell does not find {re.split(r'[ |;&]', command.strip())[0]}")
    if status:
        raise _Lost(f"its command ended with status {status}")


def _end(process: subprocess.Popen[bytes], group: bool) -> None:
    """Ends a program that has not ended by itself."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    process.wait()
