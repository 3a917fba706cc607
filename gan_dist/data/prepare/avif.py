"""AVIFs: whether the pixels end where their data do, and which part of the picture is shown.

An AVIF has no checksum. But each tile of AV1 ends with a bit of one and zeros, and after damage its decoder reads other
numbers of bits, so it does not end there. dav1d looks for them if it is told to be strict, which libavif does not do;
so Pillow's copy of dav1d decodes the pixels here a second time.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.structure import boxes

_INTERFACE = 7
"""The version of dav1d's interface that has these structures."""
_EXIF = rb"(infe(?:\x02.{7}|\x03.{9}))Exif"
_ALPHA = re.compile(rb"....urn:(?:mpeg:mpegB:cicp:systems:auxiliary:alpha|mpeg:hevc:2015:auxid:1)\0", re.S)
_INVALID = -22
_LARGEST_TILE = 2**24
"""Pixels that a tile may have although the picture has less."""
_LONGEST_PICTURE = 4096
"""Bytes, more than a Dav1dPicture has."""


class _Settings(ctypes.Structure):
    """Dav1dSettings."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("threads", "frame_delay", "apply_grain", "operating_point", "all_layers")),
        ("frame_size_limit", ctypes.c_uint),
        ("allocator", ctypes.c_void_p * 3),
        ("logger", ctypes.c_void_p * 2),
        *((name, ctypes.c_int) for name in ("strict", "invisible_frames", "inloop_filters", "frame_types")),
        ("reserved", ctypes.c_uint8 * 16),
    )


class _Data(ctypes.Structure):
    """Dav1dData."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("reference", ctypes.c_void_p),
        ("properties", ctypes.c_int64 * 6),
    )


@lru_cache(maxsize=1)
def _library() -> Any:
    """Returns the dav1d that Pillow has loaded, or None where it cannot be called."""
    try:
        from PIL import _avif  # a Pillow may be built without it, or with another decoder

        library = ctypes.CDLL(_avif.__file__)
        library.dav1d_version_api.restype = ctypes.c_uint
        library.dav1d_data_create.restype = ctypes.c_void_p
        library.dav1d_data_create.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        usable = library.dav1d_version_api() >> 16 == _INTERFACE
    except (ImportError, OSError, AttributeError):
        return None
    return library if usable else None


def available() -> bool:
    """Returns whether dav1d can be called, wherever Pillow can read an AVIF at all."""
    return _library() is not None or find_spec("PIL._avif") is None


def check(data: bytes, pixels: int) -> None:
    """Raises Rejected if the data of an AVIF, which could be decoded, do not end where its `pixels` do."""
    library = _library()
    if library is not None and any(_is_damaged(library, part, pixels) for part in _pictures(data)):
        raise Rejected("corrupt", "AVIF: its pixels do not end where their data do")


def _is_damaged(library: Any, part: bytes, pixels: int) -> bool:
    """Returns whether a strict dav1d refuses a part of a picture of `pixels`: all of it, or a tile, which may be larger
    and cut."""
    settings, decoder, given = _Settings(), ctypes.c_void_p(), _Data()
    library.dav1d_default_settings(ctypes.byref(settings))
    settings.threads = settings.frame_delay = settings.strict = 1
    settings.frame_size_limit = max(pixels, _LARGEST_TILE)
    settings.apply_grain = settings.inloop_filters = 0  # which change pixels alone
    settings.logger = (ctypes.c_void_p * 2)()
    if library.dav1d_open(ctypes.byref(decoder), ctypes.byref(settings)) < 0:
        return False
    try:
        place = library.dav1d_data_create(ctypes.byref(given), len(part))
        if not place:
            return False
        ctypes.memmove(place, part, len(part))
        status = library.dav1d_send_data(decoder, ctypes.byref(given))
        while status == 0:  # a picture a layer
            picture = ctypes.create_string_buffer(_LONGEST_PICTURE)
            status = library.dav1d_get_picture(decoder, picture)
            if status == 0:
                library.dav1d_picture_unref(picture)
        return bool(status == _INVALID)
    finally:
        library.dav1d_data_unref(ctypes.byref(given))
        library.dav1d_close(ctypes.byref(decoder))


def without_exif(data: bytes) -> bytes:
    """Returns an AVIF whose EXIF is hidden. It says nothing of how the picture is shown, and where it is broken the
    picture would be refused."""
    try:
        start, end = next((start, end) for kind, start, end in boxes(data) if kind == b"meta")
        start, end = next((start + 4 + s, start + 4 + e) for k, s, e in boxes(data[start + 4 : end]) if k == b"iinf")
    except StopIteration:
        return data
    return data[:start] + re.sub(_EXIF, rb"\1none", data[start:end], flags=re.S) + data[end:]


