"""TIFFs that Pillow would read wrongly, unheard: deep ones stored plane by plane, big-endian or with white as zero."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin

from gan_dist.data.prepare import jpeg, libtiff
from gan_dist.data.prepare.account import Rejected

_DEFLATED = ("tiff_adobe_deflate", "tiff_deflate")
_MOST_PROVED = 2**26
"""Bytes of a strip's pixels that are copied to prove it."""
_NATIVE = {"F;32BF": "F;32NF", "I;16BS": "I;16NS", "I;32BS": "I;32NS"}
_BIG_ENDIAN, _MISREAD = b"MM\0\x2b", b"MM\x2b\0"
TiffImagePlugin.PREFIXES.append(_MISREAD)
# A mode that Pillow can read but does not list: 16-bit gray, big-endian, white as zero.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
_FILL_ORDER = 266
_YCBCR = 6
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
"""Each byte with its bits the other way round, as a fill order of 2 stores what is not JPEG."""
for (_order, _white, _kind, _, _bits, _more), _modes in tuple(TiffImagePlugin.OPEN_INFO.items()):
    TiffImagePlugin.OPEN_INFO.setdefault((_order, _white, _kind, 2, _bits, _more), _modes)  # libtiff turns the bits


@dataclass(frozen=True)
class Facts:
    """What a TIFF says of its pixels. `white`: the largest value of deep grey, None for what has none; `inverted`: zero
    is white; `unsigned`: 32-bit integers without a sign; `turned`: it has an orientation, which Pillow applies."""

    white: float | None
    inverted: bool
    unsigned: bool
    turned: bool


class _BigEndian(io.BytesIO):
    """A big-endian BigTIFF as Pillow, which looks for its number in the wrong byte, can open it; libtiff is given the
    true bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() == 0 and size == 8:
            return _MISREAD + super().read(size)[4:]
        return super().read(size)


def _pillow(data: bytes) -> TiffImagePlugin.TiffImageFile:
    if not data.startswith(_BIG_ENDIAN):
        return TiffImagePlugin.TiffImageFile(io.BytesIO(data), "")
    image = TiffImagePlugin.TiffImageFile(_BigEndian(data), "")
    image._exif = Image.Exif()  # it would be looked for by the wrong byte again
    image._exif._loaded = True
    image._exif[0x0112] = image.tag_v2.get(0x0112, 1)
    return image


def opened(data: bytes) -> ImageFile.ImageFile:
    """Returns a TIFF, opened so that Pillow reads it right. Raises whatever Pillow raises."""
    try:
        image = _pillow(data)
        is_raw = any(tile.codec_name == "raw" for tile in image.tile)
        tags = image.tag_v2
        is_misread = is_raw and (tags.get(284) == 2 or tags.get(_FILL_ORDER) == 2 or tags.get(262) == _YCBCR)
    except (SyntaxError, IndexError):
        is_misread = True
    if not is_misread:
        _in_native_order(image)
        _with_short_colours(image)
        return image
    # Pillow's own reader takes a plane of 16 bits for one of 8, knows few kinds of planes and no colours that several
    # pixels share, and turns bits only of what has 8 or fewer. libtiff's is right.
    before, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
    try:
        image = _pillow(data)
    finally:
        TiffImagePlugin.READ_LIBTIFF = before
    _in_native_order(image)
    return image


def _with_short_colours(image: TiffImagePlugin.TiffImageFile) -> None:
    """Lets a table of colours that some programs write with 8 bits, where 16 belong, be read as meant."""
    colours = image.tag_v2.get(320) if image.mode == "P" else None
    if colours and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _in_native_order(image: TiffImagePlugin.TiffImageFile) -> None:
    """Lets pixels that libtiff decodes, which it does into native order, not be swapped again."""
    image.tile = [
        tile._replace(args=(_NATIVE.get(tile.args[0], tile.args[0]), *tile.args[1:]))
        if tile.codec_name == "libtiff" and isinstance(tile.args, tuple)
        else tile
        for tile in image.tile
    ]


def facts(image: Image.Image) -> Facts:
    """Returns what the tags say of an opened picture that is not loaded yet; of one that is no TIFF, nothing."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return Facts(None, False, False, False)
    tags = image.tag_v2
    bits, kind = (tags.get(258) or (1,))[0], (tags.get(339) or (1,))[0]
    deep = image.mode.startswith("I") and bits in (12, 16)
    return Facts(
        white=2.0 ** (bits - (kind == 2)) - 1 if deep else None,
        inverted=(deep or image.mode == "F") and tags.get(262) == 0,
        unsigned=image.mode == "I" and bits == 32 and kind == 1,
        turned=tags.get(274, 1) in range(2, 9),
    )


