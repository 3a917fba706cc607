"""What stands before the pixels of a sample: a USTAR header and numpy's, the same for all but the key."""

from __future__ import annotations

import io
import tarfile
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

TAR_BLOCK = 512


@lru_cache
def npy_header(resolution: int) -> bytes:
    """Returns the bytes that stand before the pixels in a `.npy` file of one sample."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (3, resolution, resolution)}
    )
    return stream.getvalue()


@lru_cache
def _header_of_zero(content: int) -> bytes:
    member = tarfile.TarInfo("000000000.npy")  # mtime 0 and no user: the same bytes on every machine, on every day
    member.mode, member.size = 0o444, content
    return member.tobuf(tarfile.USTAR_FORMAT)


def member_header(key: int, content: int) -> bytes:
    """Returns the tar header of sample `key` with `content` bytes: that of sample 0 with another name and checksum.

    A shard is byte for byte what webdataset's TarWriter makes (a test says so). That writer is not used: importing it
    brings torch, 3 s a process, and it takes 85 us a sample, in the one process that all workers wait for.
    """
    header = bytearray(_header_of_zero(content))
    name = b"%09d" % key
    if len(name) != 9:
        raise ValueError(f"key {key}: at most 9 digits")
    header[148:154] = b"%06o" % (int(header[148:154], 8) + sum(name) - 9 * ord("0"))
    header[:9] = name
    return bytes(header)


def first_bad_header(found: NDArray[np.uint8], resolution: int) -> int | None:
    """Returns the first row of `found` (uint8 [n, 512 + numpy's header], a member a row) that has a wrong byte."""
    wanted = np.frombuffer(
        member_header(0, len(npy_header(resolution)) + 3 * resolution**2) + npy_header(resolution), np.uint8
    )
    digits = found[:, :9] - np.uint8(ord("0"))
    checksum = int(bytes(wanted[148:154]), 8) + digits.sum(1, dtype=np.int64)
    octal = (checksum[:, None] >> np.arange(15, -1, -3) & 7) + ord("0")
    right = (digits <= 9).all(1) & (found[:, 148:154] == octal).all(1)
    for part in (slice(9, 148), slice(154, None)):
        right &= (found[:, part] == wanted[part]).all(1)
    return None if right.all() else int(right.argmin())
