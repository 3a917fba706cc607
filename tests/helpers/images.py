"""Pictures of many kinds as bytes, for tests of decoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

ORANGE = (230, 120, 30)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Returns `image` as a file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def plain(color: Any, mode: str = "RGB", size: tuple[int, int] = (70, 50)) -> Image.Image:
    return Image.new(mode, size, color)


def deep(value: float, dtype: type, size: tuple[int, int] = (70, 50)) -> Image.Image:
    return Image.fromarray(np.full(size[::-1], value, dtype))


def with_alpha(mode: str) -> Image.Image:
    """Returns a picture that is orange (gray: 120) on its left half and transparent black on its right."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*(ORANGE if mode in ("RGBA", "P") else (120, 120, 120)), 255), (0, 0, 32, 64))
    return image.convert(mode) if mode != "P" else image.quantize(8)


def cmyk_jpeg(color: tuple[int, int, int], adobe: int | None) -> bytes:
    """Returns a CMYK JPEG of one colour: without Adobe's marker (None), or with its transform 0 (CMYK) or 2 (YCCK)."""
    cyan, magenta, yellow = (255 - value for value in color)
    if adobe is None:
        stored = (255 - cyan, 255 - magenta, 255 - yellow, 255)  # Pillow inverts on saving; undone here
        data = encode(plain(stored, "CMYK"), "JPEG", quality=100)
        start = data.index(b"\xff\xee")
        return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    if adobe == 0:
        return encode(plain((cyan, magenta, yellow, 0), "CMYK"), "JPEG", quality=100)
    luma = Image.new("RGB", (1, 1), (cyan, magenta, yellow)).convert("YCbCr").getpixel((0, 0))
    assert isinstance(luma, tuple)
    data = encode(plain((*(255 - value for value in luma), 0), "CMYK"), "JPEG", quality=100)
    place = data.index(b"Adobe") + 11
    return data[:place] + b"\2" + data[place + 1 :]
