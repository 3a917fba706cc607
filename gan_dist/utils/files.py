"""Files that are complete or absent, with umask permissions; paths as people write them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

from gan_dist.utils.errors import UserError


def is_address(text: str) -> bool:
    """Returns whether `text` names something remote (`http://...`, `s3://...`, `pipe:...`), not a path."""
    return text.startswith("pipe:") or "://" in text[:16]


def expand(text: str | Path) -> Path:
    """Returns `text` as an absolute path with `~` and `$VAR` expanded. Links are not followed.

    Raises:
        UserError: a variable in it is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111 (Path's fails where nobody is called that)
    missing = re.search(r"\$\{?([A-Za-z_]\w*)", expanded)
    if missing and not present(Path(expanded)):  # a file may well be called $HOMELESS
        raise UserError(f"{text}: the environment variable {missing[1]} is not set: set it or write the path out")
    return Path(os.path.abspath(expanded))  # noqa: PTH100 (resolve() would follow links)


def expand_directory(text: str | Path) -> Path:
    """Returns `text` as expand does, for a directory that is written. Raises UserError for an address, too."""
    if is_address(str(text)):
        raise UserError(f"{text}: expected a directory, found an address")
    return expand(text)


def present(path: Path) -> bool:
    """Returns whether there is anything at `path`. Unlike Path.exists it does not raise where a folder above may not be
    looked into."""
    return os.path.exists(path)  # noqa: PTH110


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that no other process on any machine uses; it ends in `.tmp`."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def clear_temporaries(path: Path) -> None:
    """Removes what killed processes left of `path` beside it. Only for who alone may write `path`."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable, where the system can (not on Windows, nor on every network file system)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def publish(path: Path, content: bytes) -> None:
    """Writes `content` to `path`: durable and whole, or (killed, disk full) not there at all."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def publish_record(path: Path, record: dict[str, Any]) -> None:
    """Publishes `record` as JSON, sealed with its sha256."""
    content = json.dumps(record).encode()
    publish(path, content + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns what `publish_record` wrote, or None when it is not there or not whole."""
    try:
        content, seal = path.read_bytes().split(b"\n")[:2]
    except (OSError, ValueError):
        return None
    if hashlib.sha256(content).hexdigest().encode() != seal:
        return None
    record: dict[str, Any] = json.loads(content)
    return record
