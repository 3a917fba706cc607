"""What the boxes, chunks and tables around compressed pixels tell: whether they are all there, and which to show."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from PIL import Image

_HOLE = 64
"""Bytes of one value in a row that no coder writes, unless for an area that it can predict."""
_FLAT_PIXELS = 192
"""Pixels of such an area that a byte of a run stands for, at least."""

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of a number of each type in a directory."""
_MOST_FILLED = 2**29
"""Bytes of a file that zeros may fill up."""


def cut_short(data: bytes, format: str, tags: Any = None) -> bool:
    """Returns whether a file ends before its pixels do, by its own account. `tags`: those of a TIFF, if it has any."""
    match format:
        case "WEBP":
            return 8 + int.from_bytes(data[4:8], "little") > len(data)
        case "AVIF":
            return _last_box_end(data) > len(data)
        case "JPEG2000" if data[:4] == b"\0\0\0\x0c":
            return _last_box_end(data) > len(data)
        case "JPEG2000":
            return not data.rstrip(b"\0").endswith(b"\xff\xd9")
        case "TIFF":
            return _tiff_end(data, tags) > len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
        case "QOI":
            return not data.endswith(bytes(7) + b"\1")
        case "SGI":
            return _sgi_end(data) > len(data)
    return False


def filled_up(data: bytes) -> bytes:
    """Returns a file that is cut off with zeros in place of what is missing, where its decoder would otherwise give
    nothing of it; any other file as it is."""
    end, last = len(data), b""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        end = 8 + int.from_bytes(data[4:8], "little")
    elif data[4:8] == b"ftyp":
        end = _last_box_end(data)
    elif b"\xff\x4f\xff\x51" in data[:4096]:  # JPEG 2000: up to the end of the part of a tile
        part = data.rfind(b"\xff\x90\0\n")
        end, last = part + int.from_bytes(data[part + 6 : part + 10], "big"), b"\xff\xd9"
    elif data[:4] in (b"qoif", b"DDS "):  # at most four bytes a pixel
        width, height = struct.unpack_from(*((">II", data, 4) if data[:4] == b"qoif" else ("<II", data, 12)))
        end += 4 * width * height
    return data + bytes(end - len(data)) + last if len(data) < end < _MOST_FILLED else data


def odd(data: bytes, format: str) -> str | None:
    """Returns what in a file that could be decoded does not fit its own account, or None. It is not for certain damage:
    bytes beyond the end that the file states may have been added, or pushed there by others that were inserted."""
    end = len(data)
    match format:
        case "WEBP":
            end = 8 + int.from_bytes(data[4:8], "little")
        case "AVIF":
            kinds = [(kind, start, stop) for kind, start, stop in _boxes(data)]
            end = next((start - 8 for kind, start, stop in kinds if not kind.isascii() or stop > len(data)), end)
        case "BMP" if _bmp_is_packed(data):
            return None if _rle_is_whole(data) else "its rows are too long or do not end"
        case "BMP":
            stated = int.from_bytes(data[2:6], "little")
            end = stated if stated == int.from_bytes(data[10:14], "little") + _bmp_pixels(data) else end
        case "GIF":
            return None if _gif_is_whole(data) else "its blocks do not end where the next begins"
    return f"{len(data) - end} bytes after its end" if data[end:].strip(b"\0") else None


