"""The map of deviations: what a plain formula says, with its gradient. tests/training has it over several ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gan_dist.model.initialise import initialise
from gan_dist.model.minibatch_std import EPS, MinibatchStd
from gan_dist.model.networks import Discriminator


def _plain(x: Tensor, groups: int) -> Tensor:
    deviations = [(part.var(0, correction=0) + EPS).sqrt().mean() for part in x.chunk(groups)]
    sizes = [x.shape[0] // groups] * groups
    maps = [deviation.expand(size, 1, *x.shape[2:]) for deviation, size in zip(deviations, sizes, strict=True)]
    return torch.cat([x, torch.cat(maps)], 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_deviation_over_each_group(groups: int) -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    ours, plain = MinibatchStd()(x, groups), _plain(x, groups)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
    towards = torch.randn_like(ours)
    found = torch.autograd.grad(ours, x, towards)[0], torch.autograd.grad(plain, x, towards)[0]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-14)


def test_a_collapsed_batch_is_seen_and_its_slope_is_finite() -> None:
    x = torch.randn(1, 3, 4, 4).expand(5, -1, -1, -1).contiguous().requires_grad_()
    found = MinibatchStd()(x)
    assert found[:, 3].detach().abs().max() < 1e-3
    assert torch.isfinite(torch.autograd.grad(found.sum(), x)[0]).all()
    assert MinibatchStd()(torch.randn(5, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_a_discriminator_judges_a_collapsed_batch_otherwise() -> None:
    network = Discriminator(32, 4, norm="none", minibatch_std=True)
    initialise(network, 0.1, torch.Generator().manual_seed(0))
    images = torch.randn(4, 3, 32, 32)
    same = images[:1].expand_as(images)
    assert not torch.allclose(network(images)[0], network(same)[0], atol=1e-5)
    plain = Discriminator(32, 4, norm="none")
    assert torch.allclose(plain(images)[0], plain(same)[0], atol=1e-5)
