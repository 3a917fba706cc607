"""Folders, zips and tars (WebDataset shards too) -> sorted entries; nothing is extracted or decoded.

A new kind of source is recognised in `open_source` (and leaves `_NOT_READ`), listed by `list_source`, and read in
reading.py; `Source.has_checksums` says what its stamps are, `Source.stem` what its name is without an ending.
staging.py first unpacks what is one compressed stream. docs/preparing.md lists them.

A new format of images that Pillow reads is a name in decode.py's _FORMATS (no more in _KNOWN_BUT_UNREAD), with its
endings in _ENDINGS here, what a pixel takes in _BYTES_PER_PIXEL, a check for damage in a file of its own, and a line in
tests/bench/damage.py's FORMATS.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from gan_dist.data.prepare import zips
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.decode import recognised
from gan_dist.utils.errors import UserError

_ENDINGS = """
    jpg jpeg jpe jfif jif png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pfm pam tga ico cur icns jp2 j2k jpf jpx
    jpc avif avifs heic heif jxl qoi dds pcx sgi ras psd fits xbm xpm mpo
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
_TRASH = r"\$recycle\.bin recycle\.bin recycler recycled #recycle @recycle lost\+found found\.\d{3} @quarantine"
_KEPT_BY_DEVICES = "@eadir @tmp #snapshot ~snapshot @recently-snapshot @sharesnap @sharebin @appstore @database"
_KEPT_BY_PROGRAMS = r"@synoresource _vti_\w+ _gsdata_ thevolumesettingsfolder"
_SPACED = ("system volume information", "network trash folder", "temporary items")
_SYSTEM_FOLDER = re.compile(
    "|".join((*_TRASH.split(), *_KEPT_BY_DEVICES.split(), *_KEPT_BY_PROGRAMS.split(), *_SPACED)), re.I
)
"""Folders of disks, NASes, systems and web servers: what they hold is a thumbnail, a backup, or was thrown away."""
_JOIN = "one part of several of a split zip: join them first (`zip -s 0 SET.zip --out whole.zip`)"
_NOT_READ = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it (`7z x`)",
    b"Rar!\x1a\x07": "a rar archive: unpack it (`unrar x`)",
    b"PAR1": "a parquet table: write its images into a folder or a tar",
    b"ARROW1": "an Arrow table: write its images into a folder or a tar",
    b"\x89HDF": "an HDF5 file: write its images into a folder or a tar",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it (`lz4 -d`)",
    b"LZIP": "compressed with lzip: unpack it (`lzip -d`)",
    b"\x5d\0\0": "compressed with lzma: unpack it (`unlzma`)",
    b"\x1f\x9d": "compressed with compress: unpack it (`uncompress`)",
    b"PK\7\x08": _JOIN,
}
"""What a source may be by mistake, by its first bytes, and what to do."""
_PACKED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_LONGEST_LINK = 5000
_PART = re.compile(r"\.(z\d\d|\d{3}|part\d+(\.rar)?|tar\.\w*a[a-z])$", re.I)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source. `source`: its number; `path`: its name there, with `/`; `size`: its bytes; `stamp`: changes
    with its content (modification time or checksum); `offset`, `packed`, `method`: its place, compressed size and
    compression in an archive; `pieces`: of a sparse file in a tar, start and size of what is stored; `fault`: a
    reject's reason known from listing; `stands_for`: the entry it replaces."""

    source: int
    path: str
    size: int
    stamp: str
    offset: int = -1
    packed: int = 0
    method: int = 0
    fault: str = ""
    stands_for: tuple[int, str] | None = None
    pieces: tuple[tuple[int, int], ...] | None = None

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
    def has_checksums(self) -> bool:
        """Whether an entry's `stamp` is a checksum of its content, and not a time."""
        return self.kind == "zip"

    @property
    def stem(self) -> str:
        """The name without an archive's ending, which stands for the folder of its content."""
        if self.kind == "folder":
            return self.name
        path = PurePosixPath(self.name)
        return PurePosixPath(path.stem).stem if path.stem.lower().endswith(".tar") else path.stem


