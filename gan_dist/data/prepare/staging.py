"""Sources as the user names them -> local paths: patterns expanded, remote and compressed tars staged once."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import importlib
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gan_dist.data.remote.fetch import fetch
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand_source, is_address, present, temporary_name


def _zstd_open(path: Path | str, mode: str) -> Any:
    """Returns a zstd file, opened by Python 3.14 or a package that can. Raises UserError where there is none."""
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).open(path, mode)
    raise UserError(
        f"source {path} is compressed with zstd, which this Python cannot read: unpack it (`zstd -d`), "
        "or `pip install backports.zstd`"
    )


_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd_open,
}


def spread(texts: Sequence[str | Path]) -> list[str]:
    """Returns the sources with brace patterns (`shards/{00000..00099}.tar`) expanded and local paths absolute."""
    expanded: list[str] = []
    for text in map(str, texts):
        many = [text]
        if "{" in text and (is_address(text) or not present(Path(text))) and not text.startswith("pipe:"):
            from braceexpand import braceexpand

            try:
                many = list(braceexpand(text))
            except ValueError as error:
                raise UserError(f"source {text}: unbalanced braces ({error})") from None
        expanded += map(expand_source, many)
    return expanded


def needs_staging(text: str) -> bool:
    """Returns whether a source has no random access where it is: it is remote or compressed."""
    return is_address(text) or _compression(Path(text)) is not None


def _compression(path: Path) -> bytes | None:
    try:
        with path.open("rb") as stream:
            head = stream.read(6)
    except OSError:
        return None
    return next((magic for magic in _COMPRESSED if head.startswith(magic)), None)


def source_name(text: str) -> str:
    """Returns the name of a source in the account: its last part, without a query."""
    return text.split()[-1].split("?")[0].rstrip("/").rpartition("/")[2] if is_address(text) else Path(text).name


def stage(text: str, folder: Path) -> Path:
    """Returns the path of an uncompressed local copy of a source in `folder`, which is made unless it exists.

    Raises:
        GanDistError: it cannot be fetched.
        UserError: it is damaged.
    """
    target = folder / hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    fetched = temporary_name(target)
    unpacked = temporary_name(target.with_suffix(".unpacked"))
    try:
        if is_address(text):
            _fetch(text, fetched)
        magic = _compression(fetched if is_address(text) else Path(text))
        if magic:
            with _COMPRESSED[magic](fetched if is_address(text) else text, "rb") as packed:
                _copy(packed, unpacked, text)
            unpacked.replace(fetched)
        fetched.replace(target)
    finally:
        fetched.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)
    return target


def _fetch(address: str, target: Path) -> None:
    """Writes the bytes at `address` to `target`, with retries."""

    def receive(chunks: Iterator[bytes]) -> str | None:
        with target.open("wb") as out:
            out.writelines(chunks)
            out.flush()
            os.fsync(out.fileno())
        return None if target.stat().st_size else "is empty"

    fetch(address, receive)


def _copy(source: IO[bytes], target: Path, text: str) -> None:
    """Writes what is unpacked from the source `text` to `target`. Raises UserError when it is damaged."""
    with target.open("wb") as out:
        while True:
            try:
                data = source.read(2**20)
            except Exception as error:  # each decompressor has errors of its own, and bz2's are OSErrors
                if isinstance(error, OSError) and error.errno is not None:
                    raise UserError(f"source {text} cannot be read: {error.strerror}") from None
                raise UserError(f"source {text} is damaged or cut short ({error}): fetch it again") from None
            if not data:
                break
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
