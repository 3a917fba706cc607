"""Sources as the user names them -> local paths: patterns expanded, remote and compressed tars staged once."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import importlib
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gan_dist.data.prepare.sources import is_header
from gan_dist.data.remote.fetch import fetch, masked
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand_source, is_address, present, temporary_name

_BLOCK = 2**20
_MOST_STRAY = 2**16
"""Bytes after a compressed tar that are passed over: a signature, a line end. More may be a part that is damaged."""
_DECODERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(31),
    b"BZh[1-9]": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lzma.LZMADecompressor,
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": lambda: _zstd().ZstdDecompressor(),
}
"""What unpacks one stream, by a pattern of its first bytes. (zstd has streams of two kinds, one of which is empty.)"""
_LONGEST_MAGIC = 6


def _zstd() -> Any:
    """Returns the module that unpacks zstd: of Python 3.14, or a package. Raises ImportError where there is none."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd")
    return importlib.import_module("backports.zstd")


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
                raise UserError(f"source {masked(text)}: unbalanced braces ({error})") from None
        expanded += map(expand_source, many)
    return expanded


def needs_staging(text: str) -> bool:
    """Returns whether a source has no random access where it is: it is remote or compressed."""
    return is_address(text) or _compression(Path(text)) is not None


def _compression(path: Path) -> bytes | None:
    try:
        if not path.is_file():  # opening a pipe would block
            return None
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError:
        return None
    if is_header(head):  # a tar, whose first member's name may begin like anything
        return None
    return next((magic for magic in _DECODERS if re.match(magic, head)), None)


def source_name(text: str) -> str:
    """Returns the name of a source in the account: its last part, without user, password and query."""
    if not is_address(text):
        return Path(text).name
    address = text.split()[-1] if text.startswith("pipe:") else text
    return re.sub(r"(?<=//)[^/]*@", "", re.split("[?#;]", address)[0]).rstrip("/").rpartition("/")[2]


def stage(
    text: str,
    folder: Path,
    tick: Callable[[int], None] = lambda size: None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Returns the path of an uncompressed local copy of a source in `folder`, which is made unless it exists.

    Of a local file it is a copy of what it is now, and has its modification time; of an address, a time that its
    content has. `tick` is called with the bytes of each piece, `log` with what is tried again.

    Raises:
        GanDistError: it cannot be fetched.
        UserError: it is damaged.
    """
    name, source = _digest(text), None if is_address(text) else Path(text)
    status = source and source.stat()
    target = folder / (f"{name}-{_digest(f'{status.st_size} {status.st_mtime_ns}')}" if status else name)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    fetched = temporary_name(target)
    unpacked = temporary_name(target.with_suffix(".unpacked"))
    try:
        if source is None:
            _fetch(text, fetched, tick, log)
        packed = source or fetched
        if magic := _compression(packed):
            with packed.open("rb") as stream:
                _copy(_unpacked(stream, magic), unpacked, text, tick)
            unpacked.replace(fetched)
        os.utime(fetched, ns=2 * (status.st_mtime_ns if status else _time_of_content(fetched),))
        fetched.replace(target)
    finally:
        fetched.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)
    return target


def _time_of_content(path: Path) -> int:
    """Returns a modification time, in ns, that another copy of the same bytes has, too."""
    with path.open("rb") as stream:
        return 10**9 * int(hashlib.file_digest(stream, "sha256").hexdigest()[:7], 16)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _fetch(address: str, target: Path, tick: Callable[[int], None], log: Callable[[str], None]) -> None:
    """Writes the bytes at `address` to `target`, with retries."""

    def receive(chunks: Iterator[bytes]) -> str | None:
        with target.open("wb") as out:
            for data in chunks:
                tick(out.write(data))
            out.flush()
            os.fsync(out.fileno())
        return None if target.stat().st_size else "is empty"

    fetch(address, receive, log=log)


def _unpacked(packed: IO[bytes], magic: bytes) -> Iterator[bytes]:
    """Yields what is unpacked of a file's streams, one after the other, and then what follows them, if it is little:
    whoever reads the tar says what became of it. Raises whatever a decoder raises, EOFError for a stream that is cut
    short, and ValueError if much follows."""
    data = packed.read(_BLOCK)
    while re.match(magic, data):
        decoder = _DECODERS[magic]()
        while not decoder.eof:
            if not data:
                raise EOFError("it ends in the middle")
            yield from _pieces(decoder, data)
            data = decoder.unused_data if decoder.eof else packed.read(_BLOCK)
        while not (data := data.lstrip(b"\0")) and (more := packed.read(_BLOCK)):  # zeros fill it up
            data = more
        data += packed.read(_LONGEST_MAGIC)
    data += packed.read(_MOST_STRAY)
    if len(data) > _MOST_STRAY:
        raise ValueError("what follows the first part is no other one")
    yield data


def _pieces(decoder: Any, data: bytes) -> Iterator[bytes]:
    """Yields what a decoder makes of `data`, a block at a time: a little may become very much."""
    more = True
    while more and not decoder.eof:
        piece = decoder.decompress(data, _BLOCK)
        yield piece
        data = getattr(decoder, "unconsumed_tail", b"")  # zlib's gives back what others keep
        more = len(piece) == _BLOCK or not getattr(decoder, "needs_input", True)


def _copy(chunks: Iterator[bytes], target: Path, text: str, tick: Callable[[int], None]) -> None:
    """Writes what is unpacked from the source `text` to `target`. Raises UserError when it is damaged."""
    with target.open("wb") as out:
        while True:
            try:
                data = next(chunks, None)
            except ImportError:
                raise UserError(
                    f"source {masked(text)} is compressed with zstd, which this Python cannot read: unpack it "
                    "(`zstd -d`), or `pip install backports.zstd`"
                ) from None
            except Exception as error:  # each decompressor has errors of its own, and bz2's are OSErrors
                if isinstance(error, OSError) and error.errno is not None:
                    raise UserError(f"source {masked(text)} cannot be read: {error.strerror}") from None
                raise UserError(f"source {masked(text)} is damaged or cut short ({error}): fetch it again") from None
            if data is None:
                break
            tick(out.write(data))
        out.flush()
        os.fsync(out.fileno())
