"""The kernels of the layers between images and maps give torch's results: in Triton's interpreter, against float64."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gan_dist.model.penalty import GradientPenalty
from gan_dist.training.update import Update
from tests.helpers.games import game
from tests.helpers.interpreted import (
    IMAGE_EXAMPLES,
    IMAGE_GAMES,
    LAYER_KINDS,
    image_game,
    image_layer,
    interpreted_results,
)

pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")

TORCH = SimpleNamespace(
    to_maps=lambda images, weight, bias, slope: F.leaky_relu(F.conv2d(images, weight, bias, 2, 1), slope),
    to_images=lambda maps, weight: F.conv_transpose2d(maps, weight, None, 2, 1),
)
TOLERANCE = 0.008
"""Of a result's norm: eight bits are written, and the interpreter cuts the others off instead of rounding."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What the interpreter made of everything."""
    return interpreted_results("save_image_layers", tmp_path_factory.mktemp("layers"))


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("name", IMAGE_EXAMPLES)
def test_they_equal_torch_in_float64(found: dict[Any, Any], name: str, kind: str) -> None:
    example = IMAGE_EXAMPLES[name]
    expected = image_layer(TORCH, kind, example, torch.float64)
    assert list(expected) == list(found[name, kind])
    for key, values in found[name, kind].items():
        assert values.dtype == torch.bfloat16 and values.shape == expected[key].shape
        error = (values.double() - expected[key]).norm() / expected[key].norm()
        assert error < TOLERANCE, (key, float(error))


@pytest.mark.parametrize("name", IMAGE_GAMES)
def test_the_game_is_the_same_up_to_bfloat16(found: dict[Any, Any], name: str) -> None:
    torch.testing.assert_close(found["games"][name], image_game(None, IMAGE_GAMES[name]), rtol=0.04, atol=0.02)


def test_the_starts_check_sees_a_gradient_that_forgets_the_activation(found: dict[Any, Any]) -> None:
    assert found["wrong"].startswith("gradient of D's first layer differs from torch's by more than")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # Triton's own
@pytest.mark.parametrize("words", [(32, 16, 32), (64,), (64, 130, 100, 0.0, True), (256, 32, 32, 0.2, True)])
def test_they_are_right_on_a_gpu(words: Any) -> None:
    importlib.import_module("gan_dist.model.image_layers_triton").check(torch.device("cuda", 0), *words)


def _layers(**settings: Any) -> set[bool]:
    update: Update = game(batchnorm_kernels="triton", **settings)
    networks: tuple[Any, Any] = update.g.network, update.d.network
    copy.deepcopy(networks)
    return {networks[0].to_images is not None, networks[1].to_maps is not None}


def test_they_are_for_bfloat16_and_for_gradients_that_are_taken_once() -> None:
    assert _layers(precision="bf16") == {True}
    assert _layers(precision="fp32") == {False}
    model = {"d_norm": "none"}
    assert _layers(precision="bf16", model=model, penalty=GradientPenalty(1.0, kinds=1)) == {True}
    assert _layers(precision="bf16", model=model, penalty=GradientPenalty(1.0, kinds=1, method="exact")) == {False}


def test_samples_are_torchs_whatever_trains() -> None:
    """A picture does not change with the kernels that the weights were trained by."""
    update = game(precision="bf16", batchnorm_kernels="triton")
    generator: Any = update.g.network.eval()
    latents = torch.randn(2, generator.latent_dim)
    with torch.no_grad():
        images = generator(latents)
        generator.to_images = None
        assert torch.equal(images, generator(latents))
