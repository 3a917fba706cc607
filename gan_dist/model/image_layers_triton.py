"""The layers between images and maps for GPUs, as Triton kernels: D's first with its activation, and G's last.

An image has three channels, and matrix units multiply eight and more at a time: cuDNN copies images to wider ones and
multiplies zeros, for more than a quarter of the step's time on an H100, though these layers have a fortieth of its
arithmetic. These kernels gather a pixel's patch of 4 x 4 x 3 numbers themselves, and are bound by memory.

Both layers are one matrix between patches of an image, [48], and pixels of maps, [C]: D's first layer takes patches to
pixels, G's last takes pixels to patches that overlap and add up, and each is the other's gradient. Weights are
[C, 3, 4, 4] for both, stride 2, padding 1. Maps of bfloat16 only; sums are made in float32 and in a fixed order.

The activation is leaky ReLU, after which a value has the sign that it had before: no gradient needs more than that.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gan_dist.model.convolution import PADDING, STRIDE
from gan_dist.model.custom_ops import define, require_close

RUN, RUNS = 16, 4
"""A patch as the kernels hold it: 4 runs, of 4 pixels with 3 channels each, and 4 numbers of padding behind them."""
ONE = 12
"""Where the padding has a 1 when weights' gradients are made: the sums there are the bias' gradient."""
TILE_PIXELS, TILE_CHANNELS = 64, 64
"""What a program has in hand at a time; of the tiles tried on an H100 about the fastest for each kernel."""
PROGRAMS = 1024
"""About as many programs share a sum over all pixels. Fixed: it decides the order of sums, and so the bits."""
COUNTS = ("pixels", "blocks", "chunk")
"""Numbers for which Triton is to build no kernel of its own, as in batchnorm_triton.py."""
OPERANDS = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16
"""What a product is taken of: the interpreter knows bfloat16 by its bits alone."""


@triton.jit
def _patches(images, pixel, pixels, SIDE: tl.constexpr):
    """Returns the patches [PIXELS, 64] that these pixels of maps look at; 0 outside of the image, and as padding."""
    k = tl.arange(0, 64)
    row, place = k // 16, k % 16
    top, left = 2 * (pixel // SIDE % SIDE) - 1, 2 * (pixel % SIDE) - 1
    y, x = top[:, None] + row[None, :], left[:, None] + (place // 3)[None, :]
    inside = (y >= 0) & (y < 2 * SIDE) & (x >= 0) & (x < 2 * SIDE)
    there = inside & (pixel < pixels)[:, None] & (place < 12)[None, :]
    image = (pixel // (SIDE * SIDE)).to(tl.int64) * (12 * SIDE * SIDE)
    at = image[:, None] + (y * (6 * SIDE) + 3 * left[:, None] + place[None, :])
    return tl.load(images + at, mask=there, other=0.0)


@triton.jit
def _before(maps, activated, at, mask, SLOPE: tl.constexpr, MASKED: tl.constexpr, OPERANDS: tl.constexpr):
    """Returns maps' values, as a gradient behind the activation where what it let through is `activated`."""
    value = tl.load(maps + at, mask=mask, other=0.0)
    if MASKED:
        passed = tl.load(activated + at, mask=mask, other=0.0).to(tl.float32) > 0
        value = tl.where(passed, value.to(tl.float32), value.to(tl.float32) * SLOPE)
    return value.to(OPERANDS)


