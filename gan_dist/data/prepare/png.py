"""PNG files, checked chunk by chunk: damage of the pixels is found, that of anything else is cut out.

Pillow checks no checksum of pixel data, and refuses a picture for a fault in any text beside it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from gan_dist.data.prepare.account import Rejected

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"IEND")
_TEXTS = (b"iTXt", b"tEXt", b"zTXt")
_ORIENTING_TEXT = b"Raw profile type exif\0"
_LONGEST = 2**22
"""Bytes of a text that may hold an orientation, and of a profile."""


def checked(data: bytes, keep_truncated: bool = False) -> bytes:
    """Returns a PNG of the same pixels, colour profile and orientation without anything else that could hinder reading.

    `data` itself is returned when there is nothing to cut out. With `keep_truncated`, a file that ends early is passed
    on up to its end.

    Raises:
        Rejected: `corrupt`, a chunk that decides about pixels differs from its checksum; `truncated`; `unsupported`.
    """
    view, place = memoryview(data), len(SIGNATURE)
    kept, begun, colours = [view[:place]], False, 0
    while place + 12 <= len(data):
        length, kind = int.from_bytes(view[place : place + 4], "big"), bytes(view[place + 4 : place + 8])
        end = place + 12 + length
        if end > len(data) or not kind.isalpha():
            if kind[:1].islower() and (begun or (place := _next(data, place)) > 0):
                if begun:
                    break  # what is cut off are no pixels
                continue
            if keep_truncated and kind == b"IDAT":
                kept.append(view[place:])
                begun = True
                break
            reason = "truncated" if kind.isalpha() else "corrupt"
            raise Rejected(reason, f"PNG: the chunk {kind!r} at byte {place} ends beyond the file, or is none")
        sound = zlib.crc32(view[place + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if kind in _PIXELS:
            if not sound:
                raise Rejected("corrupt", f"PNG: the checksum of {kind.decode()} at byte {place} differs")
            begun, colours = begun or kind == b"IDAT", length // 3 if kind == b"PLTE" else colours
            if kind != b"tRNS" or (not begun and _may_be_transparent(data[25:26], length, colours)):
                kept.append(view[place:end])
            if kind == b"IEND":
                break
        elif kind[:1].isupper():
            reason = "unsupported" if sound else "corrupt"
            raise Rejected(reason, f"PNG: a chunk {kind.decode()} without which it cannot be shown")
        elif kind == b"iCCP" and (colours or begun):
            pass  # as libpng does, whose programs show such a picture without its profile
        elif sound and _needed(kind, view[place + 8 : end - 4]):
            kept.append(view[place:end])
        elif not sound and not bytes(view[end + 4 : end + 8]).isalpha() and _next(data, place) > 0:
            end = _next(data, place)  # its length is wrong, too
        place = end
    if not begun:
        raise Rejected("truncated", "PNG: it ends before its pixels begin")
    return data if sum(map(len, kept)) == len(data) else b"".join(kept)


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of each pass: the first column and row, and from one to the next."""


def check_rows(data: bytes, image: Image.Image) -> None:
    """Raises Rejected unless a checked PNG, loaded as `image`, holds all its rows, which Pillow does not ask for. It
    leaves those that are missing at zero: only where the last one is so are they counted."""
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    last = height - 1 - (height % 2 if interlaced and height > 1 else 0)
    if np.asarray(image.crop((0, last, width, last + 1))).any():
        return
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    sizes = [(width, height)]
    if interlaced:
        sizes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in _ADAM7]
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0)
    unpacking = zlib.decompressobj()
    for packed in _pixels(data):
        while packed and missing > 0:
            missing -= len(unpacking.decompress(packed, 2**20))
            packed = unpacking.unconsumed_tail
    if missing > 0:
        raise Rejected("truncated", f"PNG: {missing} bytes of its rows are missing")


def _pixels(data: bytes) -> Iterator[bytes]:
    """Yields the contents of a checked PNG's chunks of pixels."""
    place = len(SIGNATURE)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IDAT":
            yield data[place + 8 : place + 8 + length]
        place += 12 + length


def is_deep(data: bytes) -> bool:
    """Returns whether a PNG has 16 bits a channel."""
    return data[24] == 16


def without_transparent_colour(image: Image.Image, data: bytes) -> Image.Image:
    """Returns a loaded PNG of 16 bits, gray or RGB, of which one colour is transparent, as LA or RGBA of 8 bits.

    Pillow would compare the colour with what is left of the pixels, or not at all."""
    colour = image.info["transparency"]
    if image.mode.startswith("I"):
        values = np.asarray(image)
        shown = values != colour
        bands = [Image.fromarray(np.rint(values * np.float32(255 / 65535)).astype(np.uint8))]
    else:
        low = PngImagePlugin.PngImageFile(io.BytesIO(data))
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # the other byte of each value
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        shown = (values != np.array(colour, np.uint16)).any(2)
        bands = list(image.split())
    made = Image.merge("LA" if len(bands) == 1 else "RGBA", [*bands, Image.fromarray(shown.astype(np.uint8) * 255)])
    made.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return made


def check_inner(data: bytes) -> None:
    """Raises Rejected for a damaged PNG inside another file, such as an icon."""
    place = data.find(SIGNATURE)
    while place >= 0:
        checked(data[place:])
        place = data.find(SIGNATURE, place + 1)


def _next(data: bytes, place: int) -> int:
    """Returns where the next sound chunk of pixels begins behind a chunk whose length cannot be right, or -1."""
    found = sorted(at - 4 for kind in _PIXELS if (at := data.find(kind, place + 8)) > 0)
    for start in found:
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
            return start
    return -1


def _may_be_transparent(kind: bytes, length: int, colours: int) -> bool:
    """Returns whether a tRNS chunk of `length` counts in a PNG of this colour type with so many `colours`: libpng
    passes over one that the format does not allow there."""
    return {b"\0": length == 2, b"\2": length == 6, b"\3": 0 < length <= colours}.get(kind, False)


def _needed(kind: bytes, content: memoryview) -> bool:
    """Returns whether a chunk beside the pixels decides how they are shown, and can be read."""
    if kind == b"eXIf":
        return True
    if kind in _TEXTS:
        return bytes(content[:30]).startswith(_ORIENTING_TEXT) and _is_short(kind, bytes(content))
    if kind == b"iCCP":
        _, _, packed = bytes(content).partition(b"\0")
        return packed[:1] == b"\0" and _unpacks(packed[1:])
    return False


def _is_short(kind: bytes, text: bytes) -> bool:
    """Returns whether a text, unpacked, has at most _LONGEST bytes."""
    _, _, rest = text.partition(b"\0")
    if kind == b"iTXt" and rest[:1] == b"\1":
        return _unpacks(rest[2:].split(b"\0", 2)[-1])
    return _unpacks(rest[1:]) if kind == b"zTXt" else len(text) < _LONGEST


def _unpacks(packed: bytes) -> bool:
    """Returns whether deflated bytes are whole, and at most _LONGEST."""
    try:
        unpacking = zlib.decompressobj()
        unpacking.decompress(packed, _LONGEST)
    except zlib.error:
        return False
    return unpacking.eof
