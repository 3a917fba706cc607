from __future__ import annotations

import pytest
import torch

from gan_dist.model.networks import RESOLUTIONS, Discriminator, Generator, initialise
from gan_dist.utils.errors import UserError


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_shapes_and_ranges_at_every_resolution(resolution: int) -> None:
    generator, discriminator = Generator(resolution, 10, 2), Discriminator(resolution, 2)
    images = generator(torch.randn(3, 10))
    assert images.shape == (3, 3, resolution, resolution)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (3,)
    assert generator.convt1.weight.shape[1] == 2 * resolution // 8


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
    assert abs(scale.mean().item() - 1) < 0.01
    assert 0.015 < scale.std().item() < 0.025
    assert first.get_parameter("bn1.bias").abs().max() == 0


def test_another_resolution_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="power of two from 32 to 256, found 48"):
        Generator(48)