@triton.jit(do_not_specialize=COUNTS)
def _to_maps_kernel(
    images, weight, bias, maps, pixels, channels,
    SIDE: tl.constexpr, SLOPE: tl.constexpr, BIASED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Writes the activated maps. Grid: tiles of pixels, tiles of channels."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    k = tl.arange(0, 64)
    row, place = k // 16, k % 16
    at = (row * 12 + place)[:, None] + channel[None, :] * 48
    w = tl.load(weight + at, mask=(place < 12)[:, None] & inside[None, :], other=0.0).to(OPERANDS)
    patch = _patches(images, pixel, pixels, SIDE).to(OPERANDS)
    value = tl.dot(patch, w)
    if BIASED:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = tl.where(value > 0, value, value * SLOPE)
    out = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(maps + out, value, mask=(pixel < pixels)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _to_images_kernel(
    maps, activated, weight, images, blocks, channels,
    SIDE: tl.constexpr, SLOPE: tl.constexpr, MASKED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Writes images, in blocks of 2x2 pixels that the same four pixels of maps look at. Grid: tiles of blocks.

    Block (i, j), of SIDE + 1 both ways, has rows 2i - 1 and 2i, and is seen from rows i - 1 and i of the maps.
    """
    block = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    i, j = block // (SIDE + 1) % (SIDE + 1), block % (SIDE + 1)
    image = (block // ((SIDE + 1) * (SIDE + 1))).to(tl.int64)
    number = tl.arange(0, 16)  # of the block's 2 x 2 x 3 numbers
    down, right, colour = number // 6, number % 6 // 3, number % 3
    total = tl.zeros([PIXELS, 16], tl.float32)
    for first in tl.range(0, channels, CHANNELS, num_stages=1):  # once, mostly: nothing to load ahead
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < channels
        for tap in tl.static_range(4):
            row, column = i - 1 + tap // 2, j - 1 + tap % 2
            seen = (block < blocks) & (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
            at = ((image * SIDE + row) * SIDE + column)[:, None] * channels + channel[None, :]
            value = _before(maps, activated, at, seen[:, None] & inside[None, :], SLOPE, MASKED, OPERANDS)
            k = (2 + down - 2 * (tap // 2)) * 12 + (2 + right - 2 * (tap % 2)) * 3 + colour
            there = inside[:, None] & (number < 12)[None, :]
            w = tl.load(weight + channel[:, None] * 48 + k[None, :], mask=there, other=0.0).to(OPERANDS)
            total = tl.dot(value, w, total)
    y, x = (2 * i - 1)[:, None] + down[None, :], (2 * j - 1)[:, None] + right[None, :]
    inside = (y >= 0) & (y < 2 * SIDE) & (x >= 0) & (x < 2 * SIDE)
    there = inside & (block < blocks)[:, None] & (number < 12)[None, :]
    at = image[:, None] * (12 * SIDE * SIDE) + ((y * (2 * SIDE) + x) * 3 + colour[None, :])
    tl.store(images + at, total, mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _weight_gradient_kernel(
    images, maps, activated, parts, pixels, channels, chunk,
    SIDE: tl.constexpr, SLOPE: tl.constexpr, MASKED: tl.constexpr, ONE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Writes a chunk of pixels' sum of products with their patches, [C, 64]. Grid: chunks, tiles of channels."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    k = tl.arange(0, 64)
    total = tl.zeros([CHANNELS, 64], tl.float32)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, pixels)
    for start in tl.range(first, last, PIXELS, num_stages=2):
        pixel = start + tl.arange(0, PIXELS)
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (pixel < last)[:, None] & inside[None, :]
        value = _before(maps, activated, at, mask, SLOPE, MASKED, OPERANDS)
        patch = _patches(images, pixel, last, SIDE).to(OPERANDS)
        patch = tl.where((k == ONE)[None, :], 1.0, patch).to(OPERANDS)
        total = tl.dot(tl.trans(value), patch, total)
    at = (tl.program_id(0) * channels + channel)[:, None] * 64 + k[None, :]
    tl.store(parts + at, total, mask=inside[:, None])


# Each launch is an operation of torch's.


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _optional_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _tile(channels: int) -> dict[str, Any]:
    width = max(16, min(TILE_CHANNELS, triton.next_power_of_2(channels)))  # matrix units take 16 at least
    return {"PIXELS": TILE_PIXELS, "CHANNELS": width, "OPERANDS": OPERANDS}


def _empty_maps(images: Tensor, weight: Tensor, *_: Any) -> Tensor:
    side = images.shape[-1] // STRIDE
    shape = (len(images), len(weight), side, side)
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _empty_images(maps: Tensor, *_: Any) -> Tensor:
    side = maps.shape[-1] * STRIDE
    shape = (len(maps), 3, side, side)
    return torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last)


@define("image_to_maps(Tensor images, Tensor weight, Tensor? bias, float slope) -> Tensor", _empty_maps)
def _image_to_maps(images: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    """Returns leaky_relu(conv2d(images)), [B, C, S / 2, S / 2], for `images` [B, 3, S, S]."""
    images, weight, maps = _rows(images), _rows(weight), _empty_maps(images, weight)
    pixels, tile = maps.numel() // maps.shape[1], _tile(maps.shape[1])
    grid = (triton.cdiv(pixels, tile["PIXELS"]), triton.cdiv(maps.shape[1], tile["CHANNELS"]))
    with torch.cuda.device_of(images):
        _to_maps_kernel[grid](
            images, weight, bias, maps, pixels, maps.shape[1], maps.shape[-1], slope, bias is not None, **tile
        )
    return maps


@define("maps_to_image(Tensor maps, Tensor? activated, Tensor weight, float slope) -> Tensor", _empty_images)
def _maps_to_image(maps: Tensor, activated: Tensor | None, weight: Tensor, slope: float) -> Tensor:
    """Returns conv_transpose2d(maps), [B, 3, S, S]; of a gradient, where `activated` is what it was taken of, behind
    that activation."""
    maps, activated, weight, images = _rows(maps), _optional_rows(activated), _rows(weight), _empty_images(maps)
    blocks, tile = len(maps) * (maps.shape[-1] + 1) ** 2, _tile(maps.shape[1])
    with torch.cuda.device_of(maps):
        _to_images_kernel[(triton.cdiv(blocks, tile["PIXELS"]),)](
            maps, activated, weight, images, blocks, maps.shape[1], maps.shape[-1], slope, activated is not None, **tile
        )
    return images


@define(
    "image_weight_gradient(Tensor images, Tensor maps, Tensor? activated, float slope) -> Tensor",
    lambda images, maps, *_: maps.new_empty((maps.shape[1], RUNS, RUN), dtype=torch.float32),
)
def _image_weight_gradient(images: Tensor, maps: Tensor, activated: Tensor | None, slope: float) -> Tensor:
    """Returns the weight's gradient by runs of a patch, [C, 4, 16], and the bias' at ONE."""
    images, maps, activated = _rows(images), _rows(maps), _optional_rows(activated)
    channels, tile = maps.shape[1], _tile(maps.shape[1])
    pixels = maps.numel() // channels
    chunk = tile["PIXELS"] * triton.cdiv(pixels, PROGRAMS * tile["PIXELS"])
    parts = maps.new_empty((triton.cdiv(pixels, chunk), channels, RUNS, RUN), dtype=torch.float32)
    with torch.cuda.device_of(maps):
        _weight_gradient_kernel[(len(parts), triton.cdiv(channels, tile["CHANNELS"]))](
            images, maps, activated, parts, pixels, channels, chunk, maps.shape[-1], slope, activated is not None, ONE,
            **tile,
        )  # fmt: skip
    return parts.sum(0)


def _gradients(summed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of weight and bias, of what `image_weight_gradient` returned."""
    of_weight = summed[:, :, :ONE].unflatten(2, (4, 3)).permute(0, 3, 1, 2)
    return of_weight.to(weight.dtype, memory_format=torch.channels_last), summed[:, 0, ONE].to(weight.dtype)


class _ToMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
        maps: Tensor = torch.ops.gan_dist.image_to_maps(images, weight, bias, slope)
        ctx.save_for_backward(images, weight, maps)
        ctx.slope = slope
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, (images, weight, maps) = torch.ops.gan_dist, ctx.saved_tensors
        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_images = ops.maps_to_image(grads[0], maps, weight, ctx.slope)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            summed = ops.image_weight_gradient(images, grads[0], maps, ctx.slope)
            of_weight, of_bias = _gradients(summed, weight)
        return of_images, of_weight, of_bias if ctx.needs_input_grad[2] else None, None


class _ToImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(maps, weight)
        images: Tensor = torch.ops.gan_dist.maps_to_image(maps, None, weight, 1.0)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, (maps, weight) = torch.ops.gan_dist, ctx.saved_tensors
        of_maps = of_weight = None
        if ctx.needs_input_grad[0]:
            of_maps = ops.image_to_maps(grads[0], weight, None, 1.0)
        if ctx.needs_input_grad[1]:
            of_weight, _ = _gradients(ops.image_weight_gradient(grads[0], maps, None, 1.0), weight)
        return of_maps, of_weight


def to_maps(images: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    """Returns bfloat16 leaky_relu(conv2d(images, weight, bias), slope), [B, C, S / 2, S / 2], in channels_last.

    images: [B, 3, S, S]; weight: [C, 3, 4, 4]; bias: [C] or None; slope: 0 or more. Gradients can be taken once.
    """
    half = torch.bfloat16
    maps: Tensor = _ToMaps.apply(images.to(half), weight.to(half), None if bias is None else bias.to(half), slope)
    return maps


def to_images(maps: Tensor, weight: Tensor) -> Tensor:
    """Returns bfloat16 conv_transpose2d(maps, weight), [B, 3, 2 S, 2 S], in channels_last.

    maps: [B, C, S, S]; weight: [C, 3, 4, 4]. Gradients can be taken once.
    """
    images: Tensor = _ToImages.apply(maps.to(torch.bfloat16), weight.to(torch.bfloat16))
    return images


def check(
    device: torch.device,
    side: int = 64,
    g_channels: int = 64,
    d_channels: int = 64,
    slope: float = 0.2,
    biased: bool = False,
) -> None:
    """Raises unless the kernels of these layers can be built for `device`, and do there what torch's do in float64.

    With images of `side` pixels, and so many of them that each program of a sum goes through several tiles.
    Raises ArithmeticError where results differ, and whatever Triton raises where it cannot build them.
    """
    source, half = torch.Generator().manual_seed(0), side // 2
    count = 2 * PROGRAMS * TILE_PIXELS // half**2 + 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(device, torch.bfloat16)

    images, g_maps, d_maps = draw(count, 3, side, side), *(draw(count, c, half, half) for c in (g_channels, d_channels))
    g_weight, d_weight, bias = draw(g_channels, 3, 4, 4), draw(d_channels, 3, 4, 4), draw(d_channels)
    layers: dict[str, tuple[Any, Any, list[Tensor], Tensor]] = {
        "D's first layer": (
            lambda x, w, b=None: to_maps(x, w, b, slope),
            lambda x, w, b=None: F.leaky_relu(F.conv2d(x, w, b, STRIDE, PADDING), slope),
            [images, d_weight, bias] if biased else [images, d_weight],
            d_maps,
        ),
        "G's last layer": (
            to_images,
            lambda x, w: F.conv_transpose2d(x, w, None, STRIDE, PADDING),
            [g_maps, g_weight],
            images,
        ),
    }
    for layer, (ours, torchs, inputs, gradient) in layers.items():
        found = _played(ours, inputs, gradient)
        expected = _played(torchs, [values.double() for values in inputs], gradient.double())
        names = ("result", "gradient", "weight's gradient", "bias' gradient")
        results = zip(names, zip(found, expected, strict=True), strict=False)
        require_close({f"{name} of {layer}": pair for name, pair in results}, torch.bfloat16)


def _played(layer: Any, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [values.detach().requires_grad_() for values in inputs]
    result = layer(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]
