"""Bytes from an address: failed attempts are repeated with backoff, stalls are cut off, the reason is named.

http and https are read by the standard library: unlike curl's exit status, it tells a 404 from a lost connection.
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
"""Bytes a second below which a response counts as stalled: some servers send a byte now and then, for ever."""
TRANSIENT = {408, 425, 429}
"""HTTP statuses below 500 after which another attempt may succeed."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try: `tries` attempts in all, `backoff_s`, twice that, ... apart; `stall_s` without bytes ends one.

    With the defaults, a dead source is given up after some three minutes, before ranks give up on one another."""

    tries: int = 6
    backoff_s: float = 0.5
    stall_s: float = float(os.environ.get("GAN_DIST_FETCH_STALL_S") or 30)


class _AttemptFailed(Exception):
    """This attempt failed; another may succeed."""


def file_address(base: str, name: str) -> str:
    """Returns the address of file `name` in the folder at address `base`.

    In a `pipe:` command the name replaces `{}`, or is appended after a slash; elsewhere it goes before the query.
    """
    if base.startswith("pipe:"):
        return base.replace("{}", name) if "{}" in base else f"{base.rstrip('/')}/{name}"
    path, mark, query = base.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def redacted(address: str) -> str:
    """Returns the address as messages may show it: without user, password and query, which may hold secrets."""
    if address.startswith("pipe:"):
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch(
    address: str,
    receive: Callable[[Iterator[bytes]], str | None],
    *,
    retry: RetryPolicy | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Passes the bytes at `address` to `receive`, which returns what is wrong with them, or None when they are right.

    A failed transfer is repeated with backoff, each time with a line to `log`; wrong bytes are fetched once more.

    Raises:
        UserError: the source refuses, or sends wrong bytes twice.
        GanDistError: every attempt failed: no connection, a lost one, or a stall.
        Cancelled: `cancelled()` became true.
    """
    retry, wrong = retry or RetryPolicy(), 0
    for attempt in itertools.count(1):
        try:
            with closing(_chunks(address, retry.stall_s, cancelled)) as chunks:
                fault = receive(chunks)
            if fault is None:
                return
            wrong += 1
            if wrong == 2:
                raise UserError(
                    f"{redacted(address)} {fault}; fetched twice, so the source itself is damaged: repair it "
                    "(`gan-dist verify` names the faults of a folder) or use another source"
                )
        except _AttemptFailed as failure:
            fault = str(failure)
            if attempt >= retry.tries:
                raise GanDistError(
                    f"{redacted(address)} cannot be fetched: {fault} ({attempt} attempts); run the command again later"
                ) from None
        log(f"{redacted(address)}: {fault}; trying again")
        # Jitter: the ranks of a job that lost a server together should not come back together.
        until = time.monotonic() + retry.backoff_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        while time.monotonic() < until:
            raise_if_cancelled(cancelled)
            time.sleep(min(0.1, retry.backoff_s))


def _chunks(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Generator[bytes]:
    """Yields the bytes at an address. Raises _AttemptFailed for what may pass, UserError for what will not."""
    scheme = address.partition(":")[0].lower()
    reader = {"http": _http, "https": _http, "file": _file}.get(scheme, _process)
    began, received = time.monotonic(), 0
    for data in reader(address, stall_s, cancelled):
        raise_if_cancelled(cancelled)
        received += len(data)
        if (now := time.monotonic()) - began > stall_s:
            if received < SLOWEST * stall_s:
                raise _AttemptFailed(f"stalled: {received} bytes in {now - began:.0f} s")
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
            raise _AttemptFailed(f"HTTP status {error.code} {error.reason}") from None
        raise UserError(
            f"{redacted(address)}: HTTP status {error.code} {error.reason}; is the address right?"
        ) from None
    except TimeoutError:
        raise _AttemptFailed(f"stalled: no data for {stall_s:g} s after {received} bytes") from None
    except (OSError, HTTPException) as error:
        raise _AttemptFailed(_reason(error) + (f" after {received} bytes" if received else "")) from None
    except ValueError as error:
        raise UserError(f"{redacted(address)} is not an address that can be fetched: {error}") from None
    if expected is not None and received != int(expected):
        raise _AttemptFailed(f"connection lost after {received} of {expected} bytes")


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _local_path(address: str) -> Path:
    """Returns the path of a `file:` address. Raises UserError for one on another host."""
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{address}: expected file:///PATH, found a host named {parts.netloc}")
    return Path(url2pathname(parts.path))


def _file(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    path = _local_path(address)
    try:
        with path.open("rb") as stream:
            while data := stream.read(CHUNK):
                yield data
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except OSError as error:
        raise _AttemptFailed(_reason(error)) from None


def _process(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    """Yields the output of a program: the command of a `pipe:`, or the one that webdataset runs for a scheme."""
    from webdataset.gopen import Pipe, gopen

    command = address.removeprefix("pipe:") if address.startswith("pipe:") else None
    if address.startswith("s3://"):  # webdataset has no opener of its own for it
        command = f"aws s3 cp --only-show-errors {shlex.quote(address)} -"
    try:
        # In its own session: a stalled command is ended together with everything that its shell has started.
        pipe: Any = (
            Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True)
            if command is not None
            else gopen(address, "rb")
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{redacted(address)} cannot be opened ({error})") from None
    if not isinstance(pipe, Pipe):  # a third-party opener, which must handle stalls itself
        with pipe:
            yield from iter(lambda: pipe.read(CHUNK), b"")
        return
    out, last_data = pipe.stream.fileno(), time.monotonic()
    try:
        while True:
            raise_if_cancelled(cancelled)
            if not select.select([out], [], [], 0.2)[0]:
                if time.monotonic() - last_data > stall_s:
                    raise _AttemptFailed(f"stalled: no data for {stall_s:g} s")
                continue
            if not (data := os.read(out, CHUNK)):
                break
            last_data = time.monotonic()
            yield data
        status = pipe.proc.wait(stall_s)
    except subprocess.TimeoutExpired:
        raise _AttemptFailed("its command does not exit") from None
    finally:
        _end(pipe.proc, command is not None)
        pipe.stream.close()
    if status == 127 and command is not None:
        raise UserError(f"{redacted(address)}: the shell does not find {re.split(r'[ |;&]', command.strip())[0]}")
    if status:
        raise _AttemptFailed(f"its command ended with status {status}")


def _end(process: subprocess.Popen[bytes], group: bool) -> None:
    """Kills a program that is still running."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    process.wait()
