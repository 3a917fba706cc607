"""The shard and manifest format: USTAR tars of `.npy` samples at a constant stride, described by one manifest.json.

A member is `<9-digit key>.npy`: a 512-byte tar header, numpy's header, the uint8 (3, S, S) pixels, zeros up to the
next multiple of 512. All members are alike, so a memory map of the tar is one strided tensor; any WebDataset reader
reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gan_dist.data.headers import TAR_BLOCK, first_bad_header, member_header, npy_header
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand, fsync_folder, is_address, present, temporary_name

if TYPE_CHECKING:
    import torch

    from gan_dist.data.remote.cache import Cache

FORMAT = 1
MANIFEST = "manifest.json"
MEND = (
    "run the `gan-dist prepare` that made it again (only bad shards are rewritten), or `gan-dist verify` to see all "
    "that is wrong"
)


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard.

    `file`: name beside the manifest; `samples`: members, at least 1; `bytes`, `sha256`: of the tar; `stride`: bytes
    from one member to the next; `data_offset`: byte offset of the first sample's pixels; `sidecar_sha256`: of the
    `.jsonl` beside it.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    stride: int
    data_offset: int
    sidecar_sha256: str = ""

    def __post_init__(self) -> None:
        for it in fields(self):
            value = getattr(self, it.name)
            if type(value).__name__ != it.type or (type(value) is int and not 0 <= value < 2**62):
                raise TypeError(f"a shard's {it.name} is {value!r:.60}")

    @property
    def sidecar(self) -> str:
        """The name of the per-sample records, one JSON object a line, in the order of the members."""
        return Path(self.file).with_suffix(".jsonl").name


@dataclass(frozen=True)
class Manifest:
    """A dataset's table of contents.

    `format`: version of this layout; `resolution`: S; `recipe`: how sources became pixels; `classes`: names, a label is
    an index into them; `totals`: the account of every source entry; `shards`: in order. `identity`: sha256 of
    manifest.json, which is the dataset's name wherever it lies.
    """

    format: int
    resolution: int
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    totals: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    identity: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        kinds = {"format": int, "resolution": int, "recipe": dict, "classes": tuple, "totals": dict, "shards": tuple}
        for name, kind in kinds.items():
            if type(value := getattr(self, name)) is not kind:
                raise TypeError(f"{name} is {value!r:.60}")
        if not all(isinstance(name, str) for name in self.classes):
            raise TypeError("a class has no name")

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Returns what manifest.json holds: JSON with one shard a line, the same bytes for the same contents."""
        head = {key: value for key, value in asdict(self).items() if key not in ("shards", "identity")}
        text = json.dumps(head, indent=1)
        lines = ",\n".join("  " + json.dumps(asdict(shard)) for shard in self.shards)
        return (text.removesuffix("\n}") + f',\n "shards": [\n{lines}\n ]\n}}\n').encode()