def open_source(path: Path, name: str) -> Source:
    """Returns the source at `path`; its content decides its kind.

    Raises:
        UserError: nothing there, or nothing that can be listed.
    """
    try:
        if path.is_dir():
            return Source(name, "folder", str(path))
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"source {path} is a pipe or a device, which can be read once only: copy it into a file")
        with path.open("rb") as stream:
            head = stream.read(512)
            end = zips.find_end(stream)
        if not is_header(head):  # a tar's first name may begin like anything
            _refuse(path, head)
        # tar first: it has a zip's end, too, if its last member is a zip
        if head[257:262] == b"ustar" or is_header(head):
            return Source(name, "tar", str(path))
        if end is not None:
            if end.split:
                raise UserError(f"source {path} is {_JOIN}")
            return Source(name, "zip", str(path))
        if head and _is_tar(path):
            return Source(name, "tar", str(path))
    except OSError as error:
        reason = "there is no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"source {path} cannot be read: {reason}") from None
    if _PART.search(path.name):
        raise UserError(f"source {path} is, by its name, one part of several of a split archive: join them first")
    if head[:4] == b"PK\3\4":
        raise UserError(f"source {path} is a zip that is cut short (no central directory at its end): fetch it again")
    raise UserError(f"source {path} is neither a folder nor a zip nor a tar: expected one of these")


def _refuse(path: Path, head: bytes) -> None:
    """Raises UserError for a file that is known to be no source."""
    if not head:
        raise UserError(f"source {path} is empty: fetch it again")
    for magic, what in _NOT_READ.items():
        if head.startswith(magic):
            raise UserError(f"source {path} is {what}")


