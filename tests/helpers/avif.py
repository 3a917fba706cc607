"""AVIFs as Pillow does not write them: grids of tiles, and items that nothing shows (ISO 23008-12, MIAF)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from gan_dist.data.prepare import avif


def _box(kind: bytes, *content: bytes) -> bytes:
    return struct.pack(">I", 8 + sum(map(len, content))) + kind + b"".join(content)


def _full(kind: bytes, *content: bytes, version: int = 0) -> bytes:
    return _box(kind, bytes([version, 0, 0, 0]), *content)


def grid(
    tiles: Sequence[bytes], columns: int, tile: tuple[int, int], size: tuple[int, int], strangers: int = 0
) -> bytes:
    """Returns an AVIF of `size` whose picture is a grid of tiles, each an AVIF of the size `tile`; equal ones are
    stored once. `strangers`: as many items to which nothing refers, each with other bytes of the same data."""
    pictures = [next(avif._pictures(data)) for data in tiles]
    shape = bytes([0, 0, len(tiles) // columns - 1, columns - 1]) + struct.pack(">HH", *size)
    stored = b"".join(dict.fromkeys([shape, *pictures]))
    items = [shape, *pictures, *(stored[: 20 + i] for i in range(strangers))]  # from 1 on; the first is the grid itself
    kinds = [b"grid", *[b"av01"] * (len(items) - 1)]
    names = [_full(b"infe", struct.pack(">HH", i, 0), kind, b"\0", version=2) for i, kind in enumerate(kinds, start=1)]
    numbers = [struct.pack(">H", i) for i in range(2, 2 + len(tiles))]
    of_tiles = avif._properties(tiles[0])
    shared = [_box(kind, of_tiles[kind]) for kind in (b"pixi", b"colr")]
    sizes = [_full(b"ispe", struct.pack(">II", *each)) for each in (size, tile)]
    properties = _box(b"ipco", *shared, *sizes, _box(b"av1C", of_tiles[b"av1C"]))
    given = [struct.pack(">HB", 1, 3) + bytes([1, 2, 3])]
    given += [struct.pack(">HB", i, 4) + bytes([1, 2, 4, 0x85]) for i in range(2, 1 + len(items))]

    def head(start: int) -> bytes:
        places = [
            struct.pack(">HHHII", i, 0, 1, start + stored.index(data), len(data))
            for i, data in enumerate(items, start=1)
        ]
        return _box(b"ftyp", b"avif\0\0\0\0avifmif1miaf") + _full(
            b"meta",
            _full(b"hdlr", bytes(4), b"pict", bytes(13)),
            _full(b"pitm", struct.pack(">H", 1)),
            _full(b"iloc", b"\x44\0", struct.pack(">H", len(items)), *places),
            _full(b"iinf", struct.pack(">H", len(items)), *names),
            _full(b"iref", _box(b"dimg", struct.pack(">HH", 1, len(tiles)), *numbers)),
            _box(b"iprp", properties, _full(b"ipma", struct.pack(">I", len(items)), *given)),
        )

    return head(len(head(0)) + 8) + _box(b"mdat", stored)
