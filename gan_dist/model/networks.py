"""Generator and discriminator of DCGAN (Radford et al. 2016), for square images of 32 to 256 pixels.

Strided and fractionally strided convolutions, no pooling, no dense layer; batch norm everywhere but at G's output and
D's input, or what the keys of `model` put in its place. A doubling of the resolution adds a layer to each network at
its small end, so the widest is resolution / 8 times the narrowest, as 512 to 64 channels at 64 pixels, unless a cap
holds it. Layers are named as in the thesis' own code: convt1, bn1, ...

With classes, a latent has the vector of its class beside it (Mirza and Osindero 2014), and the logit of an image grows
with its likeness to the vector of its class, by a projection (Miyato and Koyama 2018, eq. 3). Class 0, "unlabelled", is
G's like any other; D judges it by the unconditional part alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gan_dist.config.base import validate
from gan_dist.config.schema import RESOLUTIONS, Blocks, DNorm, ModelConfig, Upsample
from gan_dist.data.classes import NO_CLASSES, Classes, one_hot
from gan_dist.model.batchnorm import BatchNorm
from gan_dist.model.convolution import conv_down, conv_up, fold, from_latents, to_logits, to_numbers
from gan_dist.model.minibatch_std import MinibatchStd
from gan_dist.utils.errors import UserError

IMAGE_CHANNELS = 3
CLASS_DIM = 64
"""Numbers in the vector of a class."""
EPS = 1e-8


def layer_widths(resolution: int, narrowest: int, widest: int | None = None) -> list[int]:
    """Returns the channels of the hidden layers from the 4x4 end outwards, for example [512, 256, 128, 64].

    narrowest: those of the largest maps, which have half the image's side; each layer further in has twice as many, up
    to `widest` where that is given (fmaps_max of Karras et al. 2018).
    """
    if resolution not in RESOLUTIONS:
        raise UserError(f"resolution: expected a power of two from 32 to 256, found {resolution}")
    count = (resolution // 4).bit_length() - 1
    doubled = [narrowest << i for i in reversed(range(count))]
    return doubled if widest is None else [min(width, widest) for width in doubled]


class Block(nn.Module):
    """One more 3x3 convolution of maps that stay as large, and the maps themselves beside it (He et al. 2016)."""

    def __init__(self, channels: int, slope: float, norm: DNorm) -> None:
        super().__init__()
        self.slope = slope
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=norm != "batch")
        self.bn = BatchNorm(channels) if norm == "batch" else None

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        """Returns leaky ReLU of `x` [groups * n, C, H, W] plus the normalised convolution of it."""
        with torch.autocast(x.device.type, enabled=False):  # as in the discriminator
            weight, bias = self.conv.weight, self.conv.bias
        change = nn.functional.conv2d(x, weight, bias, padding=1)
        if self.bn is not None:
            change = self.bn(change, groups)
        return nn.functional.leaky_relu(x + change, self.slope)


class Generator(nn.Module):
    """Latents to images: one 4x4 projection, then layers that each double the side."""

    def __init__(
        self,
        resolution: int = 64,
        latent_dim: int = 100,
        channels: int = 64,
        upsample: Upsample = "transposed",
        blocks: Blocks = "plain",
        max_channels: int | None = None,
        classes: Classes = NO_CLASSES,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.latent_dim = latent_dim
        self.classes = classes
        self.num_classes = len(classes.names)
        self.upsample = upsample
        self.blocks = blocks
        self.to_images: Any = None
        """image_layers_triton.to_images, where that is to be used in train mode."""
        widths = layer_widths(resolution, channels, max_channels)
        self.depth = len(widths) + 1
        if self.num_classes:
            self.class_table = nn.Parameter(torch.ones(1 + self.num_classes, CLASS_DIM))
        inputs = latent_dim + (CLASS_DIM if self.num_classes else 0)
        self.convt1 = nn.ConvTranspose2d(inputs, widths[0], 4, 1, 0, bias=False)
        for i, (wide, narrow) in enumerate(zip(widths, [*widths[1:], IMAGE_CHANNELS], strict=True), start=1):
            self.add_module(f"bn{i}", BatchNorm(wide))
            if blocks == "residual":
                self.add_module(f"block{i}", Block(wide, 0.0, "batch"))
            side = 3 if upsample == "nearest" else 4
            self.add_module(f"convt{i + 1}", nn.ConvTranspose2d(wide, narrow, side, 2, 1, bias=False))

    def class_vectors(self, classes: Tensor) -> Tensor:
        """Returns [B, CLASS_DIM]: for one-hot rows [B, num_classes + 1] the vectors of these classes, of length 1; for
        others the mixtures that they weigh.

        All images of a class move its weights one way, while latents pull theirs to and fro, and Adam's steps are as
        long for both. Vectors as long as latents, 8, would take over within a few steps, and each class be one picture.
        """
        with torch.autocast(classes.device.type, enabled=False):
            table = self.class_table * (self.class_table.square().sum(1, keepdim=True) + EPS).rsqrt()
            return classes.to(table.dtype) @ table

    @torch.no_grad()
    def vectors_of(self, labels: Tensor, strength: float = 1.0) -> Tensor:
        """Returns [B, CLASS_DIM]: the vectors of classes, int64 [B].

        strength w: e_0 + w (e_c - e_0), so that 0 asks for no class, and more than 1 for more than the usual of it.
        """
        rows = one_hot(labels.to(self.class_table.device), self.num_classes) * strength
        rows[:, 0] += 1 - strength
        return self.class_vectors(rows)

    def with_classes(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Returns [B, latent_dim + CLASS_DIM], for `forward`: `latents` beside the vectors of classes, int64 [B]."""
        vectors = self.vectors_of(labels)
        return torch.cat([latents.to(vectors), vectors], 1)

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns images [B, 3, S, S] in [-1, 1] for `latents` [B, latent_dim].

        With classes, also takes rows as `class_vectors` does (None: unlabelled), or latents that have such vectors
        beside them already, [B, latent_dim + CLASS_DIM].
        """
        if self.num_classes and latents.shape[1] == self.latent_dim:
            if classes is None:
                classes = one_hot(torch.zeros_like(latents[:, 0], dtype=torch.int64), self.num_classes)
            latents = torch.cat([latents, self.class_vectors(classes).to(latents.dtype)], 1)
        x = from_latents(latents, self.convt1.weight)
        for i in range(1, self.depth):
            x = getattr(self, f"bn{i}")(x, slope=0.0)
            if self.blocks == "residual":
                x = getattr(self, f"block{i}")(x)
            weight = getattr(self, f"convt{i + 1}").weight
            weight = fold(weight) if self.upsample == "nearest" else weight
            if i + 1 == self.depth and self.to_images is not None and self.training:
                x = self.to_images(x, weight)
            else:
                x = conv_up(x, weight)
        return torch.tanh(x)


class Discriminator(nn.Module):
    """Images to logits: layers that each halve the side, down to 4x4, then one number."""

    def __init__(
        self,
        resolution: int = 64,
        channels: int = 64,
        leaky_slope: float = 0.2,
        norm: DNorm = "batch",
        blocks: Blocks = "plain",
        minibatch_std: bool = False,
        max_channels: int | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.leaky_slope = leaky_slope
        self.norm = norm
        self.blocks = blocks
        self.to_maps: Any = None
        """image_layers_triton.to_maps, where that is to be used in train mode."""
        widths = layer_widths(resolution, channels, max_channels)[::-1]
        self.depth = len(widths) + 1
        biased = norm != "batch"  # batch norm would take any bias before it away
        self.conv1 = nn.Conv2d(IMAGE_CHANNELS, widths[0], 4, 2, 1, bias=biased)
        for i, (narrow, wide) in enumerate(itertools.pairwise(widths), start=2):
            self.add_module(f"conv{i}", nn.Conv2d(narrow, wide, 4, 2, 1, bias=biased))
            if norm == "batch":
                self.add_module(f"bn{i}", BatchNorm(wide))
        if blocks == "residual":
            for i, width in enumerate(widths, start=1):
                self.add_module(f"block{i}", Block(width, leaky_slope, norm))
        self.minibatch_std = MinibatchStd() if minibatch_std else None
        self.level_counts = True
        """Whether the loss knows logits from the same logits plus a constant. Where it does not, the last bias is left
        alone: its gradient is 0, and Adam would divide what rounding makes of it by itself."""
        self.sees_images_alone = norm == "none" and not minibatch_std
        """Whether a pass over images gives each the logit that any other pass would, and leaves nothing behind."""
        self.num_classes = num_classes
        if num_classes:
            self.class_table = nn.Parameter(torch.zeros(num_classes, CLASS_DIM))  # of class 1 on: class 0's vector is 0
        outputs = 1 + (CLASS_DIM if num_classes else 0)
        self.add_module(f"conv{self.depth}", nn.Conv2d(widths[-1] + minibatch_std, outputs, 4, 1, 0, bias=biased))
        if norm == "spectral":
            for layer in [part for part in self.modules() if isinstance(part, nn.Conv2d)]:
                spectral_norm(layer)  # its vectors are random, until `initialise` starts them from the seed's numbers

    def forward(self, images: Tensor, groups: int = 1, classes: Tensor | None = None) -> Tensor:
        """Returns logits [B], never probabilities, for `images` [B, 3, S, S] in [-1, 1].

        classes: one-hot rows [B, num_classes + 1] in a game with classes, where None means unlabelled.
        In train mode batch norm normalises the batch in `groups` equal parts, each by its own statistics, and spectral
        norm takes one step of its power iteration a pass.
        """
        layers = [getattr(self, f"conv{i}") for i in range(1, self.depth + 1)]
        with torch.autocast(images.device.type, enabled=False):  # spectral norm's products stay in full precision
            weights = [(layer.weight, layer.bias) for layer in layers]
        if self.to_maps is not None and self.training:
            x = self.to_maps(images, *weights[0], self.leaky_slope)
        else:
            x = nn.functional.leaky_relu_(conv_down(images, *weights[0]), self.leaky_slope)
        for i in range(2, self.depth):
            if self.blocks == "residual":
                x = getattr(self, f"block{i - 1}")(x, groups)
            x = conv_down(x, *weights[i - 1])
            if self.norm == "batch":
                x = getattr(self, f"bn{i}")(x, groups, self.leaky_slope)
            else:
                x = nn.functional.leaky_relu_(x, self.leaky_slope)
        if self.blocks == "residual":
            x = getattr(self, f"block{self.depth - 1}")(x, groups)
        if self.minibatch_std is not None:
            x = self.minibatch_std(x, groups)
        weight, bias = weights[-1]
        if not self.level_counts and bias is not None:
            bias = bias.detach() + 0 * bias
        if not self.num_classes:
            return to_logits(x, weight, bias)
        return self._projected(to_numbers(x, weight, bias), classes)

    def _projected(self, numbers: Tensor, classes: Tensor | None) -> Tensor:
        """Returns logits h_0 + <v_c, h> / sqrt(CLASS_DIM), for `numbers` h_0, h [B, 1 + CLASS_DIM].

        With spectral norm, a v_c longer than sqrt(CLASS_DIM) is shortened to that: else it could make D as steep as it
        likes. Miyato and Koyama 2018 bound all v_c together, by the norm of their table, which cannot begin as 0.
        """
        with torch.autocast(numbers.device.type, enabled=False):
            table: Tensor = self.class_table
            numbers = numbers.to(table.dtype)
            if classes is None:
                return numbers[:, 0]
            if self.norm == "spectral":
                table = table * table.square().mean(1, keepdim=True).clamp(min=1).rsqrt()
            vectors = classes[:, 1:].to(numbers.dtype) @ table
            return numbers[:, 0] + (numbers[:, 1:] * vectors).sum(1) / math.sqrt(CLASS_DIM)


def build_generator(model: Mapping[str, Any], classes: Classes = NO_CLASSES) -> Generator:
    """Returns a generator as the `model` section of a configuration describes it, of the `classes` that its dataset, or
    a checkpoint, names. Raises UserError for unknown keys."""
    described = validate(ModelConfig, model, "model")  # which gives an older run's the defaults of newer keys
    return Generator(
        described.resolution,
        described.latent_dim,
        described.g_channels,
        described.upsample,
        described.blocks,
        described.max_channels,
        classes,
    )


def build_discriminator(model: Mapping[str, Any], classes: Classes = NO_CLASSES) -> Discriminator:
    """Returns a discriminator as the `model` section of a configuration describes it, of as many `classes`."""
    described = validate(ModelConfig, model, "model")
    return Discriminator(
        described.resolution,
        described.d_channels,
        described.leaky_slope,
        described.d_norm,
        described.blocks,
        described.minibatch_std,
        described.max_channels,
        len(classes.names),
    )