def is_header(block: bytes) -> bool:
    """Returns whether a tar's member begins with these 512 bytes: those of the oldest kind have no signature."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def list_source(
    source: Source, number: int, exclude: Path | None = None, tick: Callable[[], None] = lambda: None
) -> Listing:
    """Returns the content of `source`; its entries get `number` as their source. `exclude`: a folder to leave out;
    `tick` is called for each file.

    Raises:
        UserError: a damaged archive, or a source that holds no image.
    """
    listing = Listing()
    match source.kind:
        case "folder":
            _list_folder(source, number, exclude, listing, tick)
        case "zip":
            _list_zip(source, number, listing, tick)
        case "tar":
            _list_tar(source, number, listing, tick)
        case kind:
            raise AssertionError(f"no way to list a source of kind {kind!r}")
    # by bytes: the same order on every machine, and in a folder and its archives
    listing.entries.sort(key=lambda entry: entry.path.encode("utf-8", "surrogatepass"))
    if not listing.entries:
        others = (
            ", ".join(f"{count} {kind}" for kind, count in sorted(listing.skipped.items())) or "nothing else either"
        )
        raise UserError("; ".join([f"source {source.path} holds no image: found {others}", *listing.notes]))
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
    if any(map(_SYSTEM_FOLDER.fullmatch, parts[:-1])):
        return "system folder"
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        return "dot file"
    ending = PurePosixPath(name).suffix.lower()
    if ending in IMAGE_ENDINGS:
        return None
    if ending in _ARCHIVE_ENDINGS:
        return "nested archive"
    if ending in _OTHER:
        return f"not an image: {ending}"
    if read_head is not None:
        try:
            if recognised(read_head()):
                return None
        except (Rejected, OSError):  # it may be one; whoever reads it will say why not
            return None
    return f"not an image: {ending}" if re.fullmatch(r"\.[a-z0-9_]{1,5}", ending) else "not an image"


def _list_folder(source: Source, number: int, exclude: Path | None, listing: Listing, tick: Callable[[], None]) -> None:
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
        inner: list[str] = []
        for item in items:
            path = f"{folder}/{item.name}" if folder else item.name
            tick()
            try:
                is_folder = item.is_dir()
            except OSError:  # a link that goes in circles, or has a name that is too long
                is_folder = False
            if is_folder:
                (links if item.is_symlink() else inner).append(path)
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


class _Members:
    """The files of an archive by path: of several under one path, the last one counts, as when they are unpacked."""

    def __init__(self, read_head: Callable[[Entry], bytes]) -> None:
        """`read_head`: returns a file's first bytes."""
        self.entries: dict[str, Entry] = {}
        self._read_head = read_head
        self._others: dict[str, tuple[str, Entry | None]] = {}  # skipped as what kind
        self._links: dict[str, str] = {}
        self._older = 0

    def add(self, path: str, entry: Entry | None, kind: str | None) -> None:
        """Adds a file, which is skipped if it has a `kind`."""
        self._forget(path)
        if entry is not None and kind is None:
            self.entries[path] = entry
        else:
            self._others[path] = kind or "", entry

    def add_link(self, path: str, target: str, hard: bool = False) -> None:
        """Adds a link to `target`, a path in the archive. A hard one is the file that is there by now."""
        kind, found = self._behind(path, target) if hard else (None, None)
        if found is not None:
            self.add(path, replace(found, path=path), kind)
        else:
            self._forget(path)
            self._links[path] = target

    def _behind(self, path: str, target: str) -> tuple[str | None, Entry | None]:
        """Returns the file at `target`, if there is one, and as what kind it is skipped, if it is, under `path`."""
        kind, found = self._others.get(target, (None, self.entries.get(target)))
        if found is None:
            return skip_kind(path) or kind, None
        return skip_kind(path, partial(self._read_head, found)), found  # it may lie in a hidden folder itself

    def _forget(self, path: str) -> None:
        for known in (self.entries, self._others, self._links):
            self._older += known.pop(path, None) is not None

    def resolve(self, number: int, listing: Listing) -> list[tuple[str, str, Entry | None]]:
        """Adds the images to the listing, and returns path, kind and entry of each file that is skipped. A link is the
        file that it leads to; one that leads nowhere cannot be read."""
        folders = self._folders()
        skipped = [(path, kind, entry) for path, (kind, entry) in self._others.items()]
        for path, target in self._links.items():
            target = self._followed(target)
            kind, found = self._behind(path, target)
            if found is None and target in folders:
                kind = "link to a folder"
            if kind:
                skipped.append((path, kind, found))
            elif found is not None:
                listing.entries.append(replace(found, path=path))
            else:
                listing.entries.append(Entry(number, path, 0, "", fault="unreadable"))
        listing.entries += self.entries.values()
        if self._older:
            listing.skipped["older version"] += self._older
            listing.notes.append(
                f"{self._older:,} members are there again further on under the same name: the last of each counts"
            )
        return skipped

    def _folders(self) -> set[str]:
        """Returns the folders that the files lie in, and those that these lie in."""
        folders = {"."}
        for path in (*self.entries, *self._others):
            while (path := posixpath.dirname(path)) and path not in folders:
                folders.add(path)
        return folders

    def _followed(self, path: str) -> str:
        """Returns the path of a file without the links that lead to it, and to the folders that it lies in."""
        for _ in range(40):
            folders = [path[: match.start()] for match in re.finditer("/|$", path)]
            link = next((folder for folder in folders if folder in self._links), None)
            if link is None:
                break
            path = posixpath.normpath(self._links[link] + path[len(link) :])
        return path


def _normal(path: str) -> str:
    """Returns a member's path without what unpacking ignores: `./`, doubled slashes, and a way out at the beginning."""
    return re.sub(r"^(\.{0,2}/+)+", "", re.sub(r"/(\./|/)+", "/", path)) if "/" in path else path


