"""Any image bytes -> one square uint8 RGB picture, or a reject with its reason.

The steps: identify by content, refuse what would not fit in memory, decode (JPEG at a reduced scale), orient by EXIF,
normalise the mode, composite transparency, shrink the short edge to S, crop the centre, convert colours to sRGB.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.colour import Converter, normaliser, to_srgb

RESAMPLE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
BACKGROUND = (255, 255, 255)
"""Transparency is composited on white, like the paper of a drawing."""

MEMORY_LIMIT = 800 * 2**20
"""Bytes that one image may take: its encoded data, its decoded pixels and the decoder's own buffers together."""

_LONGEST_TEXT = 2**26
"""Bytes of one PNG comment. With Pillow's own limit of 1 MiB, pictures with a Photoshop edit history are lost."""

STRIP_PIXELS = 2**22
"""Larger pictures are converted in strips, so that they are never in memory twice."""

# Bytes a pixel that decoding takes at its peak, rounded up: measured on 4000x4000 RGB(A) pictures with Pillow 13 (PNG
# 4.1, AVIF 9.6, WEBP 16.1, JPEG2000 19.6-24.7); TIFF has 4.1, and as much again where it is a single strip.
_BYTES_PER_PIXEL = {"PNG": 5, "TIFF": 8, "AVIF": 12, "WEBP": 17, "JPEG2000": 25}
_OTHER_BYTES_PER_PIXEL = 8

# No EPS (it would start ghostscript), no stubs that need a handler, no formats that accept any bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PSD", "QOI", "DDS", "PCX")
_RARE_FORMATS = ("SGI", "SUN", "DIB", "ICNS", "FITS", "XBM", "XPM")
_KNOWN_BUT_UNREAD = {b"ftyp": 4, b"JXL ": 4, b"\xff\x0a": 0, b"%!PS": 0, b"GRIB": 0, b"II*\0": 0, b"MM\0*": 0}

_SCALED_EDGE = 4
"""JPEGs are decoded at the smallest scale that leaves the short edge at least this many times S. Measured on 2000x1500
textures against a full decode with LANCZOS: at 4 the mean difference is 0.25 of 255 (maximum 3) in 0.33 of the time; at
8 it is 0.35 (with reducing_gap) in 0.35; at 2 it is 1.4 (maximum 24) in 0.28."""
_REDUCING_GAP = 3
"""Other pictures are box-reduced by whole factors to this many times S before the real filter (Pillow's own rule)."""
_RESIZED_PIXELS = 2**24
"""A picture that would have more pixels than this after resizing is cropped to its middle first: 1x60000 at 64 would
become 64x3840000."""


@dataclass(frozen=True)
class Recipe:
    """How pictures become squares. `resolution`: S; `resample`: a name in RESAMPLE; `min_side`: the least short edge;
    `keep_truncated`: keep, flagged, what can be decoded of a truncated file; `full_decode`: no scaled decoding and no
    box reduction (bilinear pixels then equal torchvision's Resize + CenterCrop)."""

    resolution: int = 64
    resample: str = "lanczos"
    min_side: int = 1
    keep_truncated: bool = False
    full_decode: bool = False


@dataclass
class Square:
    """A picture ready for a shard: `pixels` uint8 (3, S, S); the original's `width` and `height` (as displayed, after
    orientation), Pillow `mode` and `format`; `flags`: any special treatment; `seconds` by stage."""

    pixels: NDArray[np.uint8]
    width: int
    height: int
    mode: str
    format: str
    flags: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def square(data: bytes, recipe: Recipe) -> Square:
    """Returns the picture in `data` as a square.

    Raises:
        Rejected: there is none. Nothing else is raised, whatever the bytes are.
    """
    if not data:
        raise Rejected("empty")
    began = perf_counter()
    flags: list[str] = []
    try:
        with _switched(PngImagePlugin, "MAX_TEXT_CHUNK", _LONGEST_TEXT):
            opened = _decode(data, recipe)
    except Rejected as rejected:
        if rejected.reason != "truncated" or not recipe.keep_truncated:
            raise
        with _switched(ImageFile, "LOAD_TRUNCATED_IMAGES", True):
            opened = _decode(data, recipe)
        flags.append("truncated")
    decoded = perf_counter()
    image = opened.image
    with image, _named_failures(image.format or "?"):
        picture = to_srgb(_shrink(opened, recipe), image, flags)
        pixels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
    if opened.orientation > 1:
        flags.append("oriented")
    if min(opened.width, opened.height) < recipe.resolution:
        flags.append("enlarged")
    shown = (opened.height, opened.width) if opened.orientation > 4 else (opened.width, opened.height)
    seconds = {"decode": decoded - began, "resize": perf_counter() - decoded}
    return Square(pixels, *shown, opened.mode, image.format or "?", flags, seconds)


