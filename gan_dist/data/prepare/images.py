"""Any image bytes -> one square uint8 RGB picture, or a reject with its reason.

The steps: decode (decode.py; JPEG at a reduced scale), orient by EXIF, normalise the mode, shrink
the short edge to S, crop the centre, convert colours to sRGB, composite transparency.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gan_dist.data.prepare.colour import Converter, normaliser, to_srgb
from gan_dist.data.prepare.decode import Decoded, decode, named_failures

RESAMPLE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
BACKGROUND = (255, 255, 255)
"""Transparency is composited on white, like the paper of a drawing."""

STRIP_PIXELS = 2**22
"""Larger pictures are converted in strips, so that they are never in memory twice."""

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
    box reduction (bilinear pixels then equal torchvision's Resize + CenterCrop); `fast_checks`: do not look for damage
    that is dear to find."""

    resolution: int = 64
    resample: str = "lanczos"
    min_side: int = 1
    keep_truncated: bool = False
    full_decode: bool = False
    fast_checks: bool = False


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
    began = perf_counter()
    edge = None if recipe.full_decode else _SCALED_EDGE * recipe.resolution
    opened = decode(data, edge, recipe.min_side, recipe.keep_truncated, recipe.fast_checks)
    decoded = perf_counter()
    flags = opened.flags
    with opened.image, named_failures(opened.format):
        picture = _shrink(opened, recipe)
        if picture.mode == "RGBA":  # alpha is of light, not of a profile's values
            colours = to_srgb(picture.convert("RGB"), opened.image, flags)
            colours.putalpha(picture.getchannel("A"))
            paper = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
            paper.alpha_composite(colours)
            picture = paper.convert("RGB")
        else:
            picture = to_srgb(picture, opened.image, flags)
        pixels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
    if opened.orientation > 1:
        flags.append("oriented")
    if min(opened.width, opened.height) < recipe.resolution:
        flags.append("enlarged")
    shown = (opened.height, opened.width) if opened.orientation > 4 else (opened.width, opened.height)
    seconds = {"decode": decoded - began, "resize": perf_counter() - decoded}
    return Square(pixels, *shown, opened.mode, opened.format, flags, seconds)


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _shrink(opened: Decoded, recipe: Recipe) -> Image.Image:
    """Returns the S x S centre, short edge first scaled to S (torchvision's Resize + CenterCrop arithmetic)."""
    size, image, extent = recipe.resolution, opened.image, opened.extent
    width, height = opened.width, opened.height
    widest = max(4, _RESIZED_PIXELS // size**2)
    if max(width, height) > widest * min(width, height):
        image, extent = _middle(image, widest)
        width, height = image.size
    mode, convert = normaliser(opened.image, opened.white)
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
    return resized.convert("RGBA") if resized.mode == "RGBa" else resized


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
