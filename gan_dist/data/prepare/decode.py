"""Any image bytes -> decoded pixels, or a reject with its reason: identified by content, refused where they would not
fit in memory, and checked for damage that the decoders pass over."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import ModuleType

import numpy as np
from PIL import Image, ImageChops, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from gan_dist.data.prepare import avif, bmp, ends, icons, jpeg, jpeg2000, png, rare, structure, tiff, webp
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.colour import profile_of

MEMORY_LIMIT = 800 * 2**20
"""Bytes that one image may take: its encoded data, its decoded pixels and the decoder's own buffers together."""

_SHORT = re.compile(r"truncat|unexpected end|end of file|eof|incomplete|not enough (image )?data|unpack", re.I)
_UNSUPPORTED = re.compile(
    r"unsupported|unimplemented"
    r"|unknown (raw|pixel|pcx) mode|unknown pixel format|not supported|cannot handle"
    r"|unrecognized image mode|reformat failed|SyntaxError: \(?\d+(, \d+)?\)?$",  # (of modes, a number alone)
    re.I,
)
_HEIC = re.compile(rb"hei[cxms]|hev[cxms]")
_LONGEST_TEXT = 2**26
"""Bytes of a PNG's text or profile. Pillow's own limit is 1 MiB."""

# Bytes a pixel that decoding takes at its peak, rounded up: measured on 4000x4000 RGB(A) pictures with Pillow 13 (PNG
# 4.1, AVIF 9.6, WEBP 16.1, JPEG2000 19.6-24.7); TIFF has 4.1, and as much again where it is a single strip.
_DECODED_AGAIN = 15
"""Bytes a pixel by which the same picture takes more if openjpeg decodes it once more (30 to 39 in all)."""
_BYTES_PER_PIXEL = {"PNG": 5, "TIFF": 8, "AVIF": 12, "WEBP": 17, "JPEG2000": 25}
_OTHER_BYTES_PER_PIXEL = 8

_QOI_END = bytes(7) + b"\1"
# No EPS (it would start ghostscript), no stubs that need a handler, no formats that accept any bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PSD", "QOI", "DDS", "PCX")
_RARE_FORMATS = ("SGI", "SUN", "DIB", "ICNS", "FITS", "XPM", "XBM")
_KNOWN_BUT_UNREAD = {b"ftyp": 4, b"JXL ": 4, b"\xff\x0a": 0, b"%!PS": 0, b"GRIB": 0, b"II*\0": 0, b"MM\0*": 0}
_KNOWN_BUT_UNREAD |= {b"P7\n": 0, b"PF\n": 0}  # PAM and PFM in colour
_KNOWN_BUT_UNREAD |= {b"BA(\0\0\0": 0, b"BA\\\0\0\0": 0, b"CI\x1a\0\0\0": 0, b"IC\x1a\0\0\0": 0}  # of OS/2


@dataclass(frozen=True)
class Decoded:
    """A decoded picture: `image`, whose `info` has the colour profile; the original's `width`, `height` and `mode`, its
    `format`; the EXIF `orientation` that is still to be applied; `extent`, the picture's size in `image` (the last row
    and column of a scaled JPEG may exceed it); `white`, the value of white in deep grey, where the file tells;
    `flags`: any special treatment."""

    image: Image.Image
    width: int
    height: int
    mode: str
    format: str
    orientation: int
    extent: tuple[float, float]
    white: float | None = None
    flags: list[str] = field(default_factory=list)


def decode(
    data: bytes, edge: int | None = None, min_side: int = 1, keep_truncated: bool = False, fast_checks: bool = False
) -> Decoded:
    """Returns the picture in `data`.

    `edge`: a JPEG is decoded at the smallest scale that leaves its short edge at least this long (None: at full scale).
    `keep_truncated`: what can be decoded of a truncated file is returned, with the flag `truncated`; `fast_checks`:
    damage that is dear to find is not looked for.

    Raises:
        Rejected: there is none, or it is damaged. Nothing else is raised, whatever the bytes are.
    """
    if not data:
        raise Rejected("empty")
    try:
        return _decode(data, edge, min_side, False, fast_checks)
    except Rejected as rejected:
        if rejected.reason != "truncated" or not keep_truncated:
            raise
    with _switched(ImageFile, "LOAD_TRUNCATED_IMAGES", True):
        decoded = _decode(structure.filled_up(data), edge, min_side, True, fast_checks)
    if not np.asarray(decoded.image).any():
        raise Rejected("truncated", f"{decoded.format}: nothing of it could be decoded")
    decoded.flags.append("truncated")
    return decoded


