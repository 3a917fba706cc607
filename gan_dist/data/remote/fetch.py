"""Bytes from an address: failed attempts are repeated with backoff, stalls are cut off, the reason is named.

http and https are read by http.py.
Everything else (`pipe:`, gs, hf, ...) is opened by webdataset.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gan_dist.data.remote import http
from gan_dist.data.remote.http import AttemptFailed, reason
from gan_dist.data.remote.http import masked as masked
from gan_dist.data.remote.http import redacted as redacted
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled

SLOWEST = 1024
"""Bytes a second below which a response counts as stalled: some servers send a byte now and then, for ever."""
_COMMANDS = {"s3": "aws s3 cp --only-show-errors {} -", "gs": "gsutil cat {}"}
"""Programs for addresses that webdataset has no opener for, or one whose own processes would outlive it."""
_PROGRESS = 2**16
"""Bytes that a transfer must have gained not to count as one of the failed attempts."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try: `tries` attempts in all, `backoff_s`, twice that, ... apart; `stall_s` without bytes ends one.

    With the defaults, a dead source is given up after some three minutes, before ranks give up on one another."""

    tries: int = 6
    backoff_s: float = 0.5
    stall_s: float = float(os.environ.get("GAN_DIST_FETCH_STALL_S") or 30)


def file_address(base: str, name: str) -> str:
    """Returns the address of file `name` in the folder at address `base`.

    In a `pipe:` command the name replaces `{}`, or is appended after a slash; elsewhere it goes before the query.
    """
    if base.startswith("pipe:"):
        return base.replace("{}", name) if "{}" in base else f"{base.rstrip('/')}/{name}"
    path, mark, query = base.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


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
            with closing(_chunks(address, retry, cancelled, log)) as chunks:
                fault = receive(chunks)
            if fault is None:
                return
            wrong += 1
            if wrong == 2:
                raise UserError(
                    f"{redacted(address)} {fault}; fetched twice, so the source itself is damaged: repair it "
                    "(`gan-dist verify` names the faults of a folder) or use another source"
                )
        except AttemptFailed as failure:
            fault = str(failure)
            if attempt >= retry.tries:
                raise GanDistError(
                    f"{redacted(address)} cannot be fetched: {fault} ({attempt} attempts); run the command again later"
                ) from None
        log(f"{redacted(address)}: {fault}; trying again")
        _pause(retry.backoff_s * 2 ** (attempt - 1), retry, cancelled)


def _chunks(
    address: str, retry: RetryPolicy, cancelled: Callable[[], bool], log: Callable[[str], None]
) -> Generator[bytes]:
    """Yields the bytes at an address. Raises AttemptFailed for what may pass, UserError for what will not."""
    scheme, stall_s = address.partition(":")[0].lower(), retry.stall_s
    if scheme in ("http", "https"):
        source = _http(address, retry, cancelled, log)
    else:
        source = (_file if scheme == "file" else _process)(address, stall_s, cancelled)
    began, received = time.monotonic(), 0
    for data in source:
        raise_if_cancelled(cancelled)
        received += len(data)
        if (now := time.monotonic()) - began > stall_s:
            if received < SLOWEST * stall_s:
                raise AttemptFailed(f"stalled: {received} bytes in {now - began:.0f} s")
            began, received = now, 0
        yield data


def _http(
    address: str, retry: RetryPolicy, cancelled: Callable[[], bool], log: Callable[[str], None]
) -> Iterator[bytes]:
    """Yields the bytes at an address; goes on where the transfer broke off as long as the server can and it helps."""
    transfer, failures = http.Transfer(), 0
    while True:
        before = transfer.received
        try:
            yield from http.read(address, retry.stall_s, transfer)
            return
        except AttemptFailed as failure:
            failures = 0 if transfer.received - before >= _PROGRESS else failures + 1
            if not transfer.resumable or failures >= retry.tries:
                raise
            log(f"{redacted(address)}: {failure}; going on from byte {transfer.received}")
            _pause(retry.backoff_s * 2**failures, retry, cancelled)


def _pause(seconds: float, retry: RetryPolicy, cancelled: Callable[[], bool]) -> None:
    # Jitter: the ranks of a job that lost a server together should not come back together.
    until = time.monotonic() + seconds * random.uniform(0.75, 1.25)
    while time.monotonic() < until:
        raise_if_cancelled(cancelled)
        time.sleep(min(0.1, retry.backoff_s))


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
            while data := stream.read(http.CHUNK):
                yield data
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except OSError as error:
        raise AttemptFailed(reason(error)) from None


def _process(address: str, stall_s: float, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    """Yields the output of a program: the command of a `pipe:`, or the one that webdataset runs for a scheme."""
    from webdataset.gopen import Pipe, gopen

    command = address.removeprefix("pipe:") if address.startswith("pipe:") else None
    if made := _COMMANDS.get(address.partition("://")[0]):
        command = made.format(shlex.quote(address))
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
            yield from iter(lambda: pipe.read(http.CHUNK), b"")
        return
    out, last_data = pipe.stream.fileno(), time.monotonic()
    try:
        while True:
            raise_if_cancelled(cancelled)
            if not select.select([out], [], [], 0.2)[0]:
                if time.monotonic() - last_data > stall_s:
                    raise AttemptFailed(f"stalled: no data for {stall_s:g} s")
                continue
            if not (data := os.read(out, http.CHUNK)):
                break
            last_data = time.monotonic()
            yield data
        status = pipe.proc.wait(stall_s)
    except subprocess.TimeoutExpired:
        raise AttemptFailed("its command does not exit") from None
    finally:
        _end(pipe.proc, command is not None)
        pipe.stream.close()
    if status == 127 and command is not None:
        raise UserError(f"{redacted(address)}: the shell does not find {re.split(r'[ |;&]', command.strip())[0]}")
    if status:
        raise AttemptFailed(f"its command ended with status {status}")


def _end(process: subprocess.Popen[bytes], group: bool) -> None:
    """Kills a program that is still running."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    process.wait()
