"""What both players' images go through before D sees them, alike: DiffAugment (Zhao et al. 2020, arXiv:2006.10738).

A D that sees few images learns them by heart. It cannot where each comes changed at random; and since generated images
are changed too, and G's gradient passes through the change, G learns the images as they are (section 3). Everything
here is first-order, and deterministic on a GPU: a shift is a product with a matrix of zeros and ones, whose gradient is
another such product, where indexing would add up in any order.

How strong it need be can follow D (Karras et al. 2020, arXiv:2006.06676, section 3.1): the probability of a change
rises while D is surer of real images than a target, and falls while it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = 10
"""Uniform numbers an image: three for colour, two for translation, two for cutout, and whether each of them is done."""
SHIFT, CUT = 1 / 8, 1 / 2
"""The largest shift and the side of the square that is cut out, as shares of the image's side (Zhao's own values)."""


@dataclass(frozen=True)
class Augment:
    """Which changes there are, and how probable each of them is for an image; none by default."""

    colour: bool = False
    translation: bool = False
    cutout: bool = False
    probability: float = 1.0
    """That of each; where it is adapted, the most that it becomes."""
    target: float | None = None
    """The mean sign of D's logits of real images that is aimed at; None adapts nothing."""
    images_to_full: int = 500_000
    """Images over which an adapted probability goes from 0 to 1 at the fastest (Karras' own value)."""

    @property
    def changes(self) -> bool:
        """Whether there are any. (No __bool__: torch 2.11's compiler does not trace it.)"""
        return self.colour or self.translation or self.cutout

    @property
    def adapts(self) -> bool:
        """Whether the probability moves."""
        return self.changes and self.target is not None

    def __call__(self, images: Tensor, numbers: Tensor, probability: Tensor) -> Tensor:
        """Returns `images` [b, 3, S, S] in [-1, 1], changed, in their dtype and channels_last.

        numbers: uniform in [0, 1), [b, NUMBERS], of the dtype to compute in; probability: a scalar on the device.
        """
        does = numbers[:, 7:] < probability
        changed = images.to(numbers.dtype)
        if self.colour:
            changed = _coloured(changed, torch.where(does[:, :1], numbers[:, :3], 0.5))
        if self.translation:
            changed = _shifted(changed, torch.where(does[:, 1:2], numbers[:, 3:5], 0.5))
        if self.cutout:
            changed = _cut(changed, numbers[:, 5:7], does[:, 2])
        return changed.to(images.dtype).contiguous(memory_format=torch.channels_last)

    def adapt(self, probability: Tensor, mean_sign: Tensor, num_images: int, skipped: Tensor) -> None:
        """Moves `probability` in place, by what D's logits of so many more real images say; not where `skipped`."""
        assert self.target is not None
        move = torch.sign(mean_sign - self.target).to(probability.dtype) * (num_images / self.images_to_full)
        probability.add_(torch.where(skipped != 0, 0.0, move)).clamp_(0, self.probability)


NO_AUGMENT = Augment()


def _coloured(images: Tensor, numbers: Tensor) -> Tensor:
    """Adds -0.5 to 0.5 to brightness, takes 0 to 2 times saturation, 0.5 to 1.5 times contrast; 0.5 changes nothing."""
    brightness, saturation, contrast = (number[:, None, None, None] for number in numbers.unbind(1))
    saturation, contrast = 2 * saturation, contrast + 0.5
    # One after the other they are contrast (saturation (x - grey) + grey - mean) + mean + brightness: in few passes,
    # since neither of the first two moves the mean, nor saturation the grey.
    red, green, blue = images.unbind(1)
    grey = ((red + green + blue) / 3)[:, None]
    mean = grey.mean((2, 3), keepdim=True)
    same = grey * (contrast * (1 - saturation)) + (mean * (1 - contrast) + (brightness - 0.5))
    return torch.addcmul(same, images, contrast * saturation)


def _shifted(images: Tensor, numbers: Tensor) -> Tensor:
    """Moves images by whole pixels, up to SHIFT each way; what comes in at the border is 0. 0.5 moves nothing."""
    side = images.shape[-1]
    most = round(side * SHIFT)
    pixels = torch.arange(side, device=images.device)
    offsets = (numbers * (2 * most + 1)).floor().long() - most  # [b, 2]
    # moves[b, axis, i, j] is 1 where pixel i of the result is pixel j of the image
    moves = (pixels[None, None, None] - pixels[None, None, :, None] == offsets[:, :, None, None]).to(images.dtype)
    return moves[:, None, 0] @ images @ moves[:, None, 1].mT


def _cut(images: Tensor, numbers: Tensor, does: Tensor) -> Tensor:
    """Sets to 0 the part of each image that lies within a square of side CUT around a place anywhere in it."""
    side = images.shape[-1]
    size = round(side * CUT)
    pixels = torch.arange(side, device=images.device)
    first = (numbers * (side + 1 - size % 2)).floor().long()[:, :, None] - size // 2  # [b, 2, 1]
    within = (pixels >= first) & (pixels < first + size)  # [b, 2, S]
    cut = within[:, 0, :, None] & within[:, 1, None, :] & does[:, None, None]
    return torch.where(cut[:, None], 0.0, images)
