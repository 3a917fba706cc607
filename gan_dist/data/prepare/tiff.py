"""TIFFs that Pillow would read wrongly, unheard: deep ones stored plane by plane, big-endian or with white as zero."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from gan_dist.data.prepare import jpeg
from gan_dist.data.prepare.account import Rejected

_CHECKED = ("tiff_adobe_deflate", "tiff_deflate", "jpeg")
_NATIVE = {"F;32BF": "F;32NF", "I;16BS": "I;16NS", "I;32BS": "I;32NS"}
_BIG_ENDIAN, _MISREAD = b"MM\0\x2b", b"MM\x2b\0"
TiffImagePlugin.PREFIXES.append(_MISREAD)
# A mode that Pillow can read but does not list: 16-bit gray, big-endian, white as zero.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


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
        by_planes = image.tag_v2.get(284) == 2 and any(tile.codec_name == "raw" for tile in image.tile)
    except (SyntaxError, IndexError):
        by_planes = True
    if not by_planes:
        _in_native_order(image)
        return image
    # Pillow's own reader takes a plane of 16 bits for one of 8, and knows few kinds of planes. libtiff's is right.
    before, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
    try:
        image = _pillow(data)
    finally:
        TiffImagePlugin.READ_LIBTIFF = before
    _in_native_order(image)
    return image


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
        inverted=deep and tags.get(262) == 0,
        unsigned=image.mode == "I" and bits == 32 and kind == 1,
        turned=tags.get(274, 1) in range(2, 9),
    )


def load(image: ImageFile.ImageFile, data: bytes, fast: bool = False) -> None:
    """Loads the pixels of an opened TIFF; `fast`: without the checks, for which they are unpacked twice.

    Raises whatever Pillow raises, and Rejected for damage of deflated strips or tiles, which have checksums, or of JPEG
    ones, which libjpeg warns of: libtiff stops reading when it has all rows."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    image.load()
    checked = not fast and image.info.get("compression") in _CHECKED
    for strip in _strips(image, data) if checked else ():
        jpeg.check(strip) if image.info["compression"] == "jpeg" else _inflate(strip)


def _strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> Iterator[bytes]:
    """Yields the strips or tiles of a TIFF; JPEG ones with the tables that they share."""
    tags = image.tag_v2
    starts, sizes = (tags.get(273), tags.get(279)) if 273 in tags else (tags.get(324), tags.get(325))
    for start, size in zip(starts or (), sizes or (), strict=False):
        strip = data[start : start + size]
        if size and image.info["compression"] == "jpeg":
            strip = tags.get(347, b"\xff\xd8\xff\xd9")[:-2] + strip[2:]
        if size:  # else an extra plane that is not stored
            yield strip


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
    else:
        assert white is not None
        right = Image.fromarray((int(white) - values.astype(np.int64)).clip(0).astype(np.uint16))
    right.info = image.info
    return right, white
