"""DCGAN's convolutions of 4x4 pixels, each as the arithmetic that is fastest for its shape; the result is torch's.

At their small end the networks leave the shapes that convolution kernels are made for. A 1x1 map that becomes 4x4, and
a 4x4 map that becomes one number, are matrix products. Between 4x4 and 8x8, what sums over patches is one product over
the whole batch as well, on a CPU (2 cores with AMX, bf16, batch 128: D's weight gradient there takes 20 ms instead of
77, its forward pass 13 instead of 24). From 16x16 pixels on, torch's own kernels win.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL, STRIDE, PADDING = 4, 2, 1
SMALL = 8
"""Side of the larger map, in pixels, up to which a CPU sums over patches by a matrix product."""


def from_latents(latents: Tensor, weight: Tensor) -> Tensor:
    """Returns maps [B, C, 4, 4] in channels_last: conv_transpose2d of `latents` [B, Z] as 1x1 maps.

    weight: [Z, C, 4, 4].
    """
    return (latents @ _rows(weight)).view(len(latents), KERNEL, KERNEL, -1).permute(0, 3, 1, 2)


def to_logits(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns numbers [B]: conv2d of `maps` [B, C, 4, 4] with one filter as large as they.

    weight: [1, C, 4, 4]; bias: [1] or None.
    """
    logits = maps.permute(0, 2, 3, 1).flatten(1) @ weight.permute(0, 2, 3, 1).flatten()
    return logits if bias is None else logits + bias


def to_numbers(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns numbers [B, D]: conv2d of `maps` [B, C, 4, 4] with D filters as large as they.

    weight: [D, C, 4, 4]; bias: [D] or None.
    """
    numbers = maps.permute(0, 2, 3, 1).flatten(1) @ _rows(weight).T
    return numbers if bias is None else numbers + bias


def conv_down(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns maps [B, D, S / 2, S / 2] for `maps` [B, C, S, S]: conv2d, stride 2, padding 1.

    weight: [D, C, 4, 4]; bias: [D] or None.
    """
    if maps.device.type == "cpu" and maps.shape[-1] <= SMALL:
        out = _apply(maps, weight, False)
        return out if bias is None else out + bias.to(out.dtype)[:, None, None]
    return F.conv2d(maps, weight, bias, STRIDE, PADDING)


def conv_up(maps: Tensor, weight: Tensor) -> Tensor:
    """Returns maps [B, D, 2 S, 2 S] for `maps` [B, C, S, S]: conv_transpose2d, stride 2, padding 1.

    weight: [C, D, 4, 4].
    """
    if maps.device.type == "cpu" and STRIDE * maps.shape[-1] <= SMALL:
        return _apply(maps, weight, True)
    return F.conv_transpose2d(maps, weight, None, STRIDE, PADDING)


def fold(weight: Tensor) -> Tensor:
    """Returns the weight [C, D, 4, 4] with which `conv_up` equals nearest-neighbour doubling, then a 3x3 convolution.

    weight: that convolution's, [C, D, 3, 3] (C in, D out); its padding is 1. Taps that meet the same pixel of the
    smaller map add up, A w A^T, so the doubled map is never made, which saves 5/9 of the arithmetic.
    """
    # ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)), made on the device: a CUDA graph cannot record a copy from the host.
    a = weight.new_ones(4, 3).tril().triu(-1).flip(1)
    return a @ weight @ a.T


def _apply(maps: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    # Autocast is off in backward, so both operands must have one dtype already.
    if torch.is_autocast_enabled("cpu"):
        maps = maps.to(torch.get_autocast_dtype("cpu"))
    out: Tensor = _MatmulConvolution.apply(maps, weight.to(maps.dtype), transposed)
    return out


class _MatmulConvolution(torch.autograd.Function):
    """A strided convolution, or its transpose; sums over patches, and over the batch, are one matrix product each.

    The direction that spreads into patches uses torch's kernel: summing products would round once more.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        if transposed:
            ctx.save_for_backward(maps, weight)
            return F.conv_transpose2d(maps, weight, None, STRIDE, PADDING)
        patches = _patches(maps)
        ctx.save_for_backward(patches if ctx.needs_input_grad[1] else None, weight)
        return _as_maps(patches @ _rows(weight).T, maps.shape[-1] // STRIDE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        saved, weight = ctx.saved_tensors
        grad_maps = grad_weight = None
        if ctx.transposed:
            patches, pixels = _patches(dy), _pixels(saved)
            if ctx.needs_input_grad[0]:
                grad_maps = _as_maps(patches @ _rows(weight).T, saved.shape[-1])
        else:
            patches, pixels = saved, _pixels(dy)  # no patches were kept for a frozen weight
            if ctx.needs_input_grad[0]:
                grad_maps = F.conv_transpose2d(dy, weight, None, STRIDE, PADDING)
        if ctx.needs_input_grad[1]:
            grad_weight = (pixels.T @ patches).view(-1, KERNEL, KERNEL, weight.shape[1]).permute(0, 3, 1, 2)
        return grad_maps, grad_weight, None


def _patches(maps: Tensor) -> Tensor:
    """Returns [B * (S / 2)^2, 16 C]: the 4x4 patch of `maps` [B, C, S, S] that each pixel of the halved map looks at.

    In memory a patch is 4 runs of 4 pixels with all their channels.
    """
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, *[PADDING] * 4)).contiguous()
    batch, side, _, channels = padded.shape
    image, row, pixel, _ = padded.stride()
    steps = (side - KERNEL) // STRIDE + 1
    shape, stride = (batch, steps, steps, KERNEL, KERNEL * channels), (image, STRIDE * row, STRIDE * pixel, row, 1)
    return padded.as_strided(shape, stride).reshape(batch * steps * steps, -1)


def _rows(weight: Tensor) -> Tensor:
    """Returns [D, 16 C], in the order of a patch, of `weight` [D, C, 4, 4]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pixels(maps: Tensor) -> Tensor:
    """Returns [B * S^2, D]: the pixels of `maps` [B, D, S, S]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _as_maps(pixels: Tensor, side: int) -> Tensor:
    """Returns [B, D, S, S] in channels_last: maps of these `pixels` [B * S^2, D]."""
    return pixels.view(-1, side, side, pixels.shape[1]).permute(0, 3, 1, 2)