def _bmp_pixels(data: bytes) -> int:
    """Returns the bytes of the pixels of a BMP without compression."""
    width, height, _, bits = struct.unpack("<iiHH", data[18:30])
    return int((width * bits + 31) // 32 * 4 * abs(height))


def _bmp_is_packed(data: bytes) -> bool:
    """Returns whether a BMP is run-length encoded. (The oldest header, of 12 bytes, does not say, and never is.)"""
    return int.from_bytes(data[14:18], "little") > 12 and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0")


def _rle_is_whole(data: bytes) -> bool:
    """Returns whether the runs of a BMP exceed no row, and come to a mark of their end. (Rows, and the picture, may end
    early: what is left out has the first colour.)"""
    width, height, four = *struct.unpack("<ii", data[18:26]), data[30] == 2
    place, x, y = int.from_bytes(data[10:14], "little"), 0, 0
    while place + 1 < len(data) and y <= abs(height) and x <= (width if y < abs(height) else 0):
        count, value = data[place], data[place + 1]
        place += 2
        if count:
            x += count
        elif value == 0:
            x, y = 0, y + 1
        elif value == 1:
            return y >= abs(height) - 1 or not data[place:].strip(b"\0")
        elif value == 2 and place + 1 < len(data):
            x, y = x + data[place], y + data[place + 1]
            place += 2
        elif value == 2:
            return False
        else:
            x += value
            size = (value + 1) // 2 if four else value
            place += size + size % 2
    return False


def _gif_is_whole(data: bytes) -> bool:
    """Returns whether the blocks of a GIF can be followed to the end of its first picture."""
    place = 13 + (3 * 2 ** (data[10] % 8 + 1) if data[10] & 0x80 else 0)
    pictures = 0
    while place < len(data) and data[place] in (0x21, 0x2C):
        pictures += data[place] == 0x2C
        if pictures == 2:
            return True
        if data[place] == 0x21:
            place += 2
        else:
            flags = data[place + 9] if place + 9 < len(data) else 0
            place += 11 + (3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0)
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    return pictures > 0 and (place >= len(data) or data[place] == 0x3B)


def hole(data: bytes, image: Image.Image) -> int | None:
    """Returns where the compressed pixels of an AVIF were overwritten with one value, or None.

    Such runs are also how areas of one colour look. They are a hole if the picture, decoded, has no such area or one
    that is too small for them.
    """
    first, needed = None, 0
    for start, end in _primary(data)[1]:
        samples = np.frombuffer(data, np.uint8)[start:end:8]  # a run has several of these
        equal, count = samples[1:] == samples[:-1], _HOLE // 8 - 2
        if len(equal) < count or not (np.convolve(equal, np.ones(count, int), "valid") == count).any():
            continue
        values = np.frombuffer(data, np.uint8)[start:end]
        edges = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1, [len(values)]])
        lengths = np.diff(edges)
        runs = lengths > _HOLE - 16
        if runs.any():
            first = start + int(edges[:-1][runs][0]) if first is None else first
            needed += _FLAT_PIXELS * int(lengths[runs].sum())
    return first if needed > 0 and needed > _flat_pixels(image) else None


def _flat_pixels(image: Image.Image) -> int:
    """Returns the number of pixels that equal the one above or the one to the left."""
    flat = 0
    for top in range(0, image.height, 512):
        rows = np.asarray(image.crop((0, max(0, top - 1), image.width, min(image.height, top + 512))))
        rows = rows.reshape(*rows.shape[:2], -1)
        above = (rows[1:, 1:] == rows[:-1, 1:]).all(2)
        left = (rows[1:, 1:] == rows[1:, :-1]).all(2)
        flat += int((above | left).sum())
    return flat


def clean_aperture(data: bytes, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Returns the box of the part of an AVIF of `size` that is to be shown (its `clap` property), or None for all."""
    content = _primary(data)[0].get(b"clap", b"")
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


def riff_chunks(data: bytes, place: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and size of the content of each chunk of a RIFF file, from `place` on."""
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], place + 8, size
        place += 8 + size + size % 2


