"""Folders, zips and tars (WebDataset shards too) -> sorted entries; nothing is extracted or decoded.

A new kind of source is recognised in `open_source`, listed by `list_source` and read in reading.py; plan.py asks for
its checksums. One without random access is unpacked by staging.py first.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from gan_dist.data.prepare.decode import recognised
from gan_dist.utils.errors import UserError

_ENDINGS = """
    jpg jpeg jpe jfif jif png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pfm pam tga ico icns jp2 j2k jpf jpx jpc
    avif avifs heic heif jxl qoi dds pcx sgi ras psd fits xbm xpm mpo
"""
IMAGE_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""Files that claim to be images: each is written or rejected, never skipped, whether it can be decoded here or not."""
_OTHER_ENDINGS = """
    txt json jsonl csv tsv cls xml html htm md pdf svg eps ps ai doc docx xls xlsx npy npz pt pth pkl parquet h5 db log
    ini yaml yml toml py ipynb sh exe dll mp3 wav mp4 m4v mov avi mkv webm cr2 cr3 nef arw dng orf rw2 raf pef srw
"""
_OTHER = frozenset(f".{ending}" for ending in _OTHER_ENDINGS.split())
"""Files that are skipped by name: a look inside would be wasted, or (raw photographs) would find a thumbnail."""
_ARCHIVE_ENDINGS = frozenset((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst"))
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source. `source`: its number; `path`: its name there, with `/`; `size`: its bytes; `stamp`: changes
    with its content (modification time or checksum); `offset`, `packed`, `method`: its place, compressed size and
    compression in an archive; `fault`: a reject's reason known from listing; `stands_for`: the entry it replaces."""

    source: int
    path: str
    size: int
    stamp: str
    offset: int = -1
    packed: int = 0
    method: int = 0
    fault: str = ""
    stands_for: tuple[int, str] | None = None

    @property
    def place(self) -> tuple[int, str]:
        """The source and path of the sample: the original's, if this is a replacement."""
        return self.stands_for or (self.source, self.path)


@dataclass
class Listing:
    """A source's content. `entries`: files that claim to be images, sorted by path; `skipped`: the number of others by
    kind; `classes`: WebDataset `.cls` members by entry path; `notes`: lines for the user."""

    entries: list[Entry] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    classes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where images come from. `name`: in the account; `kind`: folder, zip or tar; `path`: the local path."""

    name: str
    kind: str
    path: str

    @property
    def stem(self) -> str:
        """The name without an archive's ending, which stands for the folder of its content."""
        return self.name if self.kind == "folder" else PurePosixPath(self.name).stem


def open_source(path: Path, name: str) -> Source:
    """Returns the source at `path`; its content decides its kind.

    Raises:
        UserError: nothing there, or nothing that can be listed.
    """
    try:
        if path.is_dir():
            return Source(name, "folder", str(path))
        with path.open("rb") as stream:
            head = stream.read(512)
        # tar first: zipfile looks for a zip's end, which a tar has too if its last member is a zip
        if head[257:262] == b"ustar":
            return Source(name, "tar", str(path))
        if zipfile.is_zipfile(path):
            return Source(name, "zip", str(path))
        if head and _is_tar(path):
            return Source(name, "tar", str(path))
    except OSError as error:
        reason = "there is no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"source {path} cannot be read: {reason}") from None
    if head[:4] == b"PK\3\4":
        raise UserError(f"source {path} is a zip that is cut short (no central directory at its end): fetch it again")
    raise UserError(f"source {path} is neither a folder nor a zip nor a tar: expected one of these")


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def list_source(source: Source, number: int, exclude: Path | None = None) -> Listing:
    """Returns the content of `source`; its entries get `number` as their source. `exclude`: a folder to leave out.

    Raises:
        UserError: a damaged archive, or a source that holds no image.
    """
    listing = Listing()
    match source.kind:
        case "folder":
            _list_folder(source, number, exclude, listing)
        case "zip":
            _list_zip(source, number, listing)
        case "tar":
            _list_tar(source, number, listing)
        case kind:
            raise AssertionError(f"no way to list a source of kind {kind!r}")
    # by bytes, and by offset where an archive has a name twice: the same order on every machine
    listing.entries.sort(key=lambda entry: (entry.path.encode("utf-8", "surrogatepass"), entry.offset))
    if not listing.entries:
        others = (
            ", ".join(f"{count} {kind}" for kind, count in sorted(listing.skipped.items())) or "nothing else either"
        )
        raise UserError(f"source {source.path} holds no image: found {others}")
    return listing


def skip_kind(path: str, read_head: Callable[[], bytes] | None = None) -> str | None:
    """Returns the kind under which a file of this name is skipped, or None when it claims to be an image.

    A file without a known ending (`Mona Lisa, c. 1503`) is judged by its first bytes, which `read_head` returns (16
    suffice).
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts  # some zips come from Windows
    name = parts[-1] if parts else path
    if "__MACOSX" in parts:
        return "__MACOSX"
    if name.lower() in _SYSTEM_FILES:
        return "system file"
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        return "dot file"
    ending = PurePosixPath(name).suffix.lower()
    if ending in IMAGE_ENDINGS:
        return None
    if ending in _ARCHIVE_ENDINGS:
        return "nested archive"
    if ending in _OTHER:
        return f"not an image: {ending}"
    with contextlib.suppress(Exception):  # a damaged member: zipfile and its decompressors raise anything
        if read_head is not None and recognised(read_head()):
            return None
    return f"not an image: {ending}" if re.fullmatch(r"\.[a-z0-9_]{1,5}", ending) else "not an image"


def _list_folder(source: Source, number: int, exclude: Path | None, listing: Listing) -> None:
    """Walks real folders first, then links to folders not seen yet: loops end, and each folder counts once."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    links: list[str] = []
    excluded = os.path.realpath(exclude) if exclude else None
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        where = Path(source.path, folder)
        try:
            status = where.stat()
            if (status.st_dev, status.st_ino) in seen or os.path.realpath(where) == excluded:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(where) as scan:
                items = sorted(scan, key=lambda item: os.fsencode(item.name))
        except OSError as error:
            if not folder:
                raise UserError(f"source {source.path} cannot be read: {error.strerror}") from None
            listing.skipped["unreadable folder"] += 1
            continue
        if folder and any(item.name == ".prepare" for item in items):
            listing.notes.append(f"{where} is a dataset of gan_dist: left out of {source.name}")
            continue
        inner = []
        for item in items:
            path = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir(follow_symlinks=False):
                inner.append(path)
            elif item.is_dir():
                links.append(path)
            else:
                _list_file(item, path, number, listing)
        waiting.extend(reversed(inner))


def _list_file(item: os.DirEntry[str], path: str, number: int, listing: Listing) -> None:
    try:
        status = item.stat()
    except OSError:  # a broken link
        if kind := skip_kind(path):
            listing.skipped[kind] += 1
        else:
            listing.entries.append(Entry(number, path, 0, "", fault="unreadable"))
        return
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        listing.skipped["special file"] += 1
        return

    def read_head() -> bytes:
        with Path(item.path).open("rb") as stream:
            return stream.read(16)

    if kind := skip_kind(path, read_head):
        listing.skipped[kind] += 1
    else:
        listing.entries.append(Entry(number, path, status.st_size, str(status.st_mtime_ns)))


def _list_zip(source: Source, number: int, listing: Listing) -> None:
    try:
        with zipfile.ZipFile(source.path) as archive:
            for info in archive.infolist():
                if info.filename and info.is_dir():
                    continue
                mode = info.external_attr >> 16
                encrypted = bool(info.flag_bits & 1)
                read_head = None if encrypted else partial(_head, archive, info)
                kind = "link" if stat.S_ISLNK(mode) else skip_kind(info.filename, read_head)
                if kind:
                    listing.skipped[kind] += 1
                    continue
                listing.entries.append(
                    Entry(
                        number,
                        info.filename,
                        info.file_size,
                        f"{info.CRC:08x}",
                        info.header_offset,
                        info.compress_size,
                        info.compress_type,
                        "encrypted" if encrypted else "",
                    )
                )
    except Exception as error:  # on hostile bytes zipfile raises struct.error, UnicodeDecodeError, IndexError, ...
        raise UserError(f"source {source.path} is a damaged zip ({_one_line(error)}): fetch it again") from None


def _head(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as member:
        return member.read(16)


def _list_tar(source: Source, number: int, listing: Listing) -> None:
    keys: dict[str, str] = {}  # WebDataset key -> class
    sidecars: dict[str, list[str]] = {}
    size = Path(source.path).stat().st_size
    end = 0
    try:
        with Path(source.path).open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    listing.skipped["link" if member.islnk() or member.issym() else "special file"] += 1
                    continue
                raw_position = raw.tell()
                raw.seek(member.offset_data)
                kind = skip_kind(member.name, partial(raw.read, min(16, member.size)))
                if kind and member.name.endswith(".cls") and member.size < 1000:
                    raw.seek(member.offset_data)
                    keys[_key(member.name)] = raw.read(member.size).decode("utf-8", "replace").strip()
                raw.seek(raw_position)
                if kind:
                    sidecars.setdefault(_key(member.name), []).append(kind)
                    continue
                stamp = f"{member.mtime:.0f}-{member.chksum}"
                entry = Entry(number, member.name, member.size, stamp, member.offset_data, member.size)
                listing.entries.append(entry)
            raw.seek(end)
            rest = raw.read(1024)
    except Exception as error:
        raise UserError(
            f"source {source.path} is a tar that is damaged or cut short ({_one_line(error)}): fetch it again"
        ) from None
    if end > size or rest.strip(b"\0"):
        # tarfile takes a damaged header for the end: everything after it would be lost silently
        raise UserError(f"source {source.path} is a tar that is damaged or cut short at byte {end}: fetch it again")
    if len(rest) < 512:
        listing.notes.append(f"{source.name} has no end mark: it may be cut short after {len(listing.entries)} images")
    images = {_key(entry.path) for entry in listing.entries}
    for key, kinds in sidecars.items():
        for kind in kinds:
            listing.skipped[kind.replace("not an image", "beside an image") if key in images else kind] += 1
    listing.classes = {entry.path: keys[_key(entry.path)] for entry in listing.entries if keys.get(_key(entry.path))}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _key(path: str) -> str:
    """Returns a WebDataset key: the path up to the first dot of its last part."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}"
