"""Whether pixels end where their data do, in formats whose decoders stop, without a word, when they have all pixels.

Most damage of packed pixels, and bytes that were lost or inserted, shows itself only in what is left over.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_UNREAD = 8
"""Bytes at the end that a decoder may not need: a code that says that it is the last, and what fills up its byte."""
_PADDING = 32
"""Zeros that may follow."""
_BLANK = np.isin(np.arange(256), list(b" \t\n\r\v\f"))
_BLOCK = 2**20
"""Bytes of text that are looked at together."""
_STREAMED = {"gif", "tga_rle", "pcx", "sun_rle"}
_PADDED = {"BGRX": "XBGR", "RGBX": "XRGB"}
_RAW_BITS = {
    "1": 1,
    "1;I": 1,
    "L": 8,
    "P": 8,
    "RGB": 24,
    "BGR": 24,
    "BGRX": 32,
    "RGBX": 32,
    "XBGR": 32,
    "XRGB": 32,
    "I;16B": 16,
    "L;16B": 16,
}


class Stream(io.BytesIO):
    """A file as a decoder is given it: all but the last bytes before `end`, and these only if it asks for more."""

    def __init__(self, data: bytes, end: int) -> None:
        super().__init__(data)
        self._last = max(0, end - _UNREAD)
        self.is_early = True
        """Whether the decoder was done before the last bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._last - self.tell()
        if left > 0 and (size is None or not 0 <= size <= left):
            size = left
        result = super().read(size)
        self.is_early = self.is_early and self.tell() <= self._last
        return result


def with_padding_first(image: Image.Image) -> None:
    """Lets the 32-bit pixels of an opened Sun file begin, as they do, with the byte that does not count. (Pillow would
    pass over the last.)"""
    if isinstance(image, ImageFile.ImageFile):
        for number, tile in enumerate(image.tile):
            mode, *more = tile.args if isinstance(tile.args, tuple) else (tile.args,)
            if mode in _PADDED:
                mode = _PADDED[mode]
                image.tile[number] = tile._replace(args=(mode, *more) if isinstance(tile.args, tuple) else mode)


