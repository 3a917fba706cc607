"""The random numbers of a step, keyed by (seed, position, purpose): drawn for the global batch, then sliced.

Every rank draws the whole batch's and keeps its share, so the world size does not enter, and a run that continues at a
position draws what it would have drawn. The numbers are a device's own: a CPU and a GPU draw others, and so may two
kinds of GPU where a batch has more numbers than one of them has threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLIPS, LATENTS, NOISE, AUGMENT, DROPOUT = -1, 0, -2, -3, -4
"""Purposes that are taken; the others are free for fixed latents and the like."""


def _mix32(value: int) -> int:
    """Returns a well mixed 32-bit number; distinct inputs below 2**32 stay distinct (murmur3's finaliser)."""
    value = (value ^ value >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ value >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16


def _draws(seed: int, position: int, purpose: int, device: torch.device) -> torch.Generator:
    """Returns a random stream keyed by (seed, position, purpose).

    torch's CPU generator keeps only the low 32 bits of a seed. Those of the key are a bijection of the position's:
    within a run no two of 4 billion positions share a stream. CUDA's generator keeps all 64.
    """
    low, high = position & 0xFFFFFFFF, position >> 32
    key = _mix32(_mix32(_mix32(seed & 0xFFFFFFFF) ^ seed >> 32 & 0xFFFFFFFF) ^ _mix32(purpose + 1 & 0xFFFFFFFF))
    key = _mix32(key ^ high)
    return torch.Generator(device).manual_seed(key << 32 | _mix32(low ^ key))


def draw_latents(
    seed: int,
    position: int,
    global_batch: int,
    latent_dim: int,
    lo: int,
    hi: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    purpose: int = LATENTS,
) -> Tensor:
    """Returns rows [lo, hi) of the N(0, 1) latents [global_batch, latent_dim] that stand at `position`.

    Another `purpose` is another stream.
    """
    stream = _draws(seed, position, purpose, device)
    return torch.randn(global_batch, latent_dim, generator=stream, device=device, dtype=dtype)[lo:hi]


def draw_flips(seed: int, position: int, global_batch: int, lo: int, hi: int, device: torch.device) -> Tensor:
    """Returns bool [hi - lo]: which images of the batch at `position` are mirrored, each with probability one half."""
    stream = _draws(seed, position, FLIPS, device)
    return torch.rand(global_batch, generator=stream, device=device)[lo:hi] < 0.5


def draw_noise(
    seed: int,
    position: int,
    shape: tuple[int, ...],
    every: int,
    lo: int,
    hi: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns N(0, 1) noise [kinds, n, ...] for those of the images [lo, hi) whose place in the batch at `position` is
    a multiple of `every`, out of that for the whole batch, whose `shape` would be [kinds, global_batch, ...]."""
    stream = _draws(seed, position, NOISE, device)
    kinds, global_batch, *rest = shape
    count, first, end = (-(-number // every) for number in (global_batch, lo, hi))
    return torch.randn(kinds, count, *rest, generator=stream, device=device, dtype=dtype)[:, first:end]


def draw_uniform(
    seed: int,
    position: int,
    shape: tuple[int, int, int],
    lo: int,
    hi: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns columns [lo, hi) of the numbers in [0, 1) that augment the batch at `position`, of `shape` [kinds,
    global_batch, numbers]."""
    return torch.rand(shape, generator=_draws(seed, position, AUGMENT, device), device=device, dtype=dtype)[:, lo:hi]


def draw_dropped(
    seed: int, position: int, global_batch: int, share: float, lo: int, hi: int, device: torch.device
) -> Tensor:
    """Returns bool [hi - lo]: which images of the batch at `position`, real and generated, lose their label, each with
    probability `share`."""
    stream = _draws(seed, position, DROPOUT, device)
    return torch.rand(global_batch, generator=stream, device=device)[lo:hi] < share
