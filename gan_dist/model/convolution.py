"""DCGAN's convolutions of 4x4 pixels, each as the arithmetic that is fastest for its shape; the result is torch's.

At their small end the networks leave the shapes that convolution kernels are made for. A 1x1 map that becomes 4x4, and
a 4x4 map that becomes one number, are matrix products. And the weight gradient between 4x4 and 8x8 is a short sum for
each image over very many weights, which on a CPU is three times faster as one product over all images (2 cores with
AMX, bf16, batch 128: 68 ms against 199 in D, 23 against 84 in G; from 16x16 pixels on, torch's own kernel wins).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL, STRIDE, PADDING = 4, 2, 1
SMALL = 8
"""Side of the larger map, in pixels, up to which a CPU takes the weight gradient as a matrix product."""


def project(latents: Tensor, weight: Tensor) -> Tensor:
    """Returns maps [B, C, 4, 4] in channels_last: conv_transpose2d of `latents` [B, Z] as 1x1 maps.

    weight: [Z, C, 4, 4].
    """
    rows = latents @ weight.permute(0, 2, 3, 1).flatten(1)
    return rows.view(len(rows), KERNEL, KERNEL, -1).permute(0, 3, 1, 2)


def collapse(maps: Tensor, weight: Tensor) -> Tensor:
    """Returns numbers [B]: conv2d of `maps` [B, C, 4, 4] with one filter as large as they. weight: [1, C, 4, 4]."""
    return maps.permute(0, 2, 3, 1).flatten(1) @ weight.permute(0, 2, 3, 1).flatten()


def halve(maps: Tensor, weight: Tensor) -> Tensor:
    """Returns maps [B, D, S / 2, S / 2] for `maps` [B, C, S, S]: conv2d, stride 2, padding 1. weight: [D, C, 4, 4]."""
    if maps.device.type == "cpu" and maps.shape[-1] <= SMALL:
        return _apply(maps, weight, False)
    return F.conv2d(maps, weight, None, STRIDE, PADDING)


def double(maps: Tensor, weight: Tensor) -> Tensor:
    """Returns maps [B, D, 2 S, 2 S] for `maps` [B, C, S, S]: conv_transpose2d, stride 2, padding 1.

    weight: [C, D, 4, 4].
    """
    if maps.device.type == "cpu" and STRIDE * maps.shape[-1] <= SMALL:
        return _apply(maps, weight, True)
    return F.conv_transpose2d(maps, weight, None, STRIDE, PADDING)


def _apply(maps: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    # Autocast does not reach into a Function: maps come in the dtype that it chose for the layer before.
    out: Tensor = _ProductGradient.apply(maps, weight.to(maps.dtype), transposed)
    return out


class _ProductGradient(torch.autograd.Function):
    """A strided convolution, or its transpose, whose weight gradient is one matrix product over the whole batch."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.transposed = transposed
        convolve = F.conv_transpose2d if transposed else F.conv2d
        return convolve(maps, weight, None, STRIDE, PADDING)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        maps, weight = ctx.saved_tensors
        by_maps = by_weight = None
        if ctx.needs_input_grad[0]:  # the transpose of each is the other
            convolve = F.conv2d if ctx.transposed else F.conv_transpose2d
            by_maps = convolve(dy, weight, None, STRIDE, PADDING)
        if ctx.needs_input_grad[1]:
            by_weight = _correlate(maps, dy) if ctx.transposed else _correlate(dy, maps)
        return by_maps, by_weight, None


def _correlate(small: Tensor, large: Tensor) -> Tensor:
    """Returns [D, C, 4, 4]: each pixel of `small` [B, D, S, S] times the 4x4 patch of `large` [B, C, 2 S, 2 S] that it
    stands for, summed over pixels and batch. In memory a patch is 4 runs of 4 pixels with all their channels."""
    padded = F.pad(large.permute(0, 2, 3, 1), (0, 0, *[PADDING] * 4)).contiguous()
    batch, side, _, channels = padded.shape
    image, row, pixel, _ = padded.stride()
    steps = (side - KERNEL) // STRIDE + 1
    shape, stride = (batch, steps, steps, KERNEL, KERNEL * channels), (image, STRIDE * row, STRIDE * pixel, row, 1)
    patches = padded.as_strided(shape, stride).reshape(batch * steps * steps, -1)
    pixels = small.permute(0, 2, 3, 1).reshape(len(patches), -1)
    return (pixels.T @ patches).view(-1, KERNEL, KERNEL, channels).permute(0, 3, 1, 2)
