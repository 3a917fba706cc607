"""Entries of sources -> their bytes, read in place; an archive that contradicts itself is a named reject."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gan_dist.data.prepare import zips
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.decode import MEMORY_LIMIT
from gan_dist.data.prepare.sources import Entry, Source
from gan_dist.utils.errors import GanDistError


class SourceChanged(GanDistError):
    """A file has changed since its source was listed."""


_OPEN_ARCHIVES = 16
"""Archives kept open at once: entries come source by source, and a process may open few files (often 1,024)."""

_ENDS, _HASHED_WHOLE = 2**16, 2**18
_SYSTEM = ("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENODEV")
_SYSTEM_FAILURES = {getattr(errno, name) for name in _SYSTEM if hasattr(errno, name)}
"""Failures that would reject every file from now on, although no file is bad."""


class Reader:
    """Reads entries; the archives used last stay open."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self._open: dict[int, IO[bytes]] = {}

    def read(self, entry: Entry) -> bytes:
        """Returns the entry's bytes.

        Raises:
            Rejected: it cannot be read.
            SourceChanged: it has changed since it was listed.
            GanDistError: nothing can be read at present: a server is gone, or too many files are open.
        """
        if entry.fault:
            raise Rejected(entry.fault)
        if entry.size + entry.packed > MEMORY_LIMIT:
            raise Rejected("too_large", f"{entry.size} bytes encoded")
        source = self.sources[entry.source]
        try:
            if source.kind == "folder":
                return _read_file(source, entry)
            archive = self._archive(entry.source)
            if source.kind == "zip":
                return zips.read(archive, entry.offset, entry.packed, entry.method, entry.size, entry.stamp)
            assert source.kind == "tar", source.kind
            archive.seek(entry.offset)
            data = archive.read(entry.size if entry.pieces is None else entry.packed)
        except FileNotFoundError:
            raise SourceChanged(f"{source.path}: {entry.path!r} disappeared while it was being prepared") from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if error.errno in _SYSTEM_FAILURES:
                raise GanDistError(
                    f"{source.path} cannot be read now ({reason}): run the same command again later"
                ) from None
            raise Rejected("unreadable", reason) from None
        if len(data) != (entry.size if entry.pieces is None else entry.packed):
            raise SourceChanged(f"{source.path} became shorter while it was being prepared")
        return data if entry.pieces is None else _spread_out(data, entry.pieces, entry.size)

    def _archive(self, number: int) -> IO[bytes]:
        stream = self._open.pop(number, None)
        if stream is None:
            while len(self._open) >= _OPEN_ARCHIVES:
                self._open.pop(next(iter(self._open))).close()
            stream = Path(self.sources[number].path).open("rb")  # noqa: SIM115 (kept open)
        self._open[number] = stream  # at the end: the front was used least recently
        return stream

    def close(self) -> None:
        """Closes the archives."""
        while self._open:
            self._open.popitem()[1].close()


def _spread_out(stored: bytes, pieces: Sequence[tuple[int, int]], size: int) -> bytes:
    """Returns a sparse file: its stored pieces at their places, zeros between them."""
    whole, taken = bytearray(size), 0
    for start, length in pieces:
        whole[start : start + length] = stored[taken : taken + length]
        taken += length
    return bytes(whole[:size])


def content_digest(data: bytes) -> str:
    """Returns a digest of a file's size and content; of large ones, of their ends and of 16 places between (hashing
    all of it would be a fifteenth of preparing a large JPEG)."""
    digest = hashlib.sha256(len(data).to_bytes(8, "little"))
    if len(data) <= _HASHED_WHOLE:
        digest.update(data)
    else:
        step = (len(data) - 2 * _ENDS) // 16
        digest.update(data[:_ENDS] + data[-_ENDS:])
        for place in range(_ENDS, len(data) - _ENDS, step):
            digest.update(data[place : place + 4096])
    return digest.hexdigest()[:32]


def _read_file(source: Source, entry: Entry) -> bytes:
    with Path(source.path, entry.path).open("rb") as stream:
        status = os.fstat(stream.fileno())
        as_listed = (status.st_size, str(status.st_mtime_ns)) == (entry.size, entry.stamp)
        data = stream.read() if as_listed else b""
    if not as_listed or len(data) != entry.size:
        raise SourceChanged(f"{source.path}: {entry.path!r} changed while it was being prepared")
    return data
