"""Generator and discriminator of DCGAN (Radford et al. 2016), for square images of 32 to 256 pixels.

Strided and fractionally strided convolutions, no pooling, no dense layer; batch norm everywhere but at G's output and
D's input. A doubling of the resolution adds a layer to each network at its small end, so the widest is resolution / 8
times the narrowest, as 512 to 64 channels at 64 pixels. Layers are named as in the thesis' own code: convt1, bn1, ...
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from gan_dist.model.batchnorm import BatchNorm
from gan_dist.model.convolution import conv_down, conv_up, from_latents, to_logits
from gan_dist.utils.errors import UserError

RESOLUTIONS = (32, 64, 128, 256)
IMAGE_CHANNELS = 3


def _widths(resolution: int, narrowest: int) -> list[int]:
    """Returns the channels of the hidden layers from the 4x4 end outwards, for example [512, 256, 128, 64]."""
    if resolution not in RESOLUTIONS:
        raise UserError(f"resolution: expected a power of two from 32 to 256, found {resolution}")
    widths = [narrowest]
    while widths[0] < narrowest * resolution // 8:
        widths.insert(0, 2 * widths[0])
    return widths


class Generator(nn.Module):
    """Latents to images: one 4x4 projection, then layers that each double the side."""

    def __init__(self, resolution: int = 64, latent_dim: int = 100, channels: int = 64) -> None:
        super().__init__()
        self.resolution = resolution
        self.latent_dim = latent_dim
        widths = _widths(resolution, channels)
        self.depth = len(widths) + 1
        self.convt1 = nn.ConvTranspose2d(latent_dim, widths[0], 4, 1, 0, bias=False)
        for i, (wide, narrow) in enumerate(zip(widths, [*widths[1:], IMAGE_CHANNELS], strict=True), start=1):
            self.add_module(f"bn{i}", BatchNorm(wide))
            self.add_module(f"convt{i + 1}", nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False))

    def forward(self, latents: Tensor) -> Tensor:
        """Returns images [B, 3, S, S] in [-1, 1] for `latents` [B, latent_dim]."""
        x = from_latents(latents, self.convt1.weight)
        for i in range(1, self.depth):
            x = getattr(self, f"bn{i}")(x, slope=0.0)
            x = conv_up(x, getattr(self, f"convt{i + 1}").weight)
        return torch.tanh(x)


class Discriminator(nn.Module):
    """Images to logits: layers that each halve the side, down to 4x4, then one number."""

    def __init__(self, resolution: int = 64, channels: int = 64, leaky_slope: float = 0.2) -> None:
        super().__init__()
        self.resolution = resolution
        self.leaky_slope = leaky_slope
        widths = _widths(resolution, channels)[::-1]
        self.depth = len(widths) + 1
        self.conv1 = nn.Conv2d(IMAGE_CHANNELS, widths[0], 4, 2, 1, bias=False)
        for i, (narrow, wide) in enumerate(itertools.pairwise(widths), start=2):
            self.add_module(f"conv{i}", nn.Conv2d(narrow, wide, 4, 2, 1, bias=False))
            self.add_module(f"bn{i}", BatchNorm(wide))
        self.add_module(f"conv{self.depth}", nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False))

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        """Returns logits [B], never probabilities, for `images` [B, 3, S, S] in [-1, 1].

        In train mode the batch is normalised in `groups` equal parts, each by its own statistics.
        """
        x = nn.functional.leaky_relu_(conv_down(images, self.conv1.weight), self.leaky_slope)
        for i in range(2, self.depth):
            x = getattr(self, f"bn{i}")(conv_down(x, getattr(self, f"conv{i}").weight), groups, self.leaky_slope)
        return to_logits(x, getattr(self, f"conv{self.depth}").weight)


def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draws convolution weights from N(0, std) and batch-norm weights from N(1, std); sets biases to 0.

    Numbers are drawn on the CPU in float32, whatever the module's device and dtype, so one seed means one network.
    """
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator).mul_(std))
            elif isinstance(part, BatchNorm):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator).mul_(std).add_(1))
                part.bias.zero_()