def read_manifest(root: str | Path) -> Manifest:
    """Returns the manifest of the dataset in the folder `root`.

    Raises:
        UserError: no dataset there, a damaged manifest, or one that a newer gan_dist wrote.
    """
    path = expand(root) / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        hint = (
            "its preparation has not finished: run `gan-dist prepare` again"
            if present(path.parent / ".prepare")
            else "expected a folder made by `gan-dist prepare`"
        )
        raise UserError(f"{path.parent} is not a dataset: no readable {MANIFEST} ({error.strerror}); {hint}") from None


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Returns the manifest in the bytes of manifest.json, which messages say lies at `where`.

    Raises:
        UserError: it is damaged, or a newer gan_dist wrote it.
    """
    try:
        fields = json.loads(content)
        if (version := int(fields["format"])) > FORMAT:
            raise UserError(f"{where} has format {version}, this gan_dist reads up to {FORMAT}: update gan_dist")
        shards = tuple(ShardInfo(**shard) for shard in fields.pop("shards"))
        manifest = Manifest(
            **fields | {"classes": tuple(fields["classes"]), "shards": shards},
            identity=hashlib.sha256(content).hexdigest(),
        )
        if not shards or manifest.resolution < 1 or any(shard.samples < 1 for shard in shards):
            raise ValueError("no samples")
        for shard in shards:
            # It becomes part of paths and of shell commands, and may have come from anywhere.
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.tar", shard.file, re.ASCII):
                raise ValueError(f"{shard.file!r} is no name of a shard")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is damaged ({error}): run the `gan-dist prepare` that made it again") from None
    return manifest


class Dataset:
    """Prepared samples, memory-mapped shard by shard at first use. A context; closing it lets all of it go.

    With a `cache`, `root` is a folder on this machine to which shards are fetched at first use.
    """

    def __init__(self, root: Path, manifest: Manifest, cache: Cache | None = None) -> None:
        self.root, self.manifest, self.cache = root, manifest, cache
        self.identity = manifest.identity
        self.resolution = manifest.resolution
        self.num_samples = manifest.num_samples
        self.shard_sizes: tuple[int, ...] = tuple(shard.samples for shard in manifest.shards)
        self._views: dict[int, torch.Tensor] = {}

    def shard_view(self, i: int) -> torch.Tensor:
        """Returns shard `i` as uint8 [n_i, 3, S, S], a constant-stride view of the mapped tar: nothing is copied.

        The map is private: a write into the view never reaches the file (and a read-only map would make torch warn).
        """
        if (view := self._views.get(i)) is not None:
            return view
        import torch

        shard, size = self.manifest.shards[i], self.resolution
        if self.cache is not None:
            self.cache.hold(i)
        with (self.root / shard.file).open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._views[i] = view = torch.frombuffer(mapped, dtype=torch.uint8).as_strided(
            (shard.samples, 3, size, size), (shard.stride, size * size, size, 1), shard.data_offset
        )
        return view

    def warm(self, i: int, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Makes shard `i` ready for random access: fetched if it is remote, read once from end to end, every header
        looked at. Random reads of a cold disk are four times slower (FACTS: 9,600 against 38,000 images/s).

        Raises:
            UserError: a header is not what it should be.
        """
        shard = self.manifest.shards[i]
        if self.cache is not None:
            self.cache.hold(i, cancelled)
        path, block = self.root / shard.file, bytearray(2**22)
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
            fault = headers_fault(stream, shard, self.resolution)
        if fault:
            raise UserError(f"{path} {fault}: {MEND}")

    def drop(self, i: int) -> None:
        """Gives the memory of shard `i` back, and its place on the disk where it was fetched for a while only."""
        self._views.pop(i, None)
        if self.cache is not None:
            self.cache.drop(i)
        elif hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), (self.root / self.manifest.shards[i].file).open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def records(self, i: int) -> list[dict[str, Any]]:
        """Returns the sidecar of shard `i`: per sample its key, source, path, width, height, mode, label, ..."""
        if self.cache is not None:
            self.cache.fetch_sidecar(i)
        with (self.root / self.manifest.shards[i].sidecar).open("rb") as stream:
            return [json.loads(line) for line in stream]

    def close(self) -> None:
        """Unmaps the shards and leaves the cache, which goes away with its last user unless somebody chose its place.

        Batches that were gathered stay as they are; views must not be used any more.
        """
        self._views.clear()
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_dataset(root: str | Path, cache_dir: str | Path | None = None) -> Dataset:
    """Returns the dataset in the folder `root`, after a cheap look at every shard: size, first and last header, end.

    An address (http, s3, gs, `pipe:` with {} for the file's name, file:) is staged on this machine first, see cache.py.

    Raises:
        UserError: no dataset there, or the first shard that is missing, cut short or not what the manifest says.
    """
    if is_address(str(root)):
        from gan_dist.data.remote.cache import open_remote

        return open_remote(str(root), cache_dir, whole=True)
    manifest, root = read_manifest(root), expand(root)
    check_totals(manifest, str(root / MANIFEST))
    for shard in manifest.shards:
        if fault := quick_fault(root, shard, manifest.resolution):
            raise UserError(f"{root / shard.file} {fault}: {MEND}")
    return Dataset(root, manifest)


def check_totals(manifest: Manifest, where: str) -> None:
    """Raises UserError when the shards do not hold as many samples as were written: some would be missing silently."""
    written = manifest.totals.get("written", manifest.num_samples)
    if written != manifest.num_samples:
        raise UserError(
            f"{where} counts {written} samples, but its shards hold {manifest.num_samples}: it was edited; "
            "run the `gan-dist prepare` that made it again"
        )