def load(image: ImageFile.ImageFile, data: bytes, fast: bool = False) -> bool:
    """Loads the pixels of an opened TIFF, and returns whether libtiff warned of something that may be harmless; `fast`:
    without the checksums of deflated strips or tiles, at which libtiff does not look: it stops when it has all rows.

    Raises whatever Pillow raises, and Rejected for damage."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    if number := _planes_apart(image):
        return _load_planes(image, data, number, fast)
    compression, turned = image.info.get("compression"), image.tag_v2.get(274, 1) != 1
    with libtiff.messages() as said:
        image.load()
    is_jpeg = compression == "jpeg"
    if lines := said.errors or (said.warnings if is_jpeg else []):
        raise Rejected("corrupt", f"TIFF: {lines[0]}")
    if is_jpeg:
        for _, strip in _strips(image, data):
            jpeg.check(strip)
    elif compression in _DEFLATED and not fast:
        proved = None if turned else _proves(image)
        for box, strip in _strips(image, data):
            if proved is None or not proved(box, strip):
                _inflate(strip)
    return bool(said.warnings)


def _planes_apart(image: TiffImagePlugin.TiffImageFile) -> int:
    """Returns how many planes a picture of 8 bits a channel has that is stored plane by plane with more than its
    colours, else 0: there, too, libtiff's reader for Pillow goes wrong."""
    tags = image.tag_v2
    bits, number = set(tags.get(258, (1,))), tags.get(277, 1)
    if tags.get(284) != 2 or bits != {8} or image.info.get("compression") == "jpeg":
        return 0
    colours = {1: 1, 2: 3, 5: 4}.get(tags.get(262, -1), number)
    return len(image.getbands()) if number > colours else 0


def _load_planes(image: TiffImagePlugin.TiffImageFile, data: bytes, number: int, fast: bool) -> bool:
    """Does what `load` does, of so many planes one by one."""
    planes, warned = [], False
    for place in range(number):
        apart = _plane(image, data, place)
        plane = opened(apart)
        warned |= load(plane, apart, fast)
        planes.append(plane.convert("L"))
    if image.mode in ("LA", "RGBA") and 1 in image.tag_v2.get(338, ()):  # colours are multiplied by alpha
        whole = Image.merge(f"{image.mode[:-1]}a", planes).convert(image.mode)
    else:
        whole = Image.merge(image.mode, planes)
    image.im, image._size, image.tile = whole.im, whole.size, []
    return warned


def _plane(image: TiffImagePlugin.TiffImageFile, data: bytes, place: int) -> bytes:
    """Returns one plane of a picture as a gray TIFF of its own."""
    tags = image.tag_v2
    at, sizes = (273, 279) if 273 in tags else (324, 325)
    each = len(tags[at]) // tags[277]
    chosen = slice(place * each, (place + 1) * each)
    strips = [data[start : start + size] for start, size in zip(tags[at][chosen], tags[sizes][chosen], strict=True)]
    entries: dict[int, tuple[int, ...]]
    entries = {tag: (tags[tag],) for tag in (256, 257, 259, _FILL_ORDER, 274, 278, 317, 322, 323) if tag in tags}
    entries |= {258: (8,), 262: (1,), 277: (1,)}
    entries |= {at: tuple(accumulate(map(len, strips[:-1]), initial=8)), sizes: tuple(map(len, strips))}
    body = b"".join(strips)
    start = 8 + len(body)
    directory, more = struct.pack("<H", len(entries)), b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(packed) > 4:
            packed, more = struct.pack("<I", after + len(more)), more + packed
        directory += struct.pack("<HHI", tag, 4, len(values)) + packed
    return b"II*\0" + struct.pack("<I", start) + body + directory + bytes(4) + more


Box = tuple[int, int, int, int]


