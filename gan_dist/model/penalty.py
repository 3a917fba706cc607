"""The gradient penalty of a discriminator: R1 and R2 (Mescheder et al. 2018, eq. 9), exact or by finite differences.

A penalty keeps D smooth where images lie: E |grad D(x)|^2 over real images (R1), or over generated ones as well (R2).
exact: by differentiating the gradient once more, which neither a CUDA graph nor torch.compile takes here. finite:
E (D(x + sigma eps) - D(x))^2 / sigma^2 with eps ~ N(0, 1), whose limit for a small sigma is the same number in
expectation over eps (Lin et al. 2025, arXiv:2501.08316, section 3.3): a pass forth and back like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gan_dist.config.schema import PenaltyMethod


@dataclass(frozen=True)
class GradientPenalty:
    """weight * E |grad D|^2 over every `every`-th image of the global batch, for real images and, of 2 kinds, fakes."""

    weight: float = 0.0
    sigma: float = 0.1
    kinds: int = 0
    """0: no penalty; 1: on real images; 2: on real and on generated ones, each a term of its own."""
    every: int = 1
    method: PenaltyMethod = "finite"

    @property
    def differentiates_twice(self) -> bool:
        """Whether it takes gradients of gradients, which kernels of our own have none of."""
        return self.kinds > 0 and self.method == "exact"

    def places(self, lo: int) -> slice:
        """Returns which images of a share that begins at `lo` of the global batch are chosen."""
        return slice(-lo % self.every, None, self.every)

    def noisy(self, kinds: Sequence[Tensor], noise: Tensor, lo: int) -> list[Tensor]:
        """Returns the chosen images of each penalised kind with noise on them, in their dtype.

        kinds: real and fake images, [b, 3, S, S]; noise: N(0, 1), [self.kinds, n, 3, S, S].
        """
        chosen = [images[self.places(lo)] for images in kinds[: self.kinds]]
        moved = [images + self.sigma * eps for images, eps in zip(chosen, noise, strict=True)]
        return [each.to(images.dtype) for each, images in zip(moved, chosen, strict=True)]

    def __call__(self, logits: Tensor, images: Tensor, batch: int, lo: int, global_batch: int) -> Tensor:
        """Returns this rank's share of the penalty, a scalar: summed over the ranks it is a mean over what was chosen.

        logits: D's of real images, fakes, and for finite differences of `noisy`, [2 batch + ...], of the parameters'
        precision, since their differences are small; images: those that D saw, from which logits were computed.
        """
        rows = [logits[kind * batch : (kind + 1) * batch][self.places(lo)] for kind in range(self.kinds)]
        plain = torch.cat(rows)
        if self.method == "finite":
            squares = ((logits[2 * batch :] - plain) / self.sigma).square()
        else:
            (gradients,) = torch.autograd.grad(plain.sum(), images, create_graph=True)
            squares = gradients.to(logits.dtype).square()  # 0 where an image was not chosen
        return self.weight * squares.sum() / -(-global_batch // self.every)


NO_PENALTY = GradientPenalty()
