"""The numbers that weights begin with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gan_dist.config.schema import Init
from gan_dist.model.batchnorm import BatchNorm
from gan_dist.model.networks import Discriminator, Generator

SPECTRAL_STEPS = 15
"""Power iterations before the first step, as torch's own; each pass in train mode adds one."""


def initialise(module: nn.Module, std: float, generator: torch.Generator, init: Init = "dcgan") -> None:
    """Draws weights as `model.init` says; biases become 0.

    dcgan: convolutions N(0, std^2), batch norm N(1, std^2). he: convolutions N(0, gain^2 / n), n being how many numbers
    a pixel of the result sums up and gain^2 = 2 / (1 + slope^2), or 1 where no rectifier follows (He et al. 2015, eq.
    15); batch norm 1. G's vectors of classes are N(0, 1), D's are 0: its first judgements are the unconditional game's.
    Numbers are drawn on the CPU in float32, whatever the module's device and dtype: one seed means
    one network.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                deviation = std
                if init == "he":
                    slope = getattr(module, "leaky_slope", 0.0)
                    deviation = _he_deviation(part, 1.0 if part is layers[-1] else 2 / (1 + slope**2))
                spectral: Any = getattr(part, "parametrizations", None)
                weight = spectral.weight.original if spectral else part.weight
                weight.copy_(torch.randn(weight.shape, generator=generator).mul_(deviation))
                if part.bias is not None:
                    part.bias.zero_()
                if spectral:
                    _start_power_iteration(spectral.weight[0], weight.flatten(1), generator)
            elif isinstance(part, BatchNorm):
                noise = torch.randn(part.weight.shape, generator=generator)
                part.weight.copy_(noise.mul_(std).add_(1) if init == "dcgan" else torch.ones_like(part.weight))
                part.bias.zero_()
        if isinstance(module, Generator) and module.num_classes:
            module.class_table.copy_(torch.randn(module.class_table.shape, generator=generator))
        elif isinstance(module, Discriminator) and module.num_classes:
            module.class_table.zero_()


def _he_deviation(layer: nn.Conv2d | nn.ConvTranspose2d, squared_gain: float) -> float:
    taps = math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d) and layer.kernel_size == (4, 4):
        taps //= math.prod(layer.stride)  # of a transposed convolution's taps, each pixel meets every stride-th
    return math.sqrt(squared_gain / (layer.in_channels * taps))


def _start_power_iteration(norm: Any, matrix: Tensor, generator: torch.Generator) -> None:
    """Brings spectral norm's vectors near the first singular ones of `matrix`, from numbers of `generator`."""
    norm._u.copy_(torch.randn(norm._u.shape, generator=generator))
    for _ in range(SPECTRAL_STEPS):
        norm._v.copy_(nn.functional.normalize(norm._u @ matrix, dim=0))
        norm._u.copy_(nn.functional.normalize(matrix @ norm._v, dim=0))