def clean_aperture(data: bytes, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Returns the box of the part of an AVIF of `size` that is to be shown (its `clap` property), or None for all."""
    content = _properties(data).get(b"clap", b"")
    if len(content) < 32:
        return None
    values = struct.unpack(">8i", content[:32])
    if min(values[:4]) <= 0 or values[5] <= 0 or values[7] <= 0:
        return None
    width, height, right, down = (Fraction(values[i], values[i + 1]) for i in (0, 2, 4, 6))
    left, top = (size[0] - width) / 2 + right, (size[1] - height) / 2 + down
    box = round(left), round(top), round(left + width), round(top + height)
    inside = 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
    return box if inside and box != (0, 0, *size) else None


def _meta(data: bytes) -> dict[bytes, bytes]:
    """Returns the content of each box in the box `meta`, by kind. Raises StopIteration if there is none."""
    meta = next(data[start + 4 : end] for kind, start, end in boxes(data) if kind == b"meta")
    return {kind: meta[start:end] for kind, start, end in boxes(meta)}


def _primary(parts: dict[bytes, bytes]) -> int:
    """Returns the item that is the picture."""
    return _numbers(parts[b"pitm"], 4, 2 if parts[b"pitm"][0] == 0 else 4)[0]


def _pictures(data: bytes) -> Iterator[bytes]:
    """Yields the data of each picture in AV1 that is shown: the primary one or its tiles, and their transparency.
    Tiles that share their data are one. (The rest, thumbnails and others, is decoded by nobody.)"""
    try:
        parts = _meta(data)
        coded, places = set(_coded(parts[b"iinf"])), dict[int, tuple[tuple[int, int], ...]]()
        with suppress(IndexError):  # what comes before its damage counts
            places.update(_extents(parts[b"iloc"]))
        seen: set[tuple[tuple[int, int], ...]] = {()}
        for item in _shown(parts):
            extents = places.get(item, ())
            if item in coded and extents not in seen:
                seen.add(extents)
                if sum(end - start for start, end in extents) > len(data):
                    continue
                yield b"".join(data[start:end] for start, end in extents)
    except (StopIteration, KeyError, IndexError):
        return


def _shown(parts: dict[bytes, bytes]) -> list[int]:
    """Returns the items that make the picture: the primary one, its tiles, and the transparency of each."""
    tiles, alphas = dict[int, list[int]](), dict[int, int]()
    transparent = {item for item, found in _given(parts).items() if _ALPHA.match(found.get(b"auxC", b""))}
    for kind, item, others in _references(parts.get(b"iref", bytes(4))):
        if kind == b"dimg":
            tiles.setdefault(item, others)
        elif kind == b"auxl" and item in transparent:
            alphas |= {other: item for other in others if other not in alphas}
    primary = _primary(parts)
    colours = [primary, *tiles.get(primary, [])]
    found = [alphas[item] for item in colours if item in alphas]
    return [*colours, *found, *(tile for item in found for tile in tiles.get(item, []))]


def _coded(iinf: bytes) -> Iterator[int]:
    """Yields the items of an `iinf` box that are coded in AV1."""
    for kind, start, end in boxes(iinf, 6 if iinf[0] == 0 else 8):
        info = iinf[start:end]
        if kind == b"infe" and info[0] >= 2:
            size = 2 if info[0] == 2 else 4
            if info[6 + size : 10 + size] == b"av01":
                yield _numbers(info, 4, size)[0]


def _references(iref: bytes) -> Iterator[tuple[bytes, int, list[int]]]:
    """Yields each reference of an `iref` box: its kind, the item that refers, and those it refers to."""
    size = 2 if iref[0] == 0 else 4
    for kind, start, _ in boxes(iref, 4):
        item, count = _numbers(iref, start, size, 2)
        yield kind, item, _numbers(iref, start + size + 2, *[size] * count)


def _given(parts: dict[bytes, bytes]) -> dict[int, dict[bytes, bytes]]:
    """Returns the properties of each item, by kind."""
    ipco = next(parts[b"iprp"][start:end] for kind, start, end in boxes(parts[b"iprp"]) if kind == b"ipco")
    known = [(kind, ipco[start:end]) for kind, start, end in boxes(ipco)]
    given: dict[int, dict[bytes, bytes]] = {}
    for kind, start, end in boxes(parts[b"iprp"]):
        for item, numbers in _associations(parts[b"iprp"][start:end]) if kind == b"ipma" else ():
            given.setdefault(item, dict(known[number - 1] for number in numbers if 0 < number <= len(known)))
    return given


def _properties(data: bytes) -> dict[bytes, bytes]:
    """Returns the properties, by kind, of an AVIF's primary picture; none where they cannot be followed."""
    try:
        parts = _meta(data)
        return _given(parts).get(_primary(parts), {})
    except (StopIteration, KeyError, IndexError, ValueError):
        return {}


def _numbers(data: bytes, place: int, *sizes: int) -> list[int]:
    """Returns big-endian numbers of these sizes in bytes (0: the number is 0). Raises IndexError beyond the end."""
    numbers = []
    for size in sizes:
        if place + size > len(data):
            raise IndexError(place)
        numbers.append(int.from_bytes(data[place : place + size], "big"))
        place += size
    return numbers


def _associations(ipma: bytes) -> Iterator[tuple[int, list[int]]]:
    """Yields each item of an `ipma` box with the numbers, from 1, of its properties."""
    wide_items, wide_numbers = ipma[0] >= 1, ipma[3] & 1
    place, step = 8, 2 if wide_numbers else 1
    for _ in range(_numbers(ipma, 4, 4)[0]):
        item, count = _numbers(ipma, place, 4 if wide_items else 2, 1)
        place += (4 if wide_items else 2) + 1
        numbers = _numbers(ipma, place, *[step] * count)
        place += step * count
        yield item, [number & (0x7FFF if wide_numbers else 0x7F) for number in numbers]


def _extents(iloc: bytes) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Yields each item of an `iloc` box with start and end in the file of each of its extents."""
    version, sizes, more = _numbers(iloc, 0, 1, 0, 0)[0], iloc[4], iloc[5]
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15
    id_size = 4 if version == 2 else 2
    count, place = _numbers(iloc, 6, id_size)[0], 6 + id_size
    for _ in range(count):
        head = (id_size, 2 if version else 0, 2, base_size, 2)
        number, method, _, base, extents = _numbers(iloc, place, *head)
        place += sum(head)
        shape = (index_size if version else 0, offset_size, length_size)
        extents = extents if any(shape) else min(extents, 1)
        found = [_numbers(iloc, place + i * sum(shape), *shape) for i in range(extents)]
        place += extents * sum(shape)
        spans = tuple((base + start, base + start + size) for _, start, size in found if size)
        yield number, spans if method & 15 == 0 else ()
