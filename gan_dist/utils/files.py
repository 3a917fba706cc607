"""Files that are complete or absent, with umask permissions; paths as people write them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any

from gan_dist.utils.errors import UserError

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""How a file system says that it does not flush folders."""


def is_address(text: str) -> bool:
    """Returns whether `text` names something remote (`http://...`, `s3://...`, `pipe:...`), not a path."""
    return text.startswith("pipe:") or "://" in text[:16]


def expand_variables(text: str | Path, name: str = "") -> str:
    """Returns `text` with `~` and `$VAR` expanded. Raises UserError about `name` for a variable that is not set."""
    expanded = os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111 (Path's fails for a user without a home)
    missing = re.search(r"\$\{?([A-Za-z_]\w*)", expanded)
    if missing and not present(Path(expanded)):  # a file may well be called $HOMELESS
        raise UserError(f"{name or text}: the environment variable {missing[1]} is not set; set it or write {text} out")
    return expanded


def expand(text: str | Path) -> Path:
    """Returns `text` as an absolute path with `~` and `$VAR` expanded; links are kept. Raises UserError for an unset
    variable."""
    return Path(os.path.abspath(expand_variables(text)))  # noqa: PTH100 (resolve() would follow links)


def expand_source(text: str | Path) -> str:
    """Returns an address unchanged, and a path as `expand` does."""
    return str(text) if is_address(str(text)) else str(expand(text))


def expand_directory(text: str | Path) -> Path:
    """Returns `text` as `expand` does, for a directory to write into. Raises UserError for an address, too."""
    if is_address(str(text)):
        raise UserError(f"{text}: expected a directory, found an address")
    return expand(text)


def present(path: Path) -> bool:
    """Returns whether there is anything at `path`; False, unlike Path.exists, where a parent folder is not readable."""
    return os.path.exists(path)  # noqa: PTH110


def read_through(path: Path) -> None:
    """Reads a file from end to end, which leaves it in the page cache."""
    block = bytearray(2**22)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that no other thread, process or machine uses; it ends in `.tmp`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def clear_temporaries(path: Path) -> None:
    """Removes the temporary files that killed processes left beside `path`. Only its one writer may call this."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable, where the system can: Windows and some network file systems cannot.

    Raises OSError when it fails for any other reason.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Writes `content` to `path` and returns once it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_hashed(path: Path, write: Callable[[Any], object]) -> tuple[str, int]:
    """Writes to `path` what `write` writes to the binary file that it is given, durably; returns (sha256, bytes).

    Beside io.BytesIO this copies nothing and lets go of Python's lock while it hashes and writes.
    Raises OSError when the disk refuses, whatever `write` makes of that.
    """
    with path.open("wb", buffering=0) as stream:
        file = _HashingFile(stream)
        write(file)
        if file.failure is not None:
            raise file.failure
        os.fsync(stream.fileno())
    return file.digest.hexdigest(), file.bytes


class _HashingFile:
    """Writes through to `stream` and hashes. Failures are kept: C++ that writes here would make others of them."""

    def __init__(self, stream: RawIOBase) -> None:
        self.stream, self.digest, self.bytes = stream, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        """Returns the size of `content` in bytes."""
        view = memoryview(content).cast("B")
        self.digest.update(view)
        self.bytes += len(view)
        try:
            done = 0
            while done < len(view) and self.failure is None:  # Linux writes 2 GiB a call at most
                done += self.stream.write(view[done:]) or 0
        except OSError as error:
            self.failure = error
        return len(view)

    def flush(self) -> None:
        """Does nothing: nothing is held back."""


def write_atomically(path: Path, content: bytes, *, make_folder: bool = False) -> None:
    """Makes `path` hold `content`, durably: a reader sees the old file or the new one, never part of it.

    Its folder is made with `make_folder` only: one that is missing may be a shared one that this machine cannot see.
    Raises OSError and leaves the old file when the disk refuses.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write_durably(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def why_not_writable(path: Path) -> str | None:
    """Returns what would keep `write_atomically`, which may make folders, from `path`, as far as can be seen at once;
    None if nothing. For work that takes long, before it begins."""
    try:
        if path.is_dir():
            return "it is a folder"
        home = next(folder for folder in path.absolute().parents if folder.exists())
        if not home.is_dir():
            return f"{home} is not a folder"
        return None if os.access(home, os.W_OK | os.X_OK) else f"{home} cannot be written to"
    except OSError as error:  # of a name that is too long, or a folder that may not be entered
        return error.strerror or str(error)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` to `path` as JSON, sealed with its sha256: durable, and whole or not at all."""
    content = json.dumps(record).encode()
    write_atomically(path, content + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns what `write_record` wrote, or None when it is missing or damaged."""
    try:
        content, seal = path.read_bytes().split(b"\n")[:2]
    except (OSError, ValueError):
        return None
    if hashlib.sha256(content).hexdigest().encode() != seal:
        return None
    record: dict[str, Any] = json.loads(content)
    return record
