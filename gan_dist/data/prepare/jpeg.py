"""JPEGs decoded by libjpeg-turbo with its warnings: Pillow uses the same decoder, but hides what it says.

A JPEG has no checksum. Found are data that end early or late, codes that do not exist, restart markers out of order,
scans that are missing, and holes of zeros. Not to be found are bits that changed into other valid codes while the
number of blocks stayed the same. One that cannot even be opened is judged in decode.py's `named_failures`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import simplejpeg
from PIL import Image

from gan_dist.data.prepare.account import Rejected

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_UNKNOWN_LAYOUT = "subsampling"
_ABOUT_HEADERS = re.compile(r"JFIF revision|Adobe color|Invalid SOS|ICC marker|bytes before marker 0x(?!d[0-79])")
"""Warnings about what stands before the pixels. libjpeg tells its first warning only, so they may hide another."""
_NO_END = "Premature end of JPEG file"
_END = b"\xff\xd9"
_SCAN = b"\xff\xda"
_HOLE = bytes(64)
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_PROGRESSIVE = (0xC2, 0xCA)
_COEFFICIENTS = 64


def decode(data: bytes, mode: str, size: tuple[int, int]) -> Image.Image | None:
    """Returns the first picture of a JPEG in Pillow's `mode` (L, RGB or CMYK), decoded at the scale that gives `size`.

    CMYK is as stored: Pillow would invert it. None: a layout that this library does not know, but Pillow may.

    Raises:
        Rejected: `truncated` or `corrupt`, if libjpeg reports anything or the data show damage.
    """
    if mode not in _SPACES:
        return None
    width, height = size
    while True:
        try:
            pixels = simplejpeg.decode_jpeg(data, _SPACES[mode], min_height=height, min_width=width, strict=True)
        except ValueError as error:
            text = str(error)
            if _UNKNOWN_LAYOUT in text:
                return None
            if _NO_END in text and data[-2:] != _END:
                data += _END  # whole, if only these two bytes are missing
                continue
            if _ABOUT_HEADERS.search(text) and (plain := _without_metadata(data)) != data:
                data = plain
                continue
            early = _NO_END in text or (data[-2:] == _END and "premature end of data segment" in text)
            early = early or _END not in data[data.rfind(_SCAN) :]
            raise Rejected("truncated" if early else "corrupt", f"JPEG: {text}") from None
        if pixels.shape[:2] != (height, width):
            return None
        if not _plainly_whole(data, len(mode)):
            _look_for_damage(data)
        return Image.frombuffer(mode, size, pixels, "raw", mode, 0, 1)


def check(data: bytes) -> None:
    """Raises Rejected if a JPEG inside another file, which was decoded without a warning, shows a hole or lacks
    scans."""
    if _HOLE in data:
        _look_for_damage(data)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, place and end of each segment with a length, up to the end of the first picture. Bytes between
    segments, entropy-coded or stray, are passed over."""
    place = 2
    while match := _MARKER.search(data, place):
        marker, place = data[match.end() - 1], match.end() - 2
        if marker == 0xD9:
            return
        end = place + 2
        if marker != 0x01 and marker != 0xD8:
            end += int.from_bytes(data[place + 2 : place + 4], "big")
            if end < place + 4 or end > len(data):
                return
            yield marker, place, end
        place = end


def _without_metadata(data: bytes) -> bytes:
    """Returns the same picture without what stands before its pixels and is not needed to decode them."""
    kept, last, sequential, needed = [data[:2]], 2, False, False
    for marker, place, end in _segments(data):
        content = data[place:end]
        if needed:  # what follows metadata without being a segment is left out, but what follows a table is damage
            kept.append(data[last:place])
        metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        last, needed = end, not metadata
        if marker == 0xDA:
            content = content[:-3] + b"\0\x3f\0" if sequential else content
        elif marker in (0xC0, 0xC1):
            sequential = True
        elif content[4:9] == b"JFIF\0":
            content = content[:9] + b"\1\1" + content[11:]
        elif metadata and content[4:9] != b"Adobe":
            continue
        kept.append(content)
    return b"".join([*kept, data[last:]])


def _plainly_whole(data: bytes, components: int) -> bool:
    """Returns whether a JPEG has neither a hole nor scans that might be missing: a quick look, for nearly all files."""
    if _HOLE in data:
        return False
    for marker, place, _ in _segments(data):
        if marker in _PROGRESSIVE:
            return False
        if marker == 0xDA:
            return data[place + 4] == components
    return False


def _look_for_damage(data: bytes) -> None:
    """Raises Rejected for damage that libjpeg does not see in data that it decodes."""
    first: dict[int, int] = {}
    sent: dict[int, dict[int, int]] = {}
    progressive = begun = False
    for marker, place, end in _segments(data):
        content = data[place + 4 : end]
        if marker == 0xC4:
            first |= _first_symbols(content)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC) and not sent:
            progressive = marker in _PROGRESSIVE
            sent = {content[6 + 3 * i]: {} for i in range(content[5])}
        elif marker == 0xDA and not progressive:
            tables = {content[2 + 2 * i] for i in range(content[0])}
            if any(first.get(16 + table % 16, 0) for table in tables):
                _look_for_hole(data, end)
            begun = True
            for i in range(content[0]):
                sent.pop(content[1 + 2 * i], None)
            if not sent:
                return
        elif marker == 0xDA:
            low, high, bits = content[-3:]
            for i in range(content[0]):
                sent.get(content[1 + 2 * i], {}).update(dict.fromkeys(range(low, high + 1), bits % 16))
    for component in sent.values() if begun or progressive else ():
        if begun or len(component) < _COEFFICIENTS or any(component.values()):  # not all, or not to the last bit
            raise Rejected("truncated", "JPEG: scans are missing")


def _first_symbols(content: bytes) -> dict[int, int]:
    """Returns, for each Huffman table of a DHT segment, by its class and number, the symbol whose code is all zeros."""
    symbols, place = {}, 0
    while place + 18 <= len(content):
        symbols[content[place]] = content[place + 17]
        place += 17 + sum(content[place + 1 : place + 17])
    return symbols


def _look_for_hole(data: bytes, start: int) -> None:
    """Raises Rejected if the scan that begins at `start` has a long run of zero bytes which no picture gives: where a
    component's AC code of zeros is no end of block, the run means blocks of 63 equal coefficients. (In other scans,
    zeros are what an area of one colour is.)"""
    following = _MARKER.search(data, start)
    hole = data.find(_HOLE, start, following.start() if following else len(data))
    if hole >= 0:
        raise Rejected("corrupt", f"JPEG: a hole of zeros at byte {hole}")