def _target(path: str, link: str) -> str:
    """Returns the path in the archive to which the symbolic link at `path` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _list_zip(source: Source, number: int, listing: Listing, tick: Callable[[], None]) -> None:
    try:
        with Path(source.path).open("rb") as stream:
            members = _Members(partial(_head, stream))
            directory = zips.members(stream)
            length = stream.seek(0, os.SEEK_END)
            within = [member.offset for member in directory if not member.fault and 0 <= member.offset < length]
            _refuse_several(source, stream, min(within, default=0))
            for member in directory:
                tick()
                if member.path.endswith("/"):
                    continue
                if not member.path:
                    listing.skipped["member without a name"] += 1
                    continue
                path = _normal(member.path)
                place = member.offset, member.packed, member.method, member.fault
                entry = Entry(number, path, member.size, f"{member.crc:08x}", *place)
                link = _read_link(stream, entry) if member.is_link else None
                if link is not None:
                    members.add_link(path, _target(path, link))
                else:
                    members.add(path, entry, skip_kind(path, partial(_head, stream, entry)))
            listing.skipped.update(kind for _, kind, _ in members.resolve(number, listing))
    except (OSError, ValueError) as error:
        raise UserError(f"source {source.path} is a damaged zip ({_one_line(error)}): fetch it again") from None


def _head(stream: IO[bytes], entry: Entry) -> bytes:
    """Returns the first bytes of a zip's member. Raises Rejected where they cannot be read."""
    if entry.fault:
        raise Rejected(entry.fault)
    return zips.head(stream, entry.offset, entry.packed, entry.method)


def _read_link(stream: IO[bytes], entry: Entry) -> str | None:
    """Returns where a zip's link leads. None: it cannot be read, as whoever reads it as a file will say."""
    if entry.fault or max(entry.size, entry.packed) > _LONGEST_LINK:
        return None
    try:
        target = zips.read(stream, entry.offset, entry.packed, entry.method, entry.size, entry.stamp)
    except (Rejected, OSError):
        return None
    return target.decode("utf-8", "surrogateescape")


def _refuse_several(source: Source, stream: IO[bytes], start: int) -> None:
    """Raises UserError when another zip ends at byte `start`, where this one begins: only the last one's directory is
    read."""
    stream.seek(max(0, start - 66_000))
    before = stream.read(start - stream.tell()) if start > 0 else b""
    end = before.rfind(b"PK\5\6")
    if end >= 0 and end + 22 + int.from_bytes(before[end + 20 : end + 22], "little") == len(before):
        raise UserError(
            f"source {source.path} is several zips in one file, of which only the last could be read: "
            f"give each as a source of its own (the last begins at byte {start})"
        )


def _list_tar(source: Source, number: int, listing: Listing, tick: Callable[[], None]) -> None:
    """Lists all tars that were written into the file one after the other: each ends with blocks of zeros."""
    status, start = Path(source.path).stat(), 0
    size, written = status.st_size, str(status.st_mtime_ns)
    try:
        with Path(source.path).open("rb") as raw:
            members = _Members(partial(_tar_head, raw))
            while start < size:
                end = _list_one_tar(raw, start, number, written, members, tick)
                raw.seek(end)
                rest = raw.read(512)
                if end > size or rest.strip(b"\0"):
                    # tarfile takes a damaged header for the end: everything after it would be lost silently
                    raise tarfile.ReadError(f"no header at byte {end}")
                if len(rest) < 512:
                    found = f"{len(members.entries)} images"
                    listing.notes.append(f"{source.name} has no end mark: it may be cut short after {found}")
                start = _after_zeros(raw, end)
                if start < size and not _may_be_archive(raw, start):
                    stray = f"{size - start:,} bytes after its end mark that are no archive"
                    listing.notes.append(f"{source.name} has {stray}: left out")
                    break
            skipped = members.resolve(number, listing)
            files = [(path, entry) for path, _, entry in skipped if entry is not None]
            keys = {_key(path): _read_class(raw, entry) for path, entry in files if _is_class(path, entry)}
    except Exception as error:
        raise UserError(
            f"source {source.path} is a tar that is damaged or cut short ({_one_line(error)}): fetch it again"
        ) from None
    images = {_key(entry.path) for entry in listing.entries}
    for path, kind, _ in skipped:
        listing.skipped[kind.replace("not an image", "beside an image") if _key(path) in images else kind] += 1
    listing.classes = {entry.path: keys[_key(entry.path)] for entry in listing.entries if keys.get(_key(entry.path))}


