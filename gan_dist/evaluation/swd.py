"""Sliced Wasserstein distance between patches of Laplacian pyramids (Karras et al. 2018, arXiv:1710.10196, section 5).

It needs no trained network: patches of 7x7 pixels from each level of the pyramid are compared as distributions, along
random directions. Each level measures structures of its size. It differs from the paper's own program in two ways: both
sets are normalised by the *real* set's mean and deviation a channel, since each set's own would hide a shift of colour
and a loss of contrast; and PATCHES are taken of an image, not 128. `published=True` with PUBLISHED_PATCHES is the
paper's own form, for comparison with published figures.

Two samples of one distribution are not at distance 0: the fewer the patches, the larger it is. So compare figures of
one protocol only, and with the distance between real images and other real images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gan_dist.distributed.world import World

COARSEST = 16
"""Side of the pyramid's smallest level in pixels."""
SIDE = 7
PATCHES = 16
PUBLISHED_PATCHES = 128
DIRECTIONS = 512
AT_ONCE = 64
"""Directions projected together: bounds the memory, and the time between two checks for a stop request."""
SLICE = 100
"""Images whose patches are cut at a time."""


def levels(resolution: int) -> tuple[int, ...]:
    """Returns the sides of the pyramid's levels, finest first: (64, 32, 16) for 64."""
    return tuple(resolution >> k for k in range((resolution // COARSEST).bit_length()))


def pyramid(images: Tensor) -> list[Tensor]:
    """Returns the Laplacian pyramid (Burt and Adelson 1983) of float [N, C, S, S], finest first, down to 16 pixels."""
    bands = []
    while images.shape[-1] > COARSEST:
        # Two products with small matrices take a quarter of a convolution's time on a CPU.
        blur = _blur(images.shape[-1]).to(images)
        down, up = blur[::2], 2 * blur[:, ::2]
        coarse = down @ images @ down.t()
        bands.append(images - up @ coarse @ up.t())
        images = coarse
    return [*bands, images]


@lru_cache
def _blur(side: int) -> Tensor:
    """Returns the binomial filter (1, 4, 6, 4, 1) / 16 along one direction, mirrored at the edges: [side, side]."""
    matrix = torch.zeros(side, side)
    for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
        for row in range(side):
            column = abs(row + offset)
            matrix[row, min(column, 2 * (side - 1) - column)] += weight / 16
    return matrix


def positions(samples: int, resolution: int, seed: int, patches: int = PATCHES) -> list[Tensor]:
    """Returns where each image's patches lie, int64 [samples, patches, 2] a level: (top, left), keyed by `seed`."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(side - SIDE + 1, (samples, patches, 2), generator=source) for side in levels(resolution)]


def descriptors(images: Tensor, where: Sequence[Tensor | None], device: torch.device | None = None) -> list[Tensor]:
    """Returns the patches of uint8 [N, 3, S, S] at `where` [N, k, 2], a level each: float32 [N * k, 147].

    They lie on `device`, by default the images'. A level whose `where` is None is left out.
    """
    device = device or images.device
    wanted = [(number, corners) for number, corners in enumerate(where) if corners is not None]
    rows = [torch.empty(corners.shape[0] * corners.shape[1], 3 * SIDE * SIDE, device=device) for _, corners in wanted]
    for start in range(0, len(images), SLICE):
        part = slice(start, min(len(images), start + SLICE))
        signed = pyramid(images[part].to(device).float() / 127.5 - 1)
        for (number, corners), out in zip(wanted, rows, strict=True):
            patches = corners.shape[1]
            out[part.start * patches : part.stop * patches] = _cut(signed[number], corners[part].to(device))
    return rows


def _cut(level: Tensor, corners: Tensor) -> Tensor:
    """Returns the patches [n * k, 147] whose top left pixels are at `corners` [n, k, 2] of [n, 3, s, s]."""
    count, channels, side, _ = level.shape
    image = torch.arange(count, device=level.device)[:, None] * (channels * side * side)
    first = (image + corners[..., 0] * side + corners[..., 1]).reshape(-1, 1)
    window = torch.arange(SIDE, device=level.device)
    plane = torch.arange(channels, device=level.device)[:, None, None] * (side * side)
    within = plane + window[:, None] * side + window
    return level.flatten().take(first + within.flatten())


def sliced_wasserstein(
    world: World,
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    seed: int,
    check: Callable[[], None] = lambda: None,
    *,
    published: bool = False,
) -> list[float]:
    """Returns 1,000 times the distance of each level; 0 for equal sets. Lower is nearer.

    real, fake: each level's descriptors, float32 [n, 147] with n alike, whole on every rank. A collective: the ranks
    share the directions, so the figure does not depend on how many they are, beyond rounding. `check` is called now and
    then, equally often on every rank, and may raise. `published` normalises each set by its own mean and deviation.
    """
    source = torch.Generator().manual_seed(seed)
    sums = []
    for theirs, ours in zip(real, fake, strict=True):
        directions = torch.randn(theirs.shape[1], DIRECTIONS, generator=source)
        directions = (directions / directions.norm(dim=0)).to(theirs.device)
        own = [_normalisation(one) for one in ((theirs, ours) if published else (theirs, theirs))]
        total = 0.0
        for block in _shares(world, directions.split(AT_ONCE, dim=1)):
            check()
            if block is not None:
                lines = []
                for one, (shift, scale) in zip((theirs, ours), own, strict=True):
                    weighted = scale[:, None] * block
                    lines.append(_sorted(weighted.t() @ one.t() - (shift @ weighted)[:, None]))
                total += (lines[0] - lines[1]).abs_().mean(1, dtype=torch.float64).sum().item()
        sums.append(total)
    reduced = world.all_reduce(torch.tensor(sums, dtype=torch.float64, device=world.device))
    return (1000 / DIRECTIONS * reduced).tolist()


def _normalisation(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (shift, scale), float32 [147] each: a channel's 49 columns share a mean and a deviation."""
    deviation, mean = torch.std_mean(rows.view(len(rows), 3, -1), (0, 2))
    return mean.repeat_interleave(SIDE * SIDE), (1 / deviation.clamp(min=1e-6)).repeat_interleave(SIDE * SIDE)


def _shares(world: World, blocks: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Yields this rank's blocks, and None in turns where others still have one: as often on every rank."""
    for start in range(0, len(blocks), world.size):
        mine = start + world.rank
        yield blocks[mine] if mine < len(blocks) else None


def _sorted(lines: Tensor) -> Tensor:
    if lines.is_cuda:
        return lines.sort(dim=1).values
    lines.numpy().sort(axis=1)  # in place, and several times as fast as torch's on a CPU
    return lines