def _decode(data: bytes, edge: int | None, min_side: int, patient: bool, fast: bool) -> Decoded:
    data, inner = icons.as_icon(data), None
    with suppress(Exception):  # opening it will tell
        inner = icons.inner_file(data)
    if inner is not None:
        if not patient:
            png.check_inner(data)
        name = "ICNS" if data[:4] == b"icns" else "ICO"
        return replace(_decode(inner, edge, min_side, patient, fast), format=name)
    if data.startswith(png.SIGNATURE):
        data = png.checked(data, patient)
    header = _open(data)
    _without_xmp(header)
    format = header.format or "?"
    with named_failures(format, data, header):
        width, height, mode = *header.size, header.mode
        if min(width, height) < 1:
            late = format == "JPEG" and width > 0  # its height is told after its pixels, which libjpeg does not read
            raise Rejected("unsupported" if late else "corrupt", f"{width}x{height}")
        if min(width, height) < min_side:
            raise Rejected("too_small", f"{width}x{height}")
        extent: tuple[float, float] = (width, height)
        if isinstance(header, JpegImagePlugin.JpegImageFile) and edge is not None:
            scaled = header.draft(None, (edge, edge))
            extent = scaled[1][2:] if scaled else extent
        if format == "JPEG2000":
            jpeg2000.check_space(data)
        again = format == "JPEG2000" and jpeg2000.is_unusual(header, data)
        _refuse_large(header, len(data), width * height, _DECODED_AGAIN if again else 0)
        told = tiff.facts(header)
        # The pixels first: Pillow loads them to read EXIF, too, and what fails there would not be heard of.
        flags = ["oriented"] if told.turned else []
        image = _load(header, data, patient, fast, flags)
        if not patient:
            if format == "ICO":
                png.check_inner(data)
            if format == "PNG":
                png.check_rows(data, image)
            if format == "AVIF" and not fast:
                avif.check(data, width * height)
            if structure.odd(data, format, getattr(header, "tag_v2", None)) and "odd_structure" not in flags:
                flags.append("odd_structure")
        if format == "PNG" and "transparency" in image.info:
            if png.is_deep(data) and mode != "P":
                image = png.without_transparent_colour(image, data)
            elif mode == "L" and data[24] < 8:
                # Pillow scales the grey of 2 and 4 bits to 8, but not the one that is transparent
                image.info["transparency"] *= 255 // (2 ** data[24] - 1)
        orientation = _orientation(header)
        image, white = tiff.corrected(image, told)
        image, other_white = rare.corrected(image, data, format, patient, flags)
        with suppress(IndexError, struct.error):  # a profile that is cut short
            if profile := profile_of(data, format):
                image.info["icc_profile"] = profile
        white = white if other_white is None else other_white
        if format == "AVIF" and (shown := avif.clean_aperture(data, image.size)):
            image, info = image.crop(shown), image.info
            image.info = info
            width, height = image.size
            extent = (width, height)
    return Decoded(image, width, height, mode, format, orientation, extent, white, flags)


def _load(header: Image.Image, data: bytes, patient: bool, fast: bool, flags: list[str]) -> Image.Image:
    """Returns the pixels of an opened picture, with its info, and adds flags. JPEGs and WebPs are decoded by libraries
    that tell of damage."""
    if isinstance(header, JpegImagePlugin.JpegImageFile):
        image = None if patient else jpeg.decode(data, header.mode, header.size)
        if image is None:
            header.load()
            image = ImageChops.invert(header) if header.mode == "CMYK" else header
        if header.mode == "CMYK" and "adobe" in header.info:
            image = ImageChops.invert(image)  # only those with Adobe's marker are stored inverted
        image.info = header.info
        return image
    if isinstance(header, TiffImagePlugin.TiffImageFile) and not patient:
        if tiff.load(header, data, fast):
            flags.append("odd_structure")
        return header
    if header.format == "WEBP" and not patient and (still := webp.decode(data, header.mode, header.size)):
        still.info = header.info
        return still
    if bmp.is_packed(header):
        if bmp.load(header, data, patient):
            flags.append("odd_structure")
        return header
    if header.format == "SUN":
        ends.with_padding_first(header)
    rare.prepared(header, data)
    stream, watched = getattr(header, "fp", None), None
    if not patient and header.format in ("GIF", "TGA", "PCX", "SUN", "PPM", "SGI", "PSD"):
        watched = ends.streamed(header, data)
        if ends.left_over(header, data) or ends.wrong_rows(header, data):
            flags.append("odd_structure")
    try:
        header.load()
    except OSError:
        if not patient or header.format != "TIFF" or getattr(header, "tile", True):
            raise  # (libtiff fails after what it could decode)
    if (
        header.format == "QOI"
        and not patient
        and stream
        and not _QOI_END.startswith(rest := data[stream.tell() :])
        and (not rest.startswith(_QOI_END) or rest[len(_QOI_END) :].strip(b"\0\r\n\t "))  # what fills a file up
    ):
        raise Rejected("corrupt", f"QOI: {len(rest)} bytes are left when the picture is complete")
    if watched and watched.is_early:
        flags.append("odd_structure")
    return header


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
    """Returns the picture, identified by its content: the first of all formats that claim it and can open it. Not
    Image.open, which refuses a picture by its full pixel count, before a JPEG could be scaled, with a limit that is
    global to the process."""
    prefix, failure = data[:16], None
    if prefix.startswith(b"8BPS\0\2"):
        raise Rejected("unsupported", "PSD: of the kind for large pictures")
    for name, factory, accept in _plugins():
        verdict = _accepts(accept, prefix)
        if isinstance(verdict, str):  # recognised, but this Pillow has no codec for it
            failure = failure or Rejected("unsupported", f"{name}: {verdict}")
        elif verdict:
            try:
                with named_failures(name, data):
                    if name == "PNG":
                        with _switched(PngImagePlugin, "MAX_TEXT_CHUNK", _LONGEST_TEXT):
                            return factory(io.BytesIO(data), "")
                    if name in ("ICO", "ICNS"):
                        return icons.opened(data)
                    if name == "TIFF":
                        return tiff.opened(data)
                    if name == "XPM":
                        rare.check_xpm(data)
                    return factory(io.BytesIO(avif.without_exif(data) if name == "AVIF" else data), "")
            except Rejected as rejected:
                failure = rejected if failure is None or rejected.reason == "unsupported" else failure
    if data[-18:-2] == b"TRUEVISION-XFILE" or _is_old_tga(data):
        with named_failures("TGA", data):
            return Image.OPEN["TGA"][0](io.BytesIO(data), "")
    if failure:
        raise failure
    for magic, offset in _KNOWN_BUT_UNREAD.items():
        if prefix[offset : offset + len(magic)] == magic:
            raise Rejected("unsupported", f"begins with {prefix[:12]!r}")
    raise Rejected("not_an_image", f"begins with {prefix[:12]!r}")


