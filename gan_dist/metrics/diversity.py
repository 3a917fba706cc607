"""A sign of collapse that a person can check by eye."""

from __future__ import annotations

import torch
from torch import Tensor

from gan_dist.distributed import World

AT_ONCE = 64
"""Images in float64 at a time: few enough for a processor's cache."""


def pairwise_distance(world: World, images: Tensor) -> float:
    """Returns how far two of all ranks' images, this one's being uint8 [n, 3, S, S], are apart in grey levels.

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
