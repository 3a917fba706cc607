"""Hand-made TIFFs, for what Pillow cannot write."""

from __future__ import annotations

import struct
import zlib
from typing import Any, Literal

from numpy.typing import NDArray


def tiff(
    values: NDArray[Any],
    *,
    photometric: int = 1,
    big_endian: bool = False,
    planes: bool = False,
    deflated: bool = False,
    rows: int = 1000,
    tags: dict[int, tuple[int, list[int]]] | None = None,
    packed: bytes | None = None,
    bits: int | None = None,
) -> bytes:
    """Returns `values`, [H, W] or [H, W, C], as a TIFF in strips of `rows` rows; with `planes`, plane by plane.

    `packed` replaces the one strip, `bits` the bits a sample; `tags`: further ones as type and values."""
    order: Literal["<", ">"] = ">" if big_endian else "<"
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    layers = [values[..., i] for i in range(samples)] if planes and values.ndim == 3 else [values]
    strips = [
        layer[top : top + rows].astype(values.dtype.newbyteorder(order)).tobytes()
        for layer in layers
        for top in range(0, height, rows)
    ]
    strips = [packed] if packed is not None else [zlib.compress(strip) if deflated else strip for strip in strips]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, tuple[int, list[int]]] = {
        256: (3, [width]),
        257: (3, [height]),
        258: (3, [bits or 8 * values.itemsize] * samples),
        259: (3, [8 if deflated else 1]),
        262: (3, [photometric]),
        273: (4, [0] * len(strips)),
        277: (3, [samples]),
        278: (4, [min(rows, height)]),
        279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if planes else 1]),
        339: (3, [kind] * samples),
    } | (tags or {})
    start = 8 + 2 + 12 * len(entries) + 4
    extra = sum(len(numbers) * (2 if of == 3 else 4) for of, numbers in entries.values())
    place, starts = start + extra, []
    for strip in strips:
        starts.append(place)
        place += len(strip)
    entries[273] = (4, starts)
    head, tail = b"", b""
    for tag, (of, numbers) in sorted(entries.items()):
        packed_numbers = struct.pack(f"{order}{len(numbers)}{'H' if of == 3 else 'I'}", *numbers)
        if len(packed_numbers) > 4:
            where = struct.pack(f"{order}I", start + len(tail))
            tail += packed_numbers
        else:
            where = packed_numbers.ljust(4, b"\0")
        head += struct.pack(f"{order}HHI", tag, of, len(numbers)) + where
    magic = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}IH", 8, len(entries))
    return magic + head + bytes(4) + tail.ljust(extra, b"\0") + b"".join(strips)
