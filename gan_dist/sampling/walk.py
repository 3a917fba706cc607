"""A walk through latents as a film: a smooth closed loop, as mp4 or GIF."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from gan_dist.sampling.generate import slerp
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import save_gif, save_mp4, to_pil

SECONDS_APART = 2.0
"""From one anchor to the next; a loop has at least MIN_ANCHORS."""
MIN_ANCHORS, MIN_FRAMES = 3, 3
MAX_FPS = {".mp4": 60, ".gif": 50}
MAX_SIDE = {".mp4": 4096, ".gif": 2048}
"""Pixels a side of what players play; a GIF's frames are all in memory at once."""
MAX_SECONDS = 600.0
PALETTE_FRAMES = 8
"""A GIF's colours are those of so many of its frames."""


def check_walk(path: Path, seconds: float, fps: int, side: int) -> None:
    """Raises UserError unless a walk of so many seconds and frames a second, with pages of `side` pixels, can be
    written to `path`."""
    kind = path.suffix.lower()
    if kind not in MAX_FPS:
        raise UserError(f"--walk: expected a file name ending in .mp4 or .gif, found {path.name}")
    if not 1 <= fps <= MAX_FPS[kind]:
        raise UserError(f"--fps: expected 1 to {MAX_FPS[kind]} frames a second in a {kind} file, found {fps}")
    shortest = MIN_FRAMES / fps
    if not shortest <= seconds <= MAX_SECONDS:
        raise UserError(f"--seconds: expected {shortest:.2g} (3 frames) to {MAX_SECONDS:g}, found {seconds:g}")
    if side > MAX_SIDE[kind]:
        raise UserError(
            f"--walk: a {kind} film is at most {MAX_SIDE[kind]} pixels wide and high, this one would have {side}; "
            "lower --count or --size"
        )
    if kind == ".mp4" and importlib.util.find_spec("av") is None:
        raise UserError(
            "--walk: mp4 files are written by PyAV, which is not installed; run pip install av, or name a .gif file"
        )


def loop(anchors: Tensor, frames: int) -> Tensor:
    """Returns latents [frames, ...] on a closed curve through `anchors` [K, ..., Z], in their dtype; the first frame is
    the first anchor, and the last one comes a frame before it again.

    It is Catmull and Rom's spline as repeated interpolation (Barry and Goldman 1988), along great circles instead of
    straight lines: neither direction nor speed jumps at an anchor, and lengths stay those of N(0, 1).
    """
    points, count = anchors.double(), len(anchors)
    latents = []
    for frame in range(frames):
        place, part = divmod(frame * count, frames)
        t = part / frames
        p = [points[(place + k) % count] for k in (-1, 0, 1, 2)]
        first = [slerp(p[k], p[k + 1], t + 1 - k) for k in range(3)]
        second = [slerp(first[k], first[k + 1], (t + 1 - k) / 2) for k in range(2)]
        latents.append(slerp(second[0], second[1], t))
    return torch.stack(latents).to(anchors.dtype)


class Walk(Sequence[Image.Image]):
    """The frames of a walk, each drawn when it is asked for: one may be a page of many megabytes."""

    def __init__(
        self, latents: Tensor, page: Callable[[Tensor], Tensor], progress: Callable[[str, int, int], None]
    ) -> None:
        """latents: [frames, N, Z]; page: returns the page, uint8 [3, H, W], of latents [N, Z]."""
        self._latents, self._page, self._progress, self._drawn = latents, page, progress, 0

    def __len__(self) -> int:
        return len(self._latents)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        frame = to_pil(self._page(self._latents[index]))
        self._drawn += 1
        self._progress("drawing", min(self._drawn, len(self)), len(self))
        return frame


def write_walk(
    page: Callable[[Tensor], Tensor],
    first: Tensor,
    path: Path,
    *,
    seed: int,
    seconds: float,
    fps: int,
    truncation: float = 1.0,
    progress: Callable[[str, int, int], None] = lambda verb, done, total: None,
) -> str:
    """Returns a line on the film written to `path`, which `check_walk` has passed: a loop from the latents `first`
    [N, Z], keyed by `seed`, others by `truncation` times N(0, 1).

    page: returns the page, uint8 [3, H, W] with even sides, of latents [N, Z].
    """
    of_gif = path.suffix.lower() == ".gif"
    exact_fps = 100 / round(100 / fps) if of_gif else fps  # a GIF keeps time in hundredths of a second
    count = max(MIN_FRAMES, round(seconds * exact_fps))
    source = torch.Generator().manual_seed(seed)
    torch.randn(first.shape, generator=source)  # those of `first`
    number = max(MIN_ANCHORS, round(seconds / SECONDS_APART)) - 1
    others = [truncation * torch.randn(first.shape, generator=source) for _ in range(number)]
    frames = Walk(loop(torch.stack([first, *others]), count), page, progress)
    if of_gif:
        typical = [place * count // PALETTE_FRAMES for place in range(PALETTE_FRAMES)]
        save_gif(frames, path, 1 / exact_fps, 1 / exact_fps, typical)
    else:
        save_mp4(frames, path, fps)
    return f"a walk of {count} frames, {exact_fps:.3g} a second, in {path}"
