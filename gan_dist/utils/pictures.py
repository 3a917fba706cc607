"""Tensors to pictures and picture files: grids, PNG, GIF, mp4. A file is complete or absent."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gan_dist.utils.files import write_atomically

MP4_CRF = 18
"""x264's constant quality: nobody sees a loss."""
LONGEST_NAME = 32
"""Letters of a name beside pictures."""


def to_uint8(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] as uint8, where they are: -1 becomes 0, 1 becomes 255 (the update's inverse)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Returns uint8 images [N, 3, h, w] on white, as one picture, uint8 [3, H, W], about square or in `columns`."""
    from torchvision.utils import make_grid  # late: it doubles the time that importing torch takes

    page: Tensor = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))), padding=padding, pad_value=255)
    return page


def grid_side(count: int, side: int, columns: int | None = None, padding: int = 2) -> int:
    """Returns the longer side of the picture that `grid` makes of `count` images of `side` pixels."""
    columns = columns or math.ceil(math.sqrt(count))
    return side if count == 1 else max(columns, math.ceil(count / columns)) * (side + padding) + padding


def enlarge(images: Tensor, side: int | None) -> Tensor:
    """Returns images, uint8 [N, 3, S, S], with `side` pixels a side (Lanczos, each by itself); None leaves them."""
    if side is None or side == images.shape[-1]:
        return images
    lanczos = Image.Resampling.LANCZOS
    return torch.stack([from_pil(to_pil(image).resize((side, side), lanczos)) for image in images])


def named_rows(page: Tensor, names: Sequence[str]) -> Tensor:
    """Returns `page`, uint8 [3, H, W], of equally high rows, with the name of each to its left, on white."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    short = [
        name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}" for name in names
    ]
    width = 8 + math.ceil(max(pen.textlength(name) for name in short))
    margin = Image.new("RGB", (width, page.shape[1]), "white")
    pen = ImageDraw.Draw(margin)
    for row, name in enumerate(short):
        middle = (row + 0.5) * page.shape[1] / len(names)
        pen.text((width - 4, middle), name, fill=(60, 60, 60), anchor="rm")
    return torch.cat([from_pil(margin), page], 2)


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


def save_gif(
    frames: Sequence[Image.Image],
    path: Path,
    frame_seconds: float,
    last_seconds: float,
    typical: Sequence[int] | None = None,
) -> None:
    """Writes `frames` as an endless GIF that rests on the last one; they share one palette, so that none flickers.

    typical: the frames whose colours count. Raises ValueError when there is no frame.
    """
    if not frames:
        raise ValueError("an animation needs a frame")
    # One frame from the middle and the last: early frames of a training are grey, late ones colourful.
    typical = typical or (len(frames) // 2, len(frames) - 1)
    chosen = [frames[place] for place in typical]
    strip = Image.new("RGB", (chosen[0].width, len(chosen) * chosen[0].height))
    for place, frame in enumerate(chosen):
        strip.paste(frame, (0, place * frame.height))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    times = [round(1000 * frame_seconds)] * (len(indexed) - 1) + [round(1000 * last_seconds)]
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=times, loop=0, optimize=False)
    write_atomically(path, buffer.getvalue(), make_folder=True)


def save_mp4(frames: Iterable[Image.Image], path: Path, fps: int) -> None:
    """Writes `frames`, RGB of one size with even sides, as H.264 video that any browser plays. Needs PyAV."""
    import av  # late: an extra, not everybody has it

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=fps, options={"crf": str(MP4_CRF)})
        stream.pix_fmt = "yuv420p"
        for place, frame in enumerate(frames):
            if place == 0:
                stream.width, stream.height = frame.size
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        film.mux(stream.encode())
    write_atomically(path, buffer.getvalue(), make_folder=True)
