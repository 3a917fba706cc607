"""A generator -> images: grids, single pictures, walks between latents, an animation of a run's own grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gan_dist.data.classes import Classes
from gan_dist.model import networks
from gan_dist.model.networks import Generator
from gan_dist.runs.checkpoint import find
from gan_dist.runs.naming import run_path
from gan_dist.runs.record import read_run
from gan_dist.sampling.standing import estimate_statistics
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import enlarge, grid, save_gif, save_png, to_uint8

BATCH = 256
"""Images that a generator draws at a time."""
MAX_FRAMES = 120
"""Frames of an animation: of a longer run every second, third, ... grid is shown, first and last always."""


def generate(generator: torch.nn.Module, latents: Tensor) -> Tensor:
    """Returns uint8 [N, 3, S, S] on the CPU for `latents` [N, Z], drawn in eval mode; the generator's mode is
    restored."""
    return torch.cat([render(generator, part).cpu() for part in torch.split(latents, BATCH)])


def render(generator: torch.nn.Module, latents: Tensor) -> Tensor:
    """Returns what `generate` does, on the generator's device: where `latents` are there too, it waits for nothing."""
    training = generator.training
    parameter = next(generator.parameters())
    generator.eval()
    try:
        with torch.no_grad():
            parts = torch.split(latents.to(parameter.device, parameter.dtype), BATCH)
            return torch.cat([to_uint8(generator(part)) for part in parts])
    finally:
        generator.train(training)


def slerp(start: Tensor, end: Tensor, t: Tensor | float) -> Tensor:
    """Returns latents [..., Z] on the great circles from `start` [..., Z] (t = 0) to `end` [..., Z] (t = 1), and beyond
    (White 2016, section 2.1).

    A straight line would pass nearer to the origin than N(0, 1) latents ever lie.
    """
    lengths = start.norm(dim=-1, keepdim=True) * end.norm(dim=-1, keepdim=True)
    cosine = (start * end).sum(-1, keepdim=True) / lengths.clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = angle.sin()
    straight = sine.abs() < 1e-6
    sine = torch.where(straight, 1.0, sine)
    rest, t = 1 - t, torch.as_tensor(t, dtype=start.dtype)
    of_start = torch.where(straight, rest, torch.sin(rest * angle) / sine)
    return of_start * start + torch.where(straight, t, torch.sin(t * angle) / sine) * end


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Returns [steps, Z]: latents on the great circle from `start` [Z] to `end` [Z]."""
    return slerp(start, end, torch.linspace(0, 1, steps, dtype=start.dtype)[:, None])


def build_generator(state: Mapping[str, Any], device: torch.device | str = "cpu") -> Generator:
    """Returns the generator of a checkpoint's `state` in eval mode: the averaged one where there is one, with the
    statistics that the run asks for."""
    generator = networks.build_generator(state["config"]["model"], Classes.of_state(state))
    generator.load_state_dict(state.get("generator_ema") or state["generator"])
    generator.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    generator.to(device).eval()
    if has_standing_statistics(state):
        estimate_statistics(generator)
    return generator


def has_standing_statistics(state: Mapping[str, Any]) -> bool:
    """Returns whether the statistics of a checkpoint's generator are measured on its averaged weights."""
    statistics = state["config"].get("train", {}).get("ema_statistics")
    return statistics == "standing" and bool(state.get("generator_ema"))


def load_generator(run: str | Path, step: int | None = None, device: torch.device | str = "cpu") -> Generator:
    """Returns a run's generator in eval mode, at `step` or its newest checkpoint; the averaged one where there is one.

    Latents [B, Z] to images [B, 3, S, S] in [-1, 1]. Raises UserError when there is no such run or step.
    """
    return build_generator(find(run_path(run), step).state, device)


def draw_latents(latent_dim: int, count: int, seed: int, walk: bool = False, truncation: float = 1.0) -> Tensor:
    """Returns latents [count, latent_dim] keyed by `seed`; with `walk`, each row of a square grid goes from one to
    another. `truncation` scales them: below 1 they lie nearer to the origin, and images nearer to the usual."""
    source = torch.Generator().manual_seed(seed)
    if not walk:
        return truncation * torch.randn(count, latent_dim, generator=source)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    ends = truncation * torch.randn(2 * rows, latent_dim, generator=source)
    return torch.cat([interpolate(ends[2 * row], ends[2 * row + 1], columns) for row in range(rows)])[:count]


def draw(
    generator: torch.nn.Module,
    latents: Tensor,
    out: Path,
    columns: int | None = None,
    *,
    individual: Path | None = None,
    size: int | None = None,
) -> Tensor:
    """Returns the images, uint8 [N, 3, S, S], of `latents` [N, Z], after writing their grid to `out`, in `columns`
    (None: about square), and, if asked, each alone into the folder `individual`.

    What is written has `size` pixels a side, a multiple of S.
    """
    images = generate(generator, latents)
    shown = enlarge(images, size)
    save_png(grid(shown, columns), out)
    if individual is not None:
        for number, image in enumerate(shown):
            save_png(image, individual / f"sample-{number:05d}.png")
    return images


def page(generator: torch.nn.Module, latents: Tensor, size: int | None = None, columns: int | None = None) -> Tensor:
    """Returns the grid of the images of `latents` [N, Z], each `size` pixels a side, in `columns` (None: about square):
    one picture, uint8 [3, H, W]."""
    return grid(enlarge(generate(generator, latents), size), columns)


def animate(run: str | Path, out: Path, *, seconds: float = 8.0, max_frames: int = MAX_FRAMES) -> int:
    """Returns the number of frames of the GIF written to `out`: the run's fixed latents, from first grid to last.

    It takes `seconds` and then rests on the last grid; a bar below shows how far training was. Made from the pictures
    in samples/, so checkpoints need not be kept. Raises UserError when there is no such run, or it has no grids yet.
    """
    samples = read_run(run).samples
    if not samples:
        raise UserError(f"{run} has no grids in samples/ yet; they come every log.samples_every steps")
    stride = math.ceil(len(samples) / max(2, max_frames))
    chosen = [*samples[:-1:stride], samples[-1]]
    frames = []
    size = None
    for step, path in chosen:
        with Image.open(path) as picture:
            frame = picture.convert("RGB")
        size = size or frame.size
        frames.append(_marked(frame.resize(size), step, chosen[-1][0]))
    save_gif(frames, out, max(0.02, seconds / len(frames)), 2.0)
    return len(frames)


def _marked(frame: Image.Image, step: int, last: int) -> Image.Image:
    """Returns `frame` above a bar whose length is how far `step` is towards `last`, and the step in figures."""
    marked = Image.new("RGB", (frame.width, frame.height + 18), "white")
    marked.paste(frame, (0, 0))
    pen = ImageDraw.Draw(marked)
    label = f"step {step:,}"
    room = max(0, frame.width - 12 - round(pen.textlength(f"step {last:,}")) - 6)
    top = frame.height + 7
    pen.rectangle((4, top, 4 + room, top + 3), fill=(222, 222, 222))
    pen.rectangle((4, top, 4 + round(room * step / max(1, last)), top + 3), fill=(40, 90, 170))
    pen.text((frame.width - 4, frame.height + 9), label, fill=(60, 60, 60), anchor="rm")
    return marked
