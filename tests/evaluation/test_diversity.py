"""Collapse, on sets whose collapse is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gan_dist.data.prepare.synthetic import paint
from gan_dist.distributed.world import World
from gan_dist.evaluation.diversity import pairwise_distance, repeated


@pytest.fixture(scope="module")
def paintings() -> Tensor:
    """200 small paintings, uint8 [200, 3, 32, 32]."""
    size = (32, 32)
    data = [
        torch.frombuffer(bytearray(paint(i, 0, size).convert("RGB").tobytes()), dtype=torch.uint8) for i in range(200)
    ]
    return torch.stack(data).view(200, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("known", [1, 2, 10, 40])
def test_a_generator_that_knows_few_pictures_repeats_itself(paintings: Tensor, known: int) -> None:
    noise = torch.randint(-3, 4, (100, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    few = (paintings[torch.arange(100) % known].int() + noise).clamp(0, 255).to(torch.uint8)
    assert repeated(few, paintings[100:]) == 1
    if known == 10:  # which the distance between any two does not show
        apart = pairwise_distance(World(), few) / pairwise_distance(World(), paintings[100:])
        assert apart > 0.7


def test_different_pictures_are_no_repetition_and_the_share_is_returned(paintings: Tensor) -> None:
    assert repeated(paintings[:100], paintings[100:]) < 0.05
    half = torch.cat([paintings[:50], paintings[50:75], paintings[50:75]])
    assert repeated(half, paintings[100:]) == pytest.approx(0.5, abs=0.03)


def test_the_distance_of_all_pairs_is_that_of_each(paintings: Tensor) -> None:
    flat = paintings[:40].flatten(1).double()
    pairs = (torch.cdist(flat, flat).square() / flat.shape[1]).mean().sqrt()
    assert pairwise_distance(World(), paintings[:40]) == pytest.approx(pairs.item(), rel=1e-9)
