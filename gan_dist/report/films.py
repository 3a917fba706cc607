"""Pictures inside a page: a run's grids as data addresses within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

QUALITIES = ((48, 1060, 84), (40, 800, 78), (32, 680, 70), (20, 560, 62), (12, 420, 50), (6, 320, 40))
"""(frames, widest side in pixels, WebP quality), tried in turn until a film fits its budget."""


@dataclass(frozen=True)
class Frame:
    """A picture in a page: the step it was drawn at, and its data address."""

    step: int
    src: str


def data_address(path: Path, widest: int, quality: int) -> str | None:
    """Returns the picture in `path` as a `data:` address of a WebP at most `widest` pixels a side; None where it cannot
    be read."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError):
        return None
    if (times := min(640, widest) // max(picture.size)) > 1:
        # Small pictures are shown larger than they are: as the pixels that they are, not as a blur.
        picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    picture.thumbnail((widest, widest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def spread(items: Sequence[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """Returns at most `count` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def film(samples: Sequence[tuple[int, Path]], budget: int) -> list[Frame]:
    """Returns the run's grids as frames of at most `budget` bytes together: fewer, smaller, coarser until they fit."""
    frames: list[Frame] = []
    for count, widest, quality in QUALITIES:
        candidates = ((step, data_address(path, widest, quality)) for step, path in spread(samples, count))
        frames, spent = [], 0
        for step, src in candidates:
            if src is not None:
                frames.append(Frame(step, src))
                spent += len(src)
            if spent > budget:
                break
        else:
            return frames
    return frames[:-1]


def still(path: Path, budget: int) -> str | None:
    """Returns one picture as good as `budget` bytes allow, or as small as can be; None where it cannot be read."""
    src = None
    for widest, quality in ((2100, 92), (1400, 88), (1060, 82), (800, 70), (480, 50)):
        src = data_address(path, widest, quality)
        if src is None or len(src) <= budget:
            break
    return src
