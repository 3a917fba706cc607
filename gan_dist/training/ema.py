"""The averaged generator: an exponential moving average over the images of training, which draws steadier pictures."""

from __future__ import annotations

import torch
from torch import nn

RAMP = 0.05
"""Early on the half-life is this share of the images seen so far (Karras et al. 2020, arXiv:2006.06676): the average
forgets the first, meaningless weights."""


class Average:
    """Follows `network` with `twin`, an equal network of its own: parameters and batch norm's running statistics.

    After `half_life_images` more images, half of the average is of newer weights, whatever the batch and however many
    ranks share it. Equal weights on all ranks give equal averages: no collective is needed.
    """

    def __init__(
        self, network: nn.Module, twin: nn.Module, half_life_images: int, images_per_step: int, *, ramp: bool = True
    ) -> None:
        parameter = next(network.parameters())
        self.network = twin.to(device=parameter.device, dtype=parameter.dtype).to(memory_format=torch.channels_last)
        self.network.eval().requires_grad_(False)
        self.network.load_state_dict(network.state_dict())
        self._half_life, self._images_per_step, self._ramp = float(half_life_images), images_per_step, ramp
        theirs, mine = network.state_dict(), self.network.state_dict()
        followed = [name for name in mine if mine[name].is_floating_point()]
        self._mine, self._theirs = [mine[name] for name in followed], [theirs[name] for name in followed]
        self._counts = [(mine[name], theirs[name]) for name in mine if name not in followed]

    @torch.no_grad()
    def update(self, images_seen: int) -> None:
        """Takes in the weights after a step; `images_seen` counts that step's images. Waits for nothing."""
        half_life = min(self._half_life, RAMP * images_seen) if self._ramp else self._half_life
        weight = 1 - 0.5 ** (self._images_per_step / max(half_life, 1e-9))
        torch._foreach_lerp_(self._mine, self._theirs, weight)
        for mine, theirs in self._counts:
            mine.copy_(theirs)
