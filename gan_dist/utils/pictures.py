"""Tensors to pictures and picture files: grids, PNG, GIF. A file is complete or absent."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gan_dist.utils.files import write_atomically


def to_uint8(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] as uint8 on the CPU: -1 becomes 0, 1 becomes 255 (the update's inverse)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Returns uint8 images [N, 3, h, w] as one picture, uint8 [3, H, W], in `columns` (default: about square)."""
    from torchvision.utils import make_grid  # late: it doubles the time that importing torch takes

    page: Tensor = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))), padding=padding, pad_value=255)
    return page


def png_bytes(image: Tensor) -> bytes:
    """Returns `image`, uint8 [3, H, W] on the CPU, as a PNG file."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(image: Tensor, path: Path) -> None:
    """Writes `image`, uint8 [3, H, W], to `path`, atomically."""
    write_atomically(path, png_bytes(image), make_folder=True)


def to_pil(image: Tensor) -> Image.Image:
    """Returns `image`, uint8 [3, H, W], for Pillow."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def from_pil(image: Image.Image) -> Tensor:
    """Returns a Pillow image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def save_gif(frames: Sequence[Image.Image], path: Path, frame_seconds: float, last_seconds: float) -> None:
    """Writes `frames` as an endless GIF that rests on the last one; they share one palette, so that none flickers.

    Raises ValueError when there is no frame.
    """
    if not frames:
        raise ValueError("an animation needs a frame")
    # One frame from the middle and the last: early frames are grey, late ones colourful.
    strip = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    strip.paste(frames[len(frames) // 2], (0, 0))
    strip.paste(frames[-1], (0, frames[0].height))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    times = [round(1000 * frame_seconds)] * (len(indexed) - 1) + [round(1000 * last_seconds)]
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=times, loop=0, optimize=False)
    write_atomically(path, buffer.getvalue(), make_folder=True)
