"""The gradient penalty: by differences what it is exactly, exactly what torch's second derivatives say."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gan_dist.model.networks import Discriminator
from gan_dist.model.penalty import GradientPenalty
from gan_dist.training.draws import draw_noise
from tests.helpers.games import CPU, batches, game, moves, networks

NUM_PIXELS = 3 * 32 * 32


def _discriminator(d_norm: Any = "none") -> Discriminator:
    return networks(std=0.2, d_norm=d_norm)[1].double().eval()


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def _gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    parameters = list(network.parameters())
    # zeros for the last bias, which moves no difference
    return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def _plain(network: Discriminator, images: Tensor) -> Tensor:
    """D as torch's own layers compute it, which torch can differentiate as often as one likes."""
    x = images
    for i in range(1, network.depth + 1):
        layer: Any = getattr(network, f"conv{i}")
        stride, padding = (1, 0) if i == network.depth else (2, 1)
        x = F.conv2d(x, layer.weight, layer.bias, stride, padding)
        x = F.leaky_relu(x, 0.2) if i < network.depth else x
    return x.flatten()


@pytest.mark.parametrize("kinds", [1, 2])
def test_exact_is_torchs_second_derivative(kinds: int) -> None:
    network, images = _discriminator(), _images(6).requires_grad_()
    penalty = GradientPenalty(0.5, kinds=kinds, every=2, method="exact")
    value = penalty(network(images), images, 3, 0, 3)  # of 3 reals and 3 fakes, the first and the last
    (first,) = torch.autograd.grad(_plain(network, images).sum(), images, create_graph=True)
    chosen = [0, 2] if kinds == 1 else [0, 2, 3, 5]
    expected = 0.5 * first[chosen].square().sum() / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, torchs in zip(_gradients(value, network), _gradients(expected, network), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-14)


def test_differences_become_the_gradient_as_sigma_falls() -> None:
    """Over all directions at once: the sum of squared derivatives along each pixel is the squared gradient."""
    network, images = _discriminator(), _images(1)
    exact = GradientPenalty(1.0, kinds=1, method="exact")
    leaf = torch.cat([images, images]).requires_grad_()
    wanted = exact(network(leaf), leaf, 1, 0, 1)
    errors = []
    for sigma in (1e-1, 1e-4):
        penalty = GradientPenalty(1.0, sigma, kinds=1)
        directions = torch.eye(NUM_PIXELS, dtype=torch.float64).view(1, -1, 3, 32, 32)
        found = torch.zeros((), dtype=torch.float64)
        gradients: list[Tensor] = []
        for some in torch.split(directions, 1024, 1):
            kinds = [images.expand(some.shape[1], -1, -1, -1)]
            seen = torch.cat([*kinds, *kinds, *penalty.noisy(kinds, some, 0)])
            part = penalty(network(seen), seen, some.shape[1], 0, 1)  # a sum: directions are no mean
            found = found + part.detach()
            more = _gradients(part, network)
            gradients = [a + b for a, b in zip(gradients, more, strict=True)] if gradients else more
        errors.append((found / wanted - 1).abs().item())
    assert errors[0] > 10 * errors[1] and errors[1] < 1e-4, errors
    expected = _gradients(wanted, network)
    scale = max(each.abs().max().item() for each in expected)
    for ours, torchs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-4 * scale)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_ranks_draw_slices_of_one_noise_for_the_images_that_are_chosen(batch: int, every: int, ranks: int) -> None:
    def drawn(lo: int, hi: int) -> Tensor:
        return draw_noise(3, 640, (2, batch, 2), every, lo, hi, CPU)

    whole, penalty = drawn(0, batch), GradientPenalty(1.0, kinds=2, every=every)
    assert whole.shape == (2, len(range(0, batch, every)), 2)
    cuts = [batch * rank // ranks for rank in range(ranks + 1)]
    parts = [drawn(lo, hi) for lo, hi in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts, 1), whole)
    numbers = torch.arange(batch)
    chosen = [numbers[lo:hi][penalty.places(lo)] for lo, hi in itertools.pairwise(cuts)]
    assert torch.cat(chosen).tolist() == list(range(0, batch, every))
    assert [len(each) for each in chosen] == [part.shape[1] for part in parts]


def test_noise_is_another_stream_at_each_position_and_beside_latents() -> None:
    def drawn(seed: int, position: int) -> Tensor:
        return draw_noise(seed, position, (2, 4, 8), 1, 0, 4, CPU)

    many = [drawn(1, 0), drawn(1, 4), drawn(2, 0), drawn(1, 2**32)]
    assert all(not torch.equal(a, b) for i, a in enumerate(many) for b in many[:i])
    assert not torch.equal(many[0][0], many[0][1])  # fakes have noise of their own
    (z,) = batches(game(global_batch=4), 0)[1]
    assert not torch.equal(drawn(7, 0)[0].double(), z)


@pytest.mark.parametrize("method", ["finite", "exact"])
def test_a_penalty_makes_the_discriminator_flatter(method: Any) -> None:
    slopes = []
    for weight in (0.0, 10.0):
        update = game(
            model={"d_norm": "none", "init": "he"},
            penalty=GradientPenalty(weight, kinds=2 if weight else 0, method=method),
            d_lr=1e-2,
        )
        for step in range(12):
            update.step(*moves(update, step))
        images = _images(4).requires_grad_()
        slopes.append(torch.autograd.grad(update.d.network(images).sum(), images)[0].square().sum().item())
    assert slopes[1] < 0.2 * slopes[0], slopes


def test_the_loss_that_is_logged_has_the_penalty_in_it() -> None:
    settings: dict[str, Any] = {"model": {"d_norm": "none"}}
    penalty = GradientPenalty(3.0, 0.1, kinds=1)
    plain, penalised = game(**settings), game(**settings, penalty=penalty)
    before = copy.deepcopy(penalised.d.network)
    losses = [update.step(*moves(update, 0))[0] for update in (plain, penalised)]
    (real,), _, _, (noise,) = moves(penalised, 0)
    signed = real.double() / 127.5 - 1
    with torch.no_grad():
        moved = before(signed + 0.1 * noise[0]) - before(signed)
    torch.testing.assert_close(losses[1] - losses[0], 3 * (moved / 0.1).square().mean(), rtol=1e-9, atol=0)
