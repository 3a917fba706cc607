"""What the boxes, chunks and tables around compressed pixels tell: whether they are all there."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of a number of each type in a directory."""
_MOST_FILLED = 2**29
"""Bytes of a file that zeros may fill up."""
_BLACK_QOI = bytes(4) + b"\xfe\0\0\0"
"""What completes the last pixel of a QOI, and a black one."""
_COD, _SOT, _SOD, _EOC = 0x52, 0x90, 0x93, 0xD9
_STRAY = re.compile(rb"\xff\x91\x00\x04..|\xff[\x90-\xff]", re.DOTALL)
"""What compressed data of JPEG 2000 never hold (ISO/IEC 15444-1, A.1), but for the segments SOP and the marks EPH."""


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
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
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
    elif data[:4] == b"qoif" and len(data) >= 20:  # runs of black: Pillow takes a second for a million single pixels
        width, height = struct.unpack_from(">II", data, 4)
        runs = width * height // 62 + 1
        return data + _BLACK_QOI + b"\xfd" * runs if runs < _MOST_FILLED // 62 else data
    elif data[:4] == b"DDS " and len(data) >= 20:  # at most four bytes a pixel
        width, height = struct.unpack_from("<II", data, 12)
        end += 4 * width * height
    return data + bytes(end - len(data)) + last if len(data) < end < _MOST_FILLED else data


_MORE_DIRECTORIES = {330, 34665, 34853, 40965}
"""Tags of a TIFF that name further directories, whose content may lie anywhere."""
_FEW = 32
"""Bytes after all others that a sound TIFF may have."""


def odd(data: bytes, format: str, tags: Any = None) -> str | None:
    """Returns what in a file that could be decoded does not fit its own account, or None. It is not for certain damage:
    bytes beyond the end that the file states may have been added, or pushed there by others that were inserted. `tags`:
    those of a TIFF."""
    end = len(data)
    match format:
        case "WEBP":
            end = 8 + int.from_bytes(data[4:8], "little")
        case "AVIF":
            kinds = [(kind, start, stop) for kind, start, stop in boxes(data)]
            end = next((start - 8 for kind, start, stop in kinds if not kind.isascii() or stop > len(data)), end)
        case "BMP":
            stated = int.from_bytes(data[2:6], "little")
            end = stated if stated == int.from_bytes(data[10:14], "little") + _bmp_pixels(data) else end
        case "TIFF" if tags and tags.get(259, 1) == 1 and _is_alone(data, tags):
            end = _tiff_end(data, tags) + _FEW
        case "GIF":
            return None if _gif_is_whole(data) else "its blocks do not end where the next begins"
        case "JPEG2000":
            return "a marker among its compressed data" if _has_stray_marker(data) else None
    return f"{len(data) - end} bytes after its end" if data[end:].strip(b"\0") else None


def _bmp_pixels(data: bytes) -> int:
    """Returns the bytes that the pixels of a BMP take without compression."""
    width, height, _, bits = struct.unpack("<iiHH", data[18:30])
    return int((width * bits + 31) // 32 * 4 * abs(height))


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


def _has_stray_marker(data: bytes) -> bool:
    """Returns whether the compressed data of a JPEG 2000 hold two bytes that its coders never write."""
    place, stop = next(((start, end) for kind, start, end in boxes(data) if kind == b"jp2c"), (0, len(data)))
    place, style = place + 2, 0
    while (marker := _marker(data, place)) not in (None, _EOC):
        part = place
        style |= _packet_style(data, place)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker != _SOT:
            continue
        # A part of a tile: its own segments, and the data up to its end.
        length = int.from_bytes(data[part + 6 : part + 10], "big")
        end = part + length if length else data.rfind(b"\xff\xd9", 0, stop)
        while place < end and _marker(data, place) not in (None, _SOD):
            style |= _packet_style(data, place)
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        for found in _STRAY.finditer(data, place + 2, max(0, end)):
            kind = {b"\xff\x91": 2, b"\xff\x92": 4}.get(found[0][:2], 0)
            if not style & kind or (kind == 2) != (len(found[0]) == 6):
                return True
        place = max(place, end)
    return False


def _marker(data: bytes, place: int) -> int | None:
    """Returns the second byte of the marker at `place`, which a length follows; None where there is none."""
    return data[place + 1] if place + 4 <= len(data) and data[place] == 0xFF else None


def _packet_style(data: bytes, place: int) -> int:
    """Returns, of a COD segment, which segments may stand in compressed data: 2, SOP; 4, EPH. Of another one, 0."""
    return data[place + 4] & 6 if data[place + 1] == _COD and place + 4 < len(data) else 0


def riff_chunks(data: bytes, place: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and size of the content of each chunk of a RIFF file, from `place` on."""
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], place + 8, size
        place += 8 + size + size % 2


def _is_alone(data: bytes, tags: Any) -> bool:
    """Returns whether a TIFF has one directory and one picture, as far as its first says."""
    if tags.keys() & _MORE_DIRECTORIES or str(tags.get(270, "")).startswith("ImageJ="):  # whose slices follow
        return False
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    after = start + 2 + 12 * int.from_bytes(data[start : start + 2], order)
    return data[2:4] in (b"\x2a\0", b"\0\x2a") and data[after : after + 4] == bytes(4)


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
    if len(data) < 12:
        return 12
    width, height, channels = (int.from_bytes(data[place : place + 2], "big") for place in (6, 8, 10))
    if data[2] == 0:
        return 512 + data[3] * width * height * channels
    end = 512 + 8 * height * channels
    lengths = np.frombuffer(data[end - 4 * height * channels : end], ">u4") if end <= len(data) else np.zeros(0)
    return end + int(lengths.sum())


def boxes(data: bytes, place: int = 0) -> Iterator[tuple[bytes, int, int]]:
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


def jp2_colours(data: bytes) -> bytes:
    """Returns the content of a JP2's first box of colours, which names a space or holds a profile; nothing where there
    is none."""
    header = next((data[start:end] for kind, start, end in boxes(data) if kind == b"jp2h"), b"")
    return next((header[start:end] for kind, start, end in boxes(header) if kind == b"colr"), b"")


def _last_box_end(data: bytes) -> int:
    """Returns where the last box ends; a file without any box that can hold pixels is taken to go on."""
    ends = {kind: end for kind, _, end in boxes(data)}
    return max(ends.values(), default=0) if ends.keys() & {b"mdat", b"jp2c", b"meta"} else len(data) + 1
