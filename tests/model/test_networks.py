from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gan_dist.config.schema import RESOLUTIONS
from gan_dist.model.convolution import conv_down, conv_up, fold
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Discriminator, Generator, layer_widths
from gan_dist.utils.errors import UserError


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_shapes_and_ranges_at_every_resolution(resolution: int) -> None:
    generator, discriminator = Generator(resolution, 10, 2), Discriminator(resolution, 2)
    images = generator(torch.randn(3, 10))
    assert images.shape == (3, 3, resolution, resolution)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (3,)
    assert generator.convt1.weight.shape[1] == 2 * resolution // 8


def test_no_layer_is_wider_than_the_cap() -> None:
    assert layer_widths(64, 64) == [512, 256, 128, 64]
    assert layer_widths(256, 64) == [2048, 1024, 512, 256, 128, 64]
    assert layer_widths(256, 64, 512) == [512, 512, 512, 256, 128, 64]
    assert layer_widths(32, 6, 4) == [4, 4, 4]
    assert layer_widths(64, 64, 512) == layer_widths(64, 64)  # where the doubling stays below it, it changes nothing
    for upsample in ("transposed", "nearest"):
        generator = Generator(128, 10, 2, upsample, "residual", 8)
        assert [generator.get_parameter(f"convt{i}.weight").shape[0] for i in range(2, 7)] == [8, 8, 8, 4, 2]
        assert generator(torch.randn(2, 10)).shape == (2, 3, 128, 128)
    discriminator = Discriminator(128, 2, norm="spectral", minibatch_std=True, max_channels=8)
    assert [discriminator.get_submodule(f"conv{i}").out_channels for i in range(1, 7)] == [2, 4, 8, 8, 8, 1]
    assert discriminator(torch.randn(2, 3, 128, 128)).shape == (2,)


def test_state_names_and_shapes_are_the_thesis_generators() -> None:
    state = Generator(64, 100, 64).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for i, channels in enumerate([512, 256, 128, 64], start=1):
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert shapes.pop(f"bn{i}.{part}") == (channels,)
        assert shapes.pop(f"bn{i}.num_batches_tracked") == ()
    assert shapes == {
        "convt1.weight": (100, 512, 4, 4),
        "convt2.weight": (512, 256, 4, 4),
        "convt3.weight": (256, 128, 4, 4),
        "convt4.weight": (128, 64, 4, 4),
        "convt5.weight": (64, 3, 4, 4),
    }


def test_discriminator_has_no_batch_norm_at_its_input_and_returns_logits() -> None:
    discriminator = Discriminator(64, 64)
    names = {name.split(".")[0] for name in discriminator.state_dict()}
    assert names == {"conv1", "conv2", "conv3", "conv4", "conv5", "bn2", "bn3", "bn4"}
    with torch.no_grad():
        discriminator.get_parameter("conv5.weight").fill_(1)
    assert discriminator(torch.ones(2, 3, 64, 64)).abs().max() > 1  # no sigmoid


def test_initialisation_follows_the_paper_and_its_seed() -> None:
    first, again = Generator(64, 100, 64), Generator(64, 100, 64)
    initialise(first, 0.02, torch.Generator().manual_seed(3))
    initialise(again, 0.02, torch.Generator().manual_seed(3))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    weight, scale = first.get_parameter("convt2.weight"), first.get_parameter("bn1.weight")
    assert abs(weight.std().item() - 0.02) < 1e-4
    assert abs(weight.mean().item()) < 1e-4
    assert abs(scale.mean().item() - 1) < 0.05
    assert 0.015 < scale.std().item() < 0.025
    assert first.get_parameter("bn1.bias").abs().max() == 0


