from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gan_dist.model.losses import cross_entropy, discriminator_loss, generator_loss, minimax_value
from gan_dist.utils.errors import UserError


@pytest.mark.parametrize("target", [0.0, 0.1, 0.9, 1.0])
def test_cross_entropy_is_torchs_summed_and_keeps_its_gradient_far_out(target: float) -> None:
    logits = torch.tensor([-60.0, -25, -3, 0, 0.5, 25, 60], dtype=torch.float64, requires_grad=True)
    reference = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="sum")
    torch.testing.assert_close(cross_entropy(logits, target), reference, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    expected = (1 - target) * torch.sigmoid(logits) - target * torch.sigmoid(
        -logits
    )  # sigmoid - target, no cancellation
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_the_game_is_goodfellows_equation_one() -> None:
    real, fake = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    value = torch.log(real.sigmoid()).sum() + torch.log(1 - fake.sigmoid()).sum()
    torch.testing.assert_close(minimax_value(real, fake), value)
    torch.testing.assert_close(discriminator_loss(real, fake), -value)
    torch.testing.assert_close(generator_loss(fake, "minimax"), torch.log(1 - fake.sigmoid()).sum())
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), -torch.log(fake.sigmoid()).sum())


def test_real_and_generator_targets_are_separate() -> None:
    real, fake = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    bce = nn.BCELoss(reduction="sum")
    expected = bce(real.sigmoid(), torch.full_like(real, 0.9)) + bce(fake.sigmoid(), torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss(real, fake, 0.9), expected)
    torch.testing.assert_close(
        generator_loss(fake, "non_saturating", 0.7), bce(fake.sigmoid(), torch.full_like(fake, 0.7))
    )


def test_a_losing_generator_saturates_in_minimax_only() -> None:
    logits = torch.tensor([-20.0], requires_grad=True)  # D is sure that this is fake
    assert torch.autograd.grad(generator_loss(logits, "minimax"), logits)[0].abs() < 1e-8
    assert torch.autograd.grad(generator_loss(logits, "non_saturating"), logits)[0].abs() > 0.99


def test_bad_names_and_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"minimax takes no generator target, found 0\.9"):
        generator_loss(torch.zeros(1), "minimax", 0.9)
    with pytest.raises(UserError, match="expected one of minimax, non_saturating, found 'hinge'"):
        generator_loss(torch.zeros(1), "hinge")  # type: ignore[arg-type]