def _tiff_end(data: bytes, tags: Any) -> int:
    """Returns where the last strip or tile of a TIFF ends, or its first directory and what that names (of one that is
    cut some tags are left)."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    ends = [0]
    if data[2:4] in (b"\x2a\0", b"\0\x2a"):  # a large file has its directory elsewhere
        count = int.from_bytes(data[start : start + 2], order)
        ends.append(start + 6 + 12 * count)
        for entry in (data[place : place + 12] for place in range(start + 2, min(ends[-1], len(data)) - 12, 12)):
            size = _TIFF_SIZES.get(int.from_bytes(entry[2:4], order), 0) * int.from_bytes(entry[4:8], order)
            ends.append(int.from_bytes(entry[8:], order) + size if size > 4 else 0)  # a small value is in its place
    if tags is None:
        return max(ends)
    for starts, sizes in ((273, 279), (324, 325)):
        pairs = zip(tags.get(starts) or (), tags.get(sizes) or (), strict=False)
        ends += [start + size for start, size in pairs]
    return max(ends)


def _sgi_end(data: bytes) -> int:
    """Returns where the pixels of an SGI file end: those of a packed one are rows, one after another, after tables of
    where they begin and how long they are."""
    width, height, channels = (int.from_bytes(data[place : place + 2], "big") for place in (6, 8, 10))
    if data[2] == 0:
        return 512 + data[3] * width * height * channels
    end = 512 + 8 * height * channels
    lengths = np.frombuffer(data[end - 4 * height * channels : end], ">u4") if end <= len(data) else np.zeros(0)
    return end + int(lengths.sum())


def _boxes(data: bytes, place: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of the content of each box of ISO 14496-12; the last may end beyond `data`."""
    while place + 8 <= len(data):
        size, head = int.from_bytes(data[place : place + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        end = len(data) if size == 0 else place + size
        if end < place + head:
            return
        yield data[place + 4 : place + 8], place + head, end
        place = end


def _last_box_end(data: bytes) -> int:
    """Returns where the last box ends; a file without any box that can hold pixels is taken to go on."""
    ends = {kind: end for kind, _, end in _boxes(data)}
    return max(ends.values(), default=0) if ends.keys() & {b"mdat", b"jp2c", b"meta"} else len(data) + 1


def _primary(data: bytes) -> tuple[dict[bytes, bytes], list[tuple[int, int]]]:
    """Returns the properties, by kind, of an AVIF's primary picture, and the extents of its data in the file; both are
    empty where they cannot be followed."""
    try:
        meta = next(data[start + 4 : end] for kind, start, end in _boxes(data) if kind == b"meta")
        parts = {kind: meta[start:end] for kind, start, end in _boxes(meta)}
        item = _numbers(parts[b"pitm"], 4, 2 if parts[b"pitm"][0] == 0 else 4)[0]
        kinds = {kind: parts[b"iprp"][start:end] for kind, start, end in _boxes(parts[b"iprp"])}
        known = [(kind, kinds[b"ipco"][start:end]) for kind, start, end in _boxes(kinds[b"ipco"])]
        used = [known[number - 1] for number in _associated(kinds[b"ipma"], item) if 0 < number <= len(known)]
        return dict(used), _extents(parts.get(b"iloc", b""), item)
    except (StopIteration, KeyError, IndexError, ValueError):
        return {}, []


def _numbers(data: bytes, place: int, *sizes: int) -> list[int]:
    """Returns big-endian numbers of these sizes in bytes (0: the number is 0). Raises IndexError beyond the end."""
    numbers = []
    for size in sizes:
        if place + size > len(data):
            raise IndexError(place)
        numbers.append(int.from_bytes(data[place : place + size], "big"))
        place += size
    return numbers


def _associated(ipma: bytes, item: int) -> list[int]:
    """Returns the numbers, from 1, of the properties that an `ipma` box gives to an item."""
    wide_items, wide_numbers = ipma[0] >= 1, ipma[3] & 1
    place, step = 8, 2 if wide_numbers else 1
    for _ in range(_numbers(ipma, 4, 4)[0]):
        number, count = _numbers(ipma, place, 4 if wide_items else 2, 1)
        place += (4 if wide_items else 2) + 1
        found = _numbers(ipma, place, *[step] * count)
        place += step * count
        if number == item:
            return [value & (0x7FFF if wide_numbers else 0x7F) for value in found]
    return []


def _extents(iloc: bytes, item: int) -> list[tuple[int, int]]:
    """Returns start and end in the file of each extent that an `iloc` box gives to an item."""
    version, sizes, more = _numbers(iloc, 0, 1, 0, 0)[0], iloc[4], iloc[5]
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15
    id_size = 4 if version == 2 else 2
    count, place = _numbers(iloc, 6, id_size)[0], 6 + id_size
    for _ in range(count):
        head = (id_size, 2 if version else 0, 2, base_size, 2)
        number, method, _, base, extents = _numbers(iloc, place, *head)
        place += sum(head)
        shape = (index_size if version else 0, offset_size, length_size)
        found = [_numbers(iloc, place + i * sum(shape), *shape) for i in range(extents)]
        place += extents * sum(shape)
        if number == item:
            return [(base + start, base + start + size) for _, start, size in found] if method & 15 == 0 else []
    return []