def test_another_resolution_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="power of two from 32 to 256, found 48"):
        Generator(48)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_a_folded_weight_is_nearest_doubling_and_a_3x3_convolution(side: int) -> None:
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, 5, side, side, dtype=torch.float64, requires_grad=True)
    folded = conv_up(maps, fold(weight))
    plain = F.conv2d(F.interpolate(maps, scale_factor=2, mode="nearest"), weight.transpose(0, 1), padding=1)
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(plain)
    for ours, torchs in zip(
        torch.autograd.grad(folded, [maps, weight], towards),
        torch.autograd.grad(plain, [maps, weight], towards),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_nearest_paints_no_checkerboard() -> None:
    """Where a flat map is doubled again and again, pixels inside differ by their place for transposed alone."""
    for upsample, flat in (("nearest", True), ("transposed", False)):
        weight = torch.randn(1, 1, 3 if flat else 4, 3 if flat else 4)
        inside = conv_up(torch.ones(1, 1, 8, 8), fold(weight) if flat else weight)[0, 0, 2:-2, 2:-2]
        assert (inside.std() < 1e-5) == flat, upsample


def test_without_batch_norm_the_discriminator_has_biases() -> None:
    names = set(Discriminator(64, 8, norm="none").state_dict())
    assert names == {f"conv{i}.{part}" for i in range(1, 6) for part in ("weight", "bias")}
    discriminator = Discriminator(32, 8, norm="none")
    with torch.no_grad():
        discriminator.get_parameter("conv4.bias").fill_(7)
        discriminator.get_parameter("conv4.weight").zero_()
    assert torch.equal(discriminator(torch.randn(2, 3, 32, 32)), torch.full((2,), 7.0))
    for i, side in ((1, 32), (2, 16), (3, 8)):  # on both sides of the smallest maps, which have a product of their own
        wide, narrow = getattr(discriminator, f"conv{i}").weight.shape[:2]
        layer = nn.Conv2d(narrow, wide, 4, 2, 1)
        maps = torch.randn(2, layer.in_channels, side, side)
        ours = convolved(maps, layer)
        torch.testing.assert_close(ours, layer(maps), rtol=1e-4, atol=1e-5)


def convolved(maps: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    return conv_down(maps, layer.weight, layer.bias)


def test_spectral_norm_makes_every_layers_largest_singular_value_one() -> None:
    first, again = Discriminator(64, 8, norm="spectral"), Discriminator(64, 8, norm="spectral")
    for discriminator in (first, again):
        initialise(discriminator, 0.02, torch.Generator().manual_seed(3))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for _ in range(20):
        first(torch.randn(2, 3, 64, 64))
    first.eval()
    for i in range(1, 6):
        weight = getattr(first, f"conv{i}").weight.detach().flatten(1)
        assert abs(torch.linalg.matrix_norm(weight, 2).item() - 1) < 0.05
    again.load_state_dict(first.state_dict())  # its vectors are part of its state
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(first(images), again.eval()(images))


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_he_keeps_the_scale_of_the_maps_through_all_layers(upsample: Any) -> None:
    generator, discriminator = Generator(64, 100, 32, upsample), Discriminator(64, 32, norm="none")
    for network in (generator, discriminator):
        initialise(network, 0.02, torch.Generator().manual_seed(0), "he")
    assert torch.equal(generator.get_parameter("bn1.weight"), torch.ones(256))
    scales = []
    with torch.no_grad():
        images = torch.randn(32, 3, 64, 64)
        for i in range(1, 5):
            layer = getattr(discriminator, f"conv{i}")
            images = F.leaky_relu(convolved(images, layer), 0.2)
            scales.append(images.square().mean().sqrt().item())
        maps = torch.randn(32, 256, 4, 4)
        for i in range(2, 5):
            weight = getattr(generator, f"convt{i}").weight
            maps = torch.relu(conv_up(maps, fold(weight) if upsample == "nearest" else weight))
            scales.append(maps[..., 2:-2, 2:-2].square().mean().sqrt().item())
    assert all(0.4 < scale < 2.5 for scale in scales), scales
