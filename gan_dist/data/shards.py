"""The format of shards and manifest: USTAR tars of `.npy` samples at a constant stride, listed in one manifest.json.

A member is `<9-digit key>.npy`: a 512-byte tar header, numpy's header, the uint8 (3, S, S) pixels, zeros up to the
next multiple of 512. All members have the same size, so a memory map of the tar is one strided tensor. Any WebDataset
reader reads them. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gan_dist.data.remote.fetch import RetryPolicy, fetch, file_address
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand, fsync_folder, present, temporary_name
from gan_dist.utils.stop import never_cancelled

FORMAT = 1
MANIFEST = "manifest.json"
TAR_BLOCK = 512
MEND = "run the `gan-dist prepare` that made it again (it rewrites only bad shards); `gan-dist verify` lists all faults"
"""What to do about a damaged shard."""


@dataclass(frozen=True)
class ShardInfo:
    """A shard's entry in the manifest.

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
        """The file of the per-sample records, one JSON object a line, in the order of the members."""
        return Path(self.file).with_suffix(".jsonl").name


@dataclass(frozen=True)
class Manifest:
    """A dataset's table of contents.

    `format`: version of this layout; `resolution`: S; `recipe`: how sources became pixels; `classes`: names, a label is
    an index into them; `totals`: the account of every source entry; `shards`: in order. `identity`: sha256 of
    manifest.json, which names the dataset wherever it is stored.
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

    @property
    def class_counts(self) -> list[int] | None:
        """Images of each of `classes`; None where an older manifest does not say."""
        if not self.classes:
            return []
        where = self.totals.get("classes")
        if not isinstance(where, dict) or set(where) != set(self.classes) or sum(where.values()) > self.num_samples:
            return None
        return [int(where[name]) for name in self.classes]

    def to_bytes(self) -> bytes:
        """Returns the bytes of manifest.json: JSON with one shard a line; equal manifests give equal bytes."""
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
    """Returns the manifest in the bytes of manifest.json; `where` names the file in errors.

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
            # It becomes part of paths and shell commands, and may come from anywhere.
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.tar", shard.file, re.ASCII):
                raise ValueError(f"{shard.file!r} is no name of a shard")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is damaged ({error}): run the `gan-dist prepare` that made it again") from None
    return manifest


def fetch_manifest(
    address: str,
    retry: RetryPolicy | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Manifest, bytes]:
    """Returns the manifest of the dataset at an address, and its bytes.

    Raises:
        UserError: no dataset there.
        GanDistError: it cannot be fetched.
    """
    received: list[tuple[Manifest, bytes]] = []

    def receive(chunks: Iterator[bytes]) -> str | None:
        content = b"".join(chunks)
        try:
            manifest = parse_manifest(content, MANIFEST)
            check_totals(manifest, MANIFEST)
        except UserError as error:
            return f"is not the manifest of a dataset ({error})"
        received.append((manifest, content))
        return None

    fetch(file_address(address, MANIFEST), receive, retry=retry, cancelled=cancelled, log=log)
    return received[0]


def check_resolution(wanted: int, found: int, where: str) -> None:
    """Raises UserError unless the dataset called `where` has images of the model's resolution."""
    if found != wanted:
        raise UserError(
            f"model.resolution is {wanted}, but {where} holds {found}x{found} images; set model.resolution={found} or "
            "prepare the set again"
        )


def check_classes(classes: Sequence[str], counts: Sequence[int], min_images: int, where: str) -> None:
    """Raises UserError unless the dataset called `where` has labels, and `min_images` images or more of some class."""
    if not any(counts):
        raise UserError(
            f"model.classes=dataset, but {where} has no labels: prepare it with --labels, or set model.classes=none"
        )
    most = max(range(len(classes)), key=counts.__getitem__)
    if counts[most] < min_images:
        raise UserError(
            f"model.classes_min_images is {min_images}, but the largest class of {where}, {classes[most]!r}, has "
            f"{counts[most]} images; lower it, or set model.classes=none"
        )


def check_totals(manifest: Manifest, where: str) -> None:
    """Raises UserError unless the shards hold as many samples as were written: none may be missing silently."""
    written = manifest.totals.get("written", manifest.num_samples)
    if written != manifest.num_samples:
        raise UserError(
            f"{where} counts {written} samples, but its shards hold {manifest.num_samples}: it was edited; "
            "run the `gan-dist prepare` that made it again"
        )


