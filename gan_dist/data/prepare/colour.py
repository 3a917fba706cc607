"""Pictures of any colour mode and profile -> 8-bit sRGB."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.structure import jp2_colours

_SAME = 6.0
"""How far, of 255, a profile called sRGB may move colours that are taken as they are, in the mean."""
_GIF_PROFILE = b"\x21\xff\x0bICCRGBG1012"

Converter = Callable[[Image.Image], Image.Image]


def normaliser(image: Image.Image, white: float | None = None) -> tuple[str, Converter]:
    """Returns a mode that can be resampled (L, RGB, RGBa, CMYK), and the conversion of any part of `image` to it.

    `white`: the value of white in deep grey, where the file tells.
    """
    mode = image.mode
    if mode.startswith(("I", "F")):
        return "L", _tone_map(image, white)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or image.has_transparency_data:
        return "RGBa", _with_alpha
    if mode == "CMYK":
        return "CMYK", lambda part: part
    if mode == "LAB":
        return "RGB", _lab_to_rgb
    if mode in ("1", "L"):
        return "L", lambda part: part.convert("L")
    if mode in ("RGB", "P", "YCbCr", "HSV", "RGBX"):
        return "RGB", lambda part: part if part.mode == "RGB" else part.convert("RGB")
    raise Rejected("unsupported", f"mode {mode}")


def _with_alpha(part: Image.Image) -> Image.Image:
    """Returns a picture with transparency as RGBa."""
    if part.mode == "La":  # of which Pillow makes nothing else
        part = part.convert("LA")
    return part if part.mode == "RGBa" else part.convert("RGBA").convert("RGBa")


def _tone_map(image: Image.Image, white: float | None) -> Callable[[Image.Image], Image.Image]:
    """Returns the conversion of deep grey to 8 bits.

    White is 65535 for 16-bit data, unless `white` says otherwise. Integers and floats of 32 bits have none: it is the
    smallest of 1 (floats), 255 and 65535 that is not below the maximum, or the maximum.
    """
    if white is None and image.mode.startswith("I;16"):
        white = 65535.0
    elif white is None:
        top = max(_maximum(strip) for strip in _strips(image))
        steps = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((step for step in steps if top <= step), top)

    def convert(part: Image.Image) -> Image.Image:
        values = np.asarray(part).astype(np.float32)
        scaled = np.nan_to_num(values, posinf=white, neginf=0.0) * np.float32(255.0 / white)
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))

    return convert


def _strips(image: Image.Image, pixels: int = 2**20) -> Iterator[NDArray[np.float32]]:
    width, height = image.size
    rows = max(1, pixels // width)
    for top in range(0, height, rows):
        yield np.asarray(image.crop((0, top, width, min(top + rows, height)))).astype(np.float32)


def _maximum(values: NDArray[np.float32]) -> float:
    """Returns the largest finite value, at least 0."""
    return float(np.max(values, initial=0.0, where=np.isfinite(values)))


def _lab_to_rgb(part: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(part, _transform(None, "LAB"))
    assert converted is not None
    return converted


def profile_of(data: bytes, format: str) -> bytes | None:
    """Returns the colour profile of a file of a format in which Pillow looks for none."""
    match format:
        case "JPEG2000":
            colours = jp2_colours(data)
            return colours[3:] if colours[:1] in (b"\2", b"\3") else None
        case "BMP" if data[70:74] == b"DEBM" and int.from_bytes(data[14:18], "little") >= 124:
            start, size = struct.unpack("<2I", data[126:134])
            return data[14 + start : 14 + start + size]
        case "GIF" if (place := data.find(_GIF_PROFILE)) >= 0:
            place, pieces = place + len(_GIF_PROFILE), []
            while size := data[place]:
                pieces.append(data[place + 1 : place + 1 + size])
                place += 1 + size
            return b"".join(pieces)
    return None


def to_srgb(picture: Image.Image, image: Image.Image, flags: list[str]) -> Image.Image:
    """Returns `picture` in sRGB. Colours are converted after resampling: S x S pixels instead of millions."""
    profile = image.info.get("icc_profile")
    if profile and image.mode != "LAB":
        try:
            transform = _transform(profile, picture.mode)
            if transform is not None:
                flags.append("profile")
                converted = ImageCms.applyTransform(picture, transform)
                assert converted is not None
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            flags.append("profile_ignored")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> Any:
    """Returns the transform from a profile (None: CIE Lab) to sRGB, or None when the profile is sRGB already."""
    srgb = ImageCms.createProfile("sRGB")
    if profile is None:
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, "LAB", "RGB")
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(opened, srgb, mode, "RGB")
    if mode == "RGB" and "sRGB" in (opened.profile.profile_description or ""):
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
        if np.abs(converted.astype(int) - colours).mean() < _SAME:  # there is a linear sRGB, too
            return None
    return transform