def _strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> Iterator[tuple[Box, bytes]]:
    """Yields the strips or tiles of a TIFF, each with the part of the picture that it covers (a tile may exceed the
    picture); JPEG ones with the tables that they share. Those of further planes cover the same parts again."""
    tags = image.tag_v2
    width, height = tags[256], tags[257]
    if 273 in tags:
        starts, sizes, across, down = tags.get(273), tags.get(279), width, min(tags.get(278, height), height)
    else:
        starts, sizes, across, down = tags.get(324), tags.get(325), tags.get(322, width), tags.get(323, height)
    columns, rows = -(-width // across), -(-height // down)
    for number, (start, size) in enumerate(zip(starts or (), sizes or (), strict=False)):
        strip = data[start : start + size]
        if tags.get(_FILL_ORDER) == 2 and image.info["compression"] in _DEFLATED:
            strip = strip.translate(_REVERSED)
        if size and image.info["compression"] == "jpeg":
            strip = tags.get(347, b"\xff\xd8\xff\xd9")[:-2] + strip[2:]
        left, top = number % columns * across, number // columns % rows * down
        if size:  # else an extra plane that is not stored
            yield (left, top, left + across, min(top + down, height) if 273 in tags else top + down), strip


def _proves(image: TiffImagePlugin.TiffImageFile) -> Callable[[Box, bytes], bool] | None:
    """Returns a function that tells whether the checksum of a deflated strip or tile is that of the loaded pixels, so
    that they are what was once packed; None where the pixels in memory are not those of the file.

    It is far cheaper than to unpack a strip again. What it cannot prove may be sound none the less."""
    tags = image.tag_v2
    bits, predictor = set(tags.get(258, (1,))), tags.get(317, 1)
    plain = image.mode in ("L", "P", "RGB", "RGBA", "CMYK") and bits == {8} and tags.get(262) in (1, 2, 3, 5)
    deep = image.mode in ("I;16", "I;16B") and bits == {16} and tags.get(262) == 1
    channels = tags.get(277, 1) == len(image.getbands())
    if not (plain or deep) or not channels or tags.get(284, 1) != 1 or predictor not in (1, 2):
        return None
    order: Literal["<", ">"] = ">" if tags.prefix == b"MM" else "<"

    def proved(box: Box, strip: bytes) -> bool:
        left, top, right, bottom = box
        if (right - left) * (bottom - top) * tags.get(277, 1) * max(bits) // 8 > _MOST_PROVED:
            return False
        values = _pixels(image, (left, top, min(right, image.width), min(bottom, image.height)))
        missing = bottom - top - values.shape[0], right - left - values.shape[1]
        if any(missing):  # what exceeds the picture is taken to be zero
            values = np.pad(values, ((0, missing[0]), (0, missing[1]), (0, 0)))
        if predictor == 2:
            pixels, values = values, values.copy()
            np.subtract(pixels[:, 1:], pixels[:, :-1], out=values[:, 1:])
        stored = values.astype(values.dtype.newbyteorder(order), copy=False)
        return zlib.adler32(stored.data) == int.from_bytes(strip[-4:], "big")

    return proved


def _pixels(image: Image.Image, box: Box) -> NDArray[Any]:
    """Returns a part of a picture as integers [H, W, C]. (np.asarray of a crop copies three times.)"""
    kind = {"I;16": "<u2", "I;16B": ">u2"}.get(image.mode, "u1")
    channels = len(image.getbands())
    width, height = box[2] - box[0], box[3] - box[1]
    encoder = Image._getencoder(image.mode, "raw", (image.mode, 0, 1))
    encoder.setimage(image.im, box)
    _, _, data = encoder.encode(width * height * channels * np.dtype(kind).itemsize)
    return np.frombuffer(data, kind).reshape(height, width, channels)


def _inflate(strip: bytes) -> None:
    """Raises Rejected unless a deflated strip is whole and has the right checksum."""
    unpacking = zlib.decompressobj()
    try:
        while strip and not unpacking.eof:
            unpacking.decompress(strip, 2**20)
            strip = unpacking.unconsumed_tail
    except zlib.error as error:
        raise Rejected("corrupt", f"TIFF: {error}") from None
    if not unpacking.eof:
        raise Rejected("truncated", "TIFF: a strip ends early")


@lru_cache(maxsize=16)
def codec_missing(compression: str) -> bool:
    """Returns whether this libtiff cannot unpack what is compressed so, whatever the bytes."""
    if compression not in ("webp", "zstd", "lzma", "lerc"):
        return False
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), "TIFF", compression=compression)
    except Exception:
        return True
    return False


def corrected(image: Image.Image, told: Facts) -> tuple[Image.Image, float | None]:
    """Returns a loaded picture with its deep values as the facts say, zero black and nothing negative, and the value
    of white, where the file tells."""
    if not (told.inverted or told.unsigned):
        if image.mode == "I" and np.asarray(image).max() <= 255:
            return image, None  # 8 bits in signed 16
        return image, told.white
    values, white = np.asarray(image), told.white
    if told.unsigned:
        counts = values.view(np.uint32)
        white = 2.0**32 - 1 if counts.max() >= 2**31 else None  # all 32 bits are used
        right = Image.fromarray(counts.astype(np.float32))
    elif white is None:  # floats: white is what it would be if these were bright
        top = float(np.max(values, initial=0.0, where=np.isfinite(values)))
        white = next((step for step in (1.0, 255.0, 65535.0) if top <= step), top)
        right = Image.fromarray(white - values)
    else:
        right = Image.fromarray((int(white) - values.astype(np.int64)).clip(0).astype(np.uint16))
    right.info = image.info
    return right, white