def quick_fault(root: Path, shard: ShardInfo, resolution: int) -> str | None:
    """Returns what is wrong with a shard as far as its size and two headers tell, or None."""
    pixels = 3 * resolution * resolution
    if shard.data_offset + (shard.samples - 1) * shard.stride + pixels > shard.bytes or shard.stride < pixels:
        return f"cannot hold {shard.samples} samples of {resolution}x{resolution} in {shard.bytes} bytes"
    try:
        with (root / shard.file).open("rb") as stream:
            if (found := os.fstat(stream.fileno()).st_size) != shard.bytes:
                return f"has {found} bytes, expected {shard.bytes}"
            for member in (0, shard.samples - 1):
                if fault := member_fault(stream, shard, member, resolution):
                    return fault
            end = shard.data_offset - TAR_BLOCK - len(npy_header(resolution)) + shard.samples * shard.stride
            stream.seek(end)
            if (
                stream.read(2 * TAR_BLOCK) != bytes(2 * TAR_BLOCK)
                or shard.bytes - end > 2 * TAR_BLOCK + tarfile.RECORDSIZE
            ):
                return f"does not end after {shard.samples} samples"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def member_fault(stream: IO[bytes], shard: ShardInfo, member: int, resolution: int) -> str | None:
    """Returns what is wrong with the headers of one member of an open shard, or None."""
    stream.seek(shard.data_offset - TAR_BLOCK - len(npy_header(resolution)) + member * shard.stride)
    header = stream.read(TAR_BLOCK)
    if header[257:262] != b"ustar" or not header[:9].isdigit() or header[9:14] != b".npy\0":
        return f"has no tar header where sample {member} should begin"
    if stream.read(len(npy_header(resolution))) != npy_header(resolution):
        return f"has no uint8 (3, {resolution}, {resolution}) array at sample {member}"
    return None


def headers_fault(stream: IO[bytes], shard: ShardInfo, resolution: int) -> str | None:
    """Returns what is wrong with the first bad header among all members of an open shard, or None."""
    head = TAR_BLOCK + len(npy_header(resolution))
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = np.ndarray((shard.samples, head), np.uint8, mapped, shard.data_offset - head, (shard.stride, 1)).copy()
    bad = first_bad_header(found, resolution)
    return None if bad is None else f"has a damaged header at sample {bad}"


def shard_name(number: int) -> str:
    """Returns the file name of shard `number`."""
    return f"shard-{number:05d}.tar"


class _Digest:
    """A file that hashes and counts what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.sha256, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.stream.write(data)

    def commit(self) -> str:
        """Flushes to the disk, closes, and returns the sha256 of all that was written."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return self.sha256.hexdigest()


class ShardWriter:
    """Writes one shard and its sidecar; both appear, durable and whole, at `commit`. Leaving the context without a
    commit leaves nothing behind."""

    def __init__(self, root: Path, number: int, resolution: int) -> None:
        self.root, self.resolution, self.samples = root, resolution, 0
        self.path = root / shard_name(number)
        self.sidecar = self.path.with_suffix(".jsonl")
        self._temporary = {path: temporary_name(path) for path in (self.path, self.sidecar)}
        self._out: dict[Path, _Digest] = {}
        try:
            for path, name in self._temporary.items():
                self._out[path] = _Digest(name.open("wb", buffering=2**20))
        except BaseException:
            self.discard()
            raise

    def add(self, key: int, pixels: bytes, record: Mapping[str, Any]) -> None:
        """Appends a sample: `pixels` is uint8 (3, S, S) in C order, `record` what the sidecar says of it."""
        if len(pixels) != 3 * self.resolution**2:
            raise ValueError(f"expected {3 * self.resolution**2} bytes of pixels, found {len(pixels)}")
        content = len(npy_header(self.resolution)) + len(pixels)
        self._out[self.path].write(
            b"".join((member_header(key, content), npy_header(self.resolution), pixels, bytes(-content % TAR_BLOCK)))
        )
        self._out[self.sidecar].write(json.dumps({"key": key, **record}).encode() + b"\n")
        self.samples += 1

    def commit(self) -> ShardInfo | None:
        """Returns the shard's entry for the manifest, or None (and leaves no file) when it has no sample."""
        if not self.samples:
            self.discard()
            for path in self._temporary:
                path.unlink(missing_ok=True)
            return None
        tar, sidecar = self._out[self.path], self._out[self.sidecar]
        end = 2 * TAR_BLOCK
        tar.write(bytes(end + -(tar.bytes + end) % tarfile.RECORDSIZE))
        digests = tar.commit(), sidecar.commit()
        for path in (self.sidecar, self.path):
            self._temporary.pop(path).replace(path)
        fsync_folder(self.root)
        header = len(npy_header(self.resolution))
        stride = TAR_BLOCK + -(-(header + 3 * self.resolution**2) // TAR_BLOCK) * TAR_BLOCK
        return ShardInfo(self.path.name, self.samples, tar.bytes, digests[0], stride, TAR_BLOCK + header, digests[1])

    def discard(self) -> None:
        """Removes what has not been committed."""
        for out in self._out.values():
            with contextlib.suppress(OSError):  # closing flushes
                out.stream.close()
        for name in self._temporary.values():
            name.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()