def _is_class(path: str, entry: Entry) -> bool:
    """Returns whether a file that is skipped is a WebDataset sample's class: a short one, whatever links lead to it."""
    return path.endswith(".cls") and entry.size < 1000 and entry.pieces is None


def _read_class(raw: IO[bytes], entry: Entry) -> str:
    raw.seek(entry.offset)
    return raw.read(entry.size).decode("utf-8", "replace").strip()


def _list_one_tar(
    raw: IO[bytes], start: int, number: int, written: str, members: _Members, tick: Callable[[], None]
) -> int:
    """Adds the members of the tar that begins at byte `start`; returns where its end mark should be. `written`: the
    file's modification time, since a member's own is often the same whatever is in it."""
    raw.seek(start)
    end = start
    with tarfile.open(fileobj=raw, mode="r:") as archive:
        for member in archive:
            tick()
            # of a sparse file, `path` is what a program that knows none would call it
            end, path = archive.offset, _normal(member.pax_headers.get("GNU.sparse.name") or member.name)
            if member.isdir():
                continue
            if member.issym() or member.islnk():
                link = member.linkname
                members.add_link(path, _target(path, link) if member.issym() else _normal(link), member.islnk())
                continue
            if not member.isreg():
                members.add(path, None, "special file")
                continue
            pieces = _pieces(member)
            stored = member.size if pieces is None else sum(size for _, size in pieces)
            stamp = f"{member.mtime:.0f}-{member.chksum}-{written}"
            entry = Entry(number, path, member.size, stamp, member.offset_data, stored, pieces=pieces)
            members.add(path, entry, skip_kind(path, partial(_tar_head, raw, entry)))
    return end


def _pieces(member: tarfile.TarInfo) -> tuple[tuple[int, int], ...] | None:
    """Returns start and size of each stored piece of a sparse member; None for one that is stored whole."""
    pieces: Any = member.sparse
    return tuple((int(start), int(size)) for start, size in pieces) if pieces is not None else None


def _tar_head(raw: IO[bytes], entry: Entry) -> bytes:
    """Returns the first bytes of a tar's member, and leaves the stream where it was."""
    position = raw.tell()
    try:
        raw.seek(entry.offset)
        return raw.read(min(16, entry.packed))
    finally:
        raw.seek(position)


def _after_zeros(raw: IO[bytes], place: int) -> int:
    """Returns the first byte from `place` on, in steps of 512, of a block that is not zero; or the end of the file."""
    raw.seek(place)
    while block := raw.read(2**20):
        if rest := block.lstrip(b"\0"):
            return place + (len(block) - len(rest)) // 512 * 512
        place += len(block)
    return place


def _may_be_archive(raw: IO[bytes], start: int) -> bool:
    """Returns whether a tar, whole or damaged, or another archive may be in the bytes from `start` on."""
    raw.seek(start)
    first = raw.read(512)
    if first.lstrip(b"\0").startswith((b"PK\3\4", *_PACKED, *_NOT_READ)):
        return True
    if is_header(first):
        return True
    raw.seek(start)
    tail = b""
    while block := raw.read(2**20):
        if b"ustar" in tail + block:
            return True
        tail = block[-4:]
    return False


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _key(path: str) -> str:
    """Returns a WebDataset key: the path up to the first dot of its last part."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}"
