"""A generator -> images: grids, single pictures, walks between latents."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from gan_dist.model.networks import Generator


def to_uint8(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] as uint8 on the CPU: -1 becomes 0 and 1 becomes 255, as the stream's inverse."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def generate(generator: torch.nn.Module, latents: Tensor, batch: int = 256) -> Tensor:
    """Returns uint8 [N, 3, S, S] for `latents` [N, Z], drawn in eval mode; the generator's mode is as before after."""
    training = generator.training
    parameter = next(generator.parameters())
    generator.eval()
    try:
        with torch.no_grad():
            wanted = latents.to(parameter.device, parameter.dtype)
            starts = range(0, len(wanted), batch)
            return torch.cat([to_uint8(generator(wanted[start : start + batch])) for start in starts])
    finally:
        generator.train(training)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Returns uint8 images [N, 3, S, S] laid out as one picture, uint8 [3, H, W]; as square as can be by default."""
    laid: Tensor = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)
    return laid


def save_png(image: Tensor, path: Path) -> None:
    """Writes `image`, uint8 [3, H, W], to `path`: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Returns [steps, Z]: latents on the great circle from `start` [Z] to `end` [Z] (White 2016, section 2.1).

    A straight line would pass nearer to the origin than N(0, 1) latents ever lie.
    """
    cosine = torch.dot(start, end) / (start.norm() * end.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    t = torch.linspace(0, 1, steps, dtype=start.dtype)[:, None]
    if angle.sin().abs() < 1e-6:
        return start + (end - start) * t
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def build_generator(state: Mapping[str, Any], device: torch.device | str = "cpu") -> Generator:
    """Returns the generator of a checkpoint's `state` in eval mode: the averaged one where there is one."""
    model = state["config"]["model"]
    generator = Generator(model["resolution"], model["latent_dim"], model["g_channels"])
    generator.load_state_dict(state.get("generator_ema") or state["generator"])
    return generator.to(device).eval()


def draw(
    generator: Generator,
    latent_dim: int,
    *,
    count: int,
    seed: int,
    out: Path,
    walk: bool = False,
    individual: Path | None = None,
) -> Tensor:
    """Returns `count` images, uint8 [count, 3, S, S], after writing their grid to `out` and, if asked, each alone.

    Latents are keyed by `seed`. With `walk` each row of the grid goes from one latent to another.
    """
    source = torch.Generator().manual_seed(seed)
    columns = math.ceil(math.sqrt(count))
    if walk:
        rows = math.ceil(count / columns)
        ends = torch.randn(2 * rows, latent_dim, generator=source)
        walks = [interpolate(ends[2 * row], ends[2 * row + 1], columns) for row in range(rows)]
        latents = torch.cat(walks)[:count]
    else:
        latents = torch.randn(count, latent_dim, generator=source)
    images = generate(generator, latents)
    save_png(grid(images, columns), out)
    if individual is not None:
        for number, image in enumerate(images):
            save_png(image, individual / f"sample-{number:05d}.png")
    return images
