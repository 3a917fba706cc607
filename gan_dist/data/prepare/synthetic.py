"""Procedural paintings with structure worth learning: landscapes, portraits, colour fields, all under a brush.

The demo trains on them and the tests read them. Painting number i of a seed is always the same picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Canvas = NDArray[np.float32]
"""float32 [height, width, 3] in 0..255."""

PALETTES = (
    # sky or ground, its lower tone, earth, dark, accent
    ((236, 196, 130), (214, 120, 74), (112, 84, 58), (44, 36, 48), (250, 232, 180)),  # evening
    ((150, 190, 214), (206, 222, 220), (92, 128, 84), (38, 58, 60), (246, 240, 214)),  # morning
    ((58, 84, 142), (120, 142, 186), (40, 66, 88), (18, 24, 52), (240, 206, 92)),  # night
    ((222, 206, 178), (190, 160, 124), (138, 74, 56), (60, 34, 34), (204, 74, 52)),  # earth and madder
)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float, stretch: float = 1.0) -> Canvas:
    """Returns smooth noise float32 [height, width] in about -1..1; features are `cell` pixels, wider by `stretch`."""
    small = rng.uniform(-1, 1, (max(2, round(height / cell)), max(2, round(width / (cell * stretch))))).astype(
        np.float32
    )
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def _blend(canvas: Canvas, colour: Canvas | tuple[int, int, int], mask: Canvas) -> Canvas:
    """Returns `canvas` with `colour` laid over it where `mask` [height, width] in 0..1 says."""
    over = np.asarray(colour, dtype=np.float32)
    return canvas + (over - canvas) * np.clip(mask, 0, 1)[..., None]


def _gradient(height: int, width: int, top: Canvas, bottom: Canvas) -> Canvas:
    t = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * t, (height, width, 3)).astype(np.float32)


def _landscape(rng: np.random.Generator, height: int, width: int, colours: Canvas) -> Canvas:
    """A sky with a sun, a ridge, and ground in bands below a horizon."""
    sky, haze, earth, dark, light = colours
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    canvas = _gradient(height, width, sky, haze)
    sun_x, sun_y, radius = rng.uniform(0.25, 0.75), rng.uniform(0.15, 0.32), rng.uniform(0.06, 0.11)
    distance = np.hypot((x - sun_x) * width / height, y - sun_y)
    canvas = _blend(canvas, light, 0.55 * np.exp(-((distance / (2.6 * radius)) ** 2)))
    canvas = _blend(canvas, light, (radius - distance) * 60)
    horizon = rng.uniform(0.52, 0.64)
    ridge = horizon - 0.13 * (0.5 + 0.5 * _noise(rng, 1, width, width / 4)[0])
    canvas = _blend(canvas, 0.55 * haze + 0.45 * dark, (y - ridge[None, :]) * 50)
    ground = _gradient(height, width, 0.7 * earth + 0.3 * haze, 0.45 * earth + 0.55 * dark)
    ground = ground + 14 * _noise(rng, height, width, height / 14, 5)[..., None]
    return _blend(canvas, ground, (y - horizon) * 60)


def _portrait(rng: np.random.Generator, height: int, width: int, colours: Canvas) -> Canvas:
    """A head and shoulders before a dim wall, lit from one side."""
    _, warm, earth, dark, _ = colours
    skin = np.array([226, 178, 140], np.float32) + rng.uniform(-16, 16)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x - width / 2) / min(height, width), (y - height / 2) / min(height, width)
    x = x - rng.uniform(-0.05, 0.05)
    canvas = _gradient(height, width, 0.6 * dark + 0.4 * earth, dark) + 8 * _noise(rng, height, width, 9)[..., None]
    canvas = _blend(canvas, warm, 0.35 * np.exp(-(((x + 0.25) / 0.5) ** 2) - ((y + 0.2) / 0.6) ** 2))
    shoulders = 1 - (x / 0.42) ** 2 - ((y - 0.52) / 0.34) ** 2
    canvas = _blend(canvas, 0.5 * earth + 0.5 * dark, shoulders * 9)
    canvas = _blend(canvas, 0.8 * skin, (0.09 - np.abs(x)) * 40 * ((y > 0) & (y < 0.24)))
    light = 0.72 + 0.5 * (-x / 0.2)
    head = 1 - (x / 0.185) ** 2 - ((y + 0.06) / 0.25) ** 2
    hair = 1 - (x / 0.22) ** 2 - ((y + 0.1) / 0.27) ** 2
    canvas = _blend(canvas, 0.8 * dark, hair * 10)
    canvas = _blend(
        canvas, skin * np.clip(light, 0.5, 1.08)[..., None], (head * 10) * (y > -0.22 + 0.05 * np.cos(14 * x))
    )
    for side in (-1, 1):
        eye = 1 - ((x - 0.075 * side) / 0.034) ** 2 - ((y + 0.07) / 0.018) ** 2
        canvas = _blend(canvas, 0.6 * dark, eye * 4)
    return _blend(canvas, (150, 70, 66), (1 - (x / 0.055) ** 2 - ((y - 0.075) / 0.014) ** 2) * 4)


def _colour_field(rng: np.random.Generator, height: int, width: int, colours: Canvas) -> Canvas:
    """Two or three soft-edged fields, one above another, on a ground."""
    order = rng.permutation(5)
    canvas = np.broadcast_to(0.75 * colours[order[0]], (height, width, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    wobble = 0.012 * _noise(rng, height, width, height / 5)
    cuts = [0.07, *((0.5,) if rng.random() < 0.5 else (0.38, 0.7)), 0.93]
    for k, (top, bottom) in enumerate(itertools.pairwise(cuts)):
        edge = np.minimum(np.minimum(y - top - 0.025, bottom - 0.025 - y), np.minimum(x - 0.1, 0.9 - x)) + wobble
        canvas = _blend(canvas, colours[order[k + 1]], edge * 45)
    return canvas


def _brush(rng: np.random.Generator, canvas: Canvas) -> Canvas:
    """Returns the canvas with the grain of a brush and the weave below it."""
    height, width, _ = canvas.shape
    strokes = _noise(rng, height, width, 2.2, 4.5) if rng.random() < 0.6 else _noise(rng, height, width, 9, 0.24)
    weave = rng.normal(0, 1, (height, width)).astype(np.float32)
    return canvas * (1 + 0.07 * strokes + 0.02 * weave)[..., None]


_KINDS: tuple[Callable[[np.random.Generator, int, int, Canvas], Canvas], ...] = (_landscape, _portrait, _colour_field)


def paint(index: int, seed: int = 0, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Returns painting number `index` of `seed`: an RGB image of `size` (width, height) in pixels."""
    rng = np.random.default_rng((seed, index))
    palette = np.array(PALETTES[int(rng.integers(len(PALETTES)))], np.float32) + rng.normal(0, 7, (5, 3)).astype(
        np.float32
    )
    kind = _KINDS[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]
    width, height = size
    canvas = _brush(rng, kind(rng, height, width, palette))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.4))