@contextmanager
def _switched(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """A context in which one of Pillow's switches is set. They are global to the process, but a worker process decodes
    one picture at a time."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@dataclass(frozen=True)
class _Opened:
    """A decoded picture: the original's stored `width`, `height` and `mode`, its EXIF `orientation`, and `extent`, its
    size in the decoded `image` (the last row and column of a scaled JPEG may exceed it)."""

    image: Image.Image
    width: int
    height: int
    mode: str
    orientation: int
    extent: tuple[float, float]


def _decode(data: bytes, recipe: Recipe) -> _Opened:
    image = _open(data)
    with _named_failures(image.format or "?"):
        width, height, mode = *image.size, image.mode
        if min(width, height) < 1:
            raise Rejected("corrupt", f"{width}x{height}")
        if min(width, height) < recipe.min_side:
            raise Rejected("too_small", f"{width}x{height}")
        extent: tuple[float, float] = (width, height)
        if isinstance(image, JpegImagePlugin.JpegImageFile) and not recipe.full_decode:
            scaled = image.draft(None, (_SCALED_EDGE * recipe.resolution,) * 2)
            extent = scaled[1][2:] if scaled else extent
        _refuse_large(image, len(data), width * height)
        orientation = _orientation(image)
        image.load()
    return _Opened(image, width, height, mode, orientation, extent)


@lru_cache(maxsize=1)
def _plugins() -> list[tuple[str, Callable[..., Image.Image], Callable[[bytes], bool | str]]]:
    Image.init()
    plugins: list[tuple[str, Callable[..., Image.Image], Callable[[bytes], bool | str]]] = []
    for name in (*_FORMATS, *_RARE_FORMATS):
        if name in Image.OPEN:
            factory, accept = Image.OPEN[name]
            if accept is not None:
                plugins.append((name, factory, accept))
    return plugins


def recognised(prefix: bytes) -> bool:
    """Returns whether these first bytes (16 suffice) are those of an image format."""
    return any(_accepts(accept, prefix) for _, _, accept in _plugins())


def _accepts(accept: Callable[[bytes], bool | str], prefix: bytes) -> bool | str:
    try:
        return accept(prefix)
    except (IndexError, struct.error):  # fewer bytes than it reads
        return False


def _open(data: bytes) -> Image.Image:
    """Returns the picture, identified by its content. Not Image.open, which refuses a picture by its full pixel count,
    before a JPEG could be scaled, with a limit that is global to the process."""
    prefix = data[:16]
    for name, factory, accept in _plugins():
        verdict = _accepts(accept, prefix)
        if isinstance(verdict, str):  # recognised, but this Pillow has no codec for it
            raise Rejected("unsupported", f"{name}: {verdict}")
        if verdict:
            with _named_failures(name):
                return factory(io.BytesIO(data), "")
    if data[-18:-2] == b"TRUEVISION-XFILE":
        with _named_failures("TGA"):
            return Image.OPEN["TGA"][0](io.BytesIO(data), "")
    for magic, offset in _KNOWN_BUT_UNREAD.items():
        if prefix[offset : offset + len(magic)] == magic:
            raise Rejected("unsupported", f"begins with {prefix[:12]!r}")
    raise Rejected("not_an_image", f"begins with {prefix[:12]!r}")


@contextmanager
def _named_failures(name: str) -> Iterator[None]:
    """A context that turns whatever a decoder raises into a Rejected that begins with the format's name."""
    try:
        yield
    except Rejected:
        raise
    except MemoryError:
        raise Rejected("too_large", f"{name}: not enough memory") from None
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", f"{name}: {error}") from None
    except Exception as error:
        # Decoders raise what they like: struct.error, IndexError, SyntaxError, zlib.error, AttributeError, ...
        text = f"{name}: {type(error).__name__}: {error}"
        short = re.search(
            r"truncat|unexpected end|end of file|eof|incomplete|not enough (image )?data|unpack", text, re.I
        )
        known = re.search(
            r"unsupported|unknown (raw|pixel) mode|not supported|cannot handle|unrecognized image mode", text
        )
        reason = "truncated" if short else "unsupported" if known else "corrupt"
        raise Rejected(reason, text) from None


def _refuse_large(image: Image.Image, encoded: int, pixels: int) -> None:
    """Raises Rejected if decoding `image` at its current scale would take more than MEMORY_LIMIT."""
    need = encoded + _BYTES_PER_PIXEL.get(image.format or "", _OTHER_BYTES_PER_PIXEL) * image.size[0] * image.size[1]
    if image.info.get("progressive") and isinstance(image, JpegImagePlugin.JpegImageFile):
        # libjpeg keeps every coefficient (2 bytes) of a progressive picture in memory, at any scale
        need += 2 * pixels * len(image.getbands())
    if need > MEMORY_LIMIT:
        limit = f"more than {MEMORY_LIMIT // 2**20}"
        raise Rejected("too_large", f"{image.format}: {pixels} pixels would take about {need // 2**20} MiB, {limit}")


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 when there is none or it is invalid."""
    if "exif" not in image.info and image.format not in ("TIFF", "PNG", "WEBP", "MPO", "AVIF"):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1
    return value if value in range(1, 9) else 1


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _shrink(opened: _Opened, recipe: Recipe) -> Image.Image:
    """Returns the S x S centre, short edge first scaled to S (torchvision's Resize + CenterCrop arithmetic)."""
    size, image, extent = recipe.resolution, opened.image, opened.extent
    width, height = opened.width, opened.height
    widest = max(4, _RESIZED_PIXELS // size**2)
    if max(width, height) > widest * min(width, height):
        image, extent = _middle(image, widest)
        width, height = image.size
    mode, convert = normaliser(opened.image)
    factor = 1 if recipe.full_decode else max(1, min(image.size) // (size * _REDUCING_GAP))
    picture = _reduced(image, mode, convert, factor)
    box = (0.0, 0.0, extent[0] / factor, extent[1] / factor)
    if (orientation := opened.orientation) > 1:
        box = _turned_box(picture.size, box, orientation)
        picture = picture.transpose(_TRANSPOSE[orientation])
        if orientation > 4:
            width, height = height, width
    target = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    resized = picture.resize(target, RESAMPLE[recipe.resample], box)
    if target != (size, size):
        left, top = round((target[0] - size) / 2.0), round((target[1] - size) / 2.0)
        resized = resized.crop((left, top, left + size, top + size))
    if resized.mode == "RGBa":
        paper = Image.new("RGBA", resized.size, (*BACKGROUND, 255))
        paper.alpha_composite(resized.convert("RGBA"))
        return paper.convert("RGB")
    return resized


def _middle(image: Image.Image, widest: int) -> tuple[Image.Image, tuple[float, float]]:
    """Returns the middle of a very long picture, `widest` times as long as its short edge, and its extent."""
    width, height = image.size
    keep = widest * min(width, height)
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    middle = image.crop((left, top, left + min(width, keep), top + min(height, keep)))
    return middle, middle.size


def _turned_box(
    size: tuple[int, int], box: tuple[float, float, float, float], orientation: int
) -> tuple[float, float, float, float]:
    """Returns `box`, the extent of a picture of `size`, after the orientation's transposition."""
    spare = (size[0] - box[2], size[1] - box[3])
    across, down = box[2:]
    if orientation > 4:
        spare, across, down = spare[::-1], down, across
    left = spare[0] if orientation in (2, 3, 6, 7) else 0.0
    top = spare[1] if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + across, top + down


def _reduced(image: Image.Image, mode: str, convert: Converter, factor: int) -> Image.Image:
    """Returns the picture in `mode`, box-reduced by `factor`. A large one is converted in strips, so that it is never
    in memory twice."""
    if factor == 1:
        return convert(image)
    width, height = image.size
    rows = max(1, STRIP_PIXELS // (width * factor)) * factor
    if image.mode == mode == "RGB" or rows >= height:
        return convert(image).reduce(factor)
    out = Image.new(mode, (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        strip = convert(image.crop((0, top, width, min(top + rows, height))))
        out.paste(strip.reduce(factor), (0, top // factor))
    return out