def _is_old_tga(data: bytes) -> bool:
    """Returns whether these are the bytes of a TGA of version 1, which has no signature: whether all fields of its
    header are possible, and the file is long enough for its size."""
    if len(data) < 18:
        return False
    numbers = map(int, struct.unpack("<3B2HB4H2B", data[:18]))
    id_length, mapped, kind, _, colours, map_bits, _, _, width, height, depth, flags = numbers
    depths = {1: (8,), 2: (16, 24, 32), 3: (8, 16), 9: (8,), 10: (16, 24, 32), 11: (8, 16)}
    if mapped not in (0, 1) or depth not in depths.get(kind, ()) or flags & 0xC0 or not width * height:
        return False
    if map_bits not in ((15, 16, 24, 32) if mapped else (0, 24, 32)) or bool(mapped) != bool(colours):
        return False
    least = width * height * depth // 8 if kind < 9 else width * height // 128
    return len(data) >= 18 + id_length + mapped * colours * (map_bits // 8) + least


@contextmanager
def named_failures(name: str, data: bytes = b"", image: Image.Image | None = None) -> Iterator[None]:
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
        if _SHORT.search(text):
            reason = "truncated"
        elif _unsupported(text, data, image):
            reason = "unsupported"
        else:
            reason = "corrupt"
            with suppress(Exception):  # its account of itself may be damaged, too
                if structure.cut_short(data, name, getattr(image, "tag_v2", None)):
                    reason = "truncated"
        raise Rejected(reason, text) from None


def _unsupported(text: str, data: bytes, image: Image.Image | None) -> bool:
    """Returns whether a failure, by its text, is the lack of a decoder here and no damage."""
    if _UNSUPPORTED.search(text) or (image and tiff.codec_missing(image.info.get("compression", ""))):
        return True
    return "Invalid ftyp" in text and _HEIC.search(data[:64]) is not None


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


def _refuse_large(image: Image.Image, encoded: int, pixels: int, more: int = 0) -> None:
    """Raises Rejected if decoding `image` at its current scale would take more than MEMORY_LIMIT. `more`: bytes a pixel
    that it takes besides those of its format."""
    each = _BYTES_PER_PIXEL.get(image.format or "", _OTHER_BYTES_PER_PIXEL) + more
    need = encoded + each * image.size[0] * image.size[1]
    if image.info.get("progressive") and isinstance(image, JpegImagePlugin.JpegImageFile):
        # libjpeg keeps every coefficient (2 bytes) of a progressive picture in memory, at any scale
        need += 2 * pixels * len(image.getbands())
    if need > MEMORY_LIMIT:
        limit = f"more than {MEMORY_LIMIT // 2**20}"
        raise Rejected("too_large", f"{image.format}: {pixels} pixels would take about {need // 2**20} MiB, {limit}")


def _without_xmp(image: Image.Image) -> None:
    """Lets what XMP says of orientation count for nothing, as elsewhere: Pillow would take it where EXIF says none."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation that a loaded picture still has, 1 to 8; 1 when there is none or it is invalid.
    (Pillow turns a TIFF itself.)"""
    _without_xmp(image)
    if "exif" not in image.info and image.format not in ("PNG", "WEBP", "MPO", "AVIF"):
        return 1
    try:
        exif = image.getexif()
        if "exif" in image.info:  # (an AVIF's own properties, too); what Pillow found before may be of XMP
            exif = Image.Exif()
            exif.load(image.info["exif"])
        value = exif.get(0x0112, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1
    return value if value in range(1, 9) else 1