SIZES = ((96, 96), (128, 96), (96, 120), (160, 112), (72, 88))
FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RGB", "jpg", {"quality": 92}),
    ("RGB", "jpg", {"quality": 85}),
    ("RGB", "png", {"compress_level": 1}),
    ("RGB", "jpg", {"quality": 92}),
    ("RGBA", "png", {"compress_level": 1}),
    ("RGB", "webp", {"quality": 90}),
    ("CMYK", "jpg", {"quality": 92}),
    ("RGB", "bmp", {}),
)


def _break(path: Path, number: int) -> None:
    """Spoils a painting's file in one of four ways that real collections have."""
    content = path.read_bytes()
    damaged = (content[: len(content) // 3], b"", b"<html><title>404 Not Found</title></html>", content[:16])
    path.write_bytes(damaged[number % len(damaged)])


def paint_folder(folder: str | Path, count: int, seed: int = 0, broken: int = 0) -> None:
    """Paints `count` pictures into `folder`, in several sizes, formats and modes; the last `broken` are spoilt.

    Files are `painting-00001.jpg` and the like; the same call makes the same files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        mode, suffix, options = FORMATS[index % len(FORMATS)] if index < count - broken else FORMATS[0]
        image = paint(index, seed, SIZES[index % len(SIZES)])
        path = folder / f"painting-{index:05d}.{suffix}"
        image.convert(mode).save(path, **options)
        if index >= count - broken:
            _break(path, index)
