"""Signs of collapse that a person can check by eye: samples that differ little, and samples that repeat."""

from __future__ import annotations

import torch
from torch import Tensor

from gan_dist.distributed.world import World

AT_ONCE = 64
"""Images in float64 at a time: few enough for a processor's cache."""


def pairwise_distance(world: World, images: Tensor) -> float:
    """Returns the distance in grey levels between two of all ranks' images; this rank's are uint8 [n, 3, S, S].

    The root mean square difference over all pairs, from the variance of each pixel: E |x - y|^2 = 2 Var x. 0 when all
    are equal. A collective.
    """
    sums = torch.zeros(3, *images.shape[1:], dtype=torch.float64)
    for part in torch.split(images, AT_ONCE):
        values = part.double()
        sums += torch.stack([values.sum(0), values.square().sum(0), torch.full_like(values[0], len(values))]).cpu()
    total, squares, count = world.all_reduce(sums.to(world.device))
    variance = squares / count - (total / count).square()
    return float((2 * variance.clamp(min=0).mean()).sqrt())


def repeated(images: Tensor, real: Tensor) -> float:
    """Returns the share of `images`, uint8 [n, 3, S, S], that are nearly the same as another of them.

    Nearly: nearer than a third of the median distance from one of `real`, as many as they, to the nearest other one.
    A generator that knows only k pictures repeats itself in any n > k (the birthday test of Arora and Zhang 2017,
    arXiv:1706.08224, without the eye), however far those are apart.
    """
    return float((_nearest_other(images) < _nearest_other(real).median() / 3).float().mean())


def _nearest_other(images: Tensor) -> Tensor:
    """Returns each image's root mean square distance to the nearest other one in grey levels, float32 [n]."""
    flat = images.flatten(1).float()
    flat = flat - flat.mean(0)  # the products below then lose less
    norms = flat.square().sum(1)
    squares = norms[:, None] - 2 * flat @ flat.T + norms
    squares.fill_diagonal_(torch.inf)
    return (squares.min(1).values.clamp(min=0) / flat.shape[1]).sqrt()