def streamed(image: Image.Image, data: bytes) -> Stream | None:
    """Gives an opened picture a stream that tells where its decoder stops, and returns it; None where that tells
    nothing."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    if not isinstance(image, ImageFile.ImageFile) or len(tiles) != 1 or tiles[0].codec_name not in _STREAMED:
        return None
    start, end = tiles[0].offset, len(data)
    if tiles[0].codec_name == "gif":
        if (blocks := _in_blocks(data, start)) is None:
            return None
        data, end = blocks
    elif tiles[0].codec_name == "tga_rle" and data[-18:-2] == b"TRUEVISION-XFILE":
        places = [place for place in struct.unpack("<II", data[-26:-18]) if start < place]
        end = min([len(data) - 26, *places])
    elif tiles[0].codec_name == "pcx" and image.mode in ("P", "L") and data[-769:-768] == b"\x0c":
        end -= 769
    end -= _PADDING - len(data[max(start, end - _PADDING) : end].rstrip(b"\0")) if end - start > _PADDING else 0
    stream = Stream(data, end)
    stream.seek(start)
    image.fp = stream
    return stream


def _in_blocks(data: bytes, start: int) -> tuple[bytes, int] | None:
    """Returns a GIF whose pixels, from `start` on, are in blocks of which the last is a small one, and where that ends.
    (A decoder is done or not only between two blocks.) None: it is small as it is."""
    parts, place = [], start
    while place < len(data) and data[place]:
        parts.append(data[place + 1 : place + 1 + data[place]])
        place += 1 + data[place]
    packed = b"".join(parts)
    if len(packed) <= _UNREAD:
        return None
    most = len(packed) - (_UNREAD - 1)
    cuts = [*range(0, most, 255), most, len(packed)]
    blocks = [bytes([end - begin]) + packed[begin:end] for begin, end in itertools.pairwise(cuts)]
    new = data[:start] + b"".join(blocks)
    return new + data[place:], len(new)


def left_over(image: Image.Image, data: bytes) -> int:
    """Returns how many bytes, of an opened picture whose pixels are not packed, follow its pixels; none where it may
    hold something else besides."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    if image.format == "SGI" and data[2:3] == b"\0":
        return len(data[512 + data[3] * int(np.prod(struct.unpack(">3H", data[6:12]), dtype=np.int64)) :].strip(b"\0"))
    if image.format not in ("PPM", "SUN") or not tiles or tiles[-1].codec_name != "raw":
        return _numbers_left_over(data, image.size) if image.format == "PPM" and data[1:2] in b"123" else 0
    offset, args, (width, height) = tiles[-1].offset, tiles[-1].args, image.size
    mode, stride, *_ = args if isinstance(args, tuple) else (args, 0)
    if mode not in _RAW_BITS:
        return 0
    rest = data[offset + height * (stride or (width * _RAW_BITS[mode] + 7) // 8) :]
    rest = rest.strip(b"\0\r\n\t ")
    return 0 if image.format == "PPM" and re.match(rb"P[1-7]\s", rest) else len(rest)


def _numbers_left_over(data: bytes, size: tuple[int, int]) -> int:
    """Returns how many numbers too many there are in a PBM, PGM or PPM in plain text."""
    text = re.sub(rb"#[^\r\n]*", b"", data) if b"#" in data else data
    if data[1:2] == b"1":
        words = text.split(None, 3)[3:]
        return max(0, sum(word.count(b"0") + word.count(b"1") for word in words) - size[0] * size[1])
    return max(0, _words(text) - 4 - size[0] * size[1] * (3 if data[1:2] == b"3" else 1))


def _words(text: bytes) -> int:
    """Returns len(text.split()), without an object a word."""
    values, count, blank_before = np.frombuffer(text, np.uint8), 0, True
    for start in range(0, len(values), _BLOCK):
        blank = _BLANK[values[start : start + _BLOCK]]
        count += int(np.count_nonzero(blank[:-1] & ~blank[1:])) + bool(blank_before and not blank[0])
        blank_before = bool(blank[-1])
    return count


def wrong_rows(image: Image.Image, data: bytes) -> bool:
    """Returns whether a row of a PSD or an SGI file, packed by itself, does not give as many pixels as a row has, or
    the rows do not end where the file does."""
    if image.format == "PSD":
        height, channels, bits = image.height, int.from_bytes(data[12:14], "big"), int.from_bytes(data[22:24], "big")
        size, place = (image.width * bits + 7) // 8, 26
        for _ in range(3):
            place += 4 + int.from_bytes(data[place : place + 4], "big")
        table = np.frombuffer(data, ">u2", channels * height, place + 2) if data[place : place + 2] == b"\0\1" else None
        if table is None:
            pixels = place + 2 + size * height * channels
            return len(data) - pixels > _PADDING and data[place : place + 2] == b"\0\0"
        ends = place + 2 + 2 * len(table) + np.cumsum(table, dtype=np.int64)
        return bool(data[int(ends[-1]) :].strip(b"\0")) or _wrong(data, ends - table, ends, size, _packbits)
    if image.format == "SGI" and data[2:4] == b"\1\1":
        width, height, channels = struct.unpack(">3H", data[6:12])
        table = np.frombuffer(data, ">u4", 2 * height * channels, 512).astype(np.int64).reshape(2, -1)
        return _wrong(data, table[0], table[0] + table[1], width, _of_sgi)
    return False


def _packbits(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns for each first byte of a packet how many bytes the packet has and gives."""
    literal, none = codes < 128, codes == 128
    gives = np.where(literal, codes + 1, np.where(none, 0, 257 - codes))
    return np.where(literal, codes + 2, np.where(none, 1, 2)), gives


def _of_sgi(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same for SGI, where a packet of nothing ends the row."""
    count = codes & 127
    return np.where(count == 0, 1 << 40, np.where(codes & 128, count + 1, 2)), count


def _wrong(data: bytes, starts: NDArray[Any], ends: NDArray[Any], size: int, packet: Any) -> bool:
    """Returns whether any row, packed from start to end, does not give `size` bytes. All are followed at once, from
    packet to packet."""
    values = np.frombuffer(data, np.uint8)
    if len(ends) and (int(ends.max()) > len(data) or int(starts.min()) < 0):
        return True
    places, given = starts.astype(np.int64), np.zeros(len(starts), np.int64)
    going = np.flatnonzero(places < ends)
    while len(going):
        length, gives = packet(values[places[going]].astype(np.int64))
        places[going] += length
        given[going] += gives
        going = going[places[going] < ends[going]]
    return bool((given != size).any())