def quick_fault(root: Path, shard: ShardInfo, resolution: int) -> str | None:
    """Returns what is wrong with a shard, judged by its size, two headers and its end, or None."""
    pixels = 3 * resolution * resolution
    if shard.data_offset + (shard.samples - 1) * shard.stride + pixels > shard.bytes or shard.stride < pixels:
        return f"cannot hold {shard.samples} samples of {resolution}x{resolution} in {shard.bytes} bytes"
    try:
        with (root / shard.file).open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) != shard.bytes:
                return f"has {size} bytes, expected {shard.bytes}"
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
        headers = np.ndarray(
            (shard.samples, head), np.uint8, mapped, shard.data_offset - head, (shard.stride, 1)
        ).copy()
    bad = first_bad_header(headers, resolution)
    return None if bad is None else f"has a damaged header at sample {bad}"


def first_bad_header(headers: NDArray[np.uint8], resolution: int) -> int | None:
    """Returns the first row of `headers` (uint8 [n, 512 + numpy's header], a member a row) with a wrong byte, or
    None."""
    wanted = np.frombuffer(
        member_header(0, len(npy_header(resolution)) + 3 * resolution**2) + npy_header(resolution), np.uint8
    )
    digits = headers[:, :9] - np.uint8(ord("0"))
    checksum = int(bytes(wanted[148:154]), 8) + digits.sum(1, dtype=np.int64)
    octal = (checksum[:, None] >> np.arange(15, -1, -3) & 7) + ord("0")
    right = (digits <= 9).all(1) & (headers[:, 148:154] == octal).all(1)
    for part in (slice(9, 148), slice(154, None)):
        right &= (headers[:, part] == wanted[part]).all(1)
    return None if right.all() else int(right.argmin())


@lru_cache
def npy_header(resolution: int) -> bytes:
    """Returns the bytes before the pixels in the `.npy` file of a sample."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (3, resolution, resolution)}
    )
    return stream.getvalue()


@lru_cache
def _header_of_zero(content: int) -> bytes:
    member = tarfile.TarInfo("000000000.npy")  # mtime 0 and no user: the same bytes on every machine, every day
    member.mode, member.size = 0o444, content
    return member.tobuf(tarfile.USTAR_FORMAT)


def member_header(key: int, content: int) -> bytes:
    """Returns the tar header of sample `key` with `content` bytes: that of sample 0 with another name and checksum.

    A shard equals webdataset's TarWriter's byte for byte (a test compares them). That writer is not used here: it
    imports torch, which takes 3 s a process, and takes 85 us a sample in the one process that all workers wait for.
    """
    header = bytearray(_header_of_zero(content))
    name = b"%09d" % key
    if len(name) != 9:
        raise ValueError(f"key {key}: at most 9 digits")
    header[148:154] = b"%06o" % (int(header[148:154], 8) + sum(name) - 9 * ord("0"))
    header[:9] = name
    return bytes(header)


def shard_name(number: int) -> str:
    """Returns the file name of shard `number`."""
    return f"shard-{number:05d}.tar"


class _Digest:
    """A file that hashes and counts the bytes written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.sha256, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.stream.write(data)

    def commit(self) -> str:
        """Returns the sha256 of all that was written, once it is on the disk; closes the file."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return self.sha256.hexdigest()


class ShardWriter:
    """Writes one shard and its sidecar. Both appear at `commit`, durable and complete; a context left without a commit
    leaves no file."""

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
        """Appends a sample: `pixels` are the bytes of uint8 (3, S, S) in C order, `record` goes into the sidecar."""
        if len(pixels) != 3 * self.resolution**2:
            raise ValueError(f"expected {3 * self.resolution**2} bytes of pixels, found {len(pixels)}")
        content = len(npy_header(self.resolution)) + len(pixels)
        self._out[self.path].write(
            b"".join((member_header(key, content), npy_header(self.resolution), pixels, bytes(-content % TAR_BLOCK)))
        )
        self._out[self.sidecar].write(json.dumps({"key": key, **record}).encode() + b"\n")
        self.samples += 1

    def commit(self) -> ShardInfo | None:
        """Returns the shard's entry for the manifest; None, leaving no file, when it has no sample."""
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
        """Removes the files unless they were committed."""
        for out in self._out.values():
            with contextlib.suppress(OSError):  # closing flushes
                out.stream.close()
        for name in self._temporary.values():
            name.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()
