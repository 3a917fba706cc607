from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gan_dist.config.schema import WITH_SIGN, LossName
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
    torch.testing.assert_close(discriminator_loss(real, fake, real_target=0.9), expected)
    torch.testing.assert_close(
        generator_loss(fake, "non_saturating", 0.7), bce(fake.sigmoid(), torch.full_like(fake, 0.7))
    )


def test_a_losing_generator_saturates_in_minimax_only() -> None:
    logits = torch.tensor([-20.0], requires_grad=True)  # D is sure that this is fake
    assert torch.autograd.grad(generator_loss(logits, "minimax"), logits)[0].abs() < 1e-8
    assert torch.autograd.grad(generator_loss(logits, "non_saturating"), logits)[0].abs() > 0.99


def test_the_sign_of_a_logit_means_something_where_real_and_generated_are_treated_alike() -> None:
    """Of images that may be either, D says 0 there: its loss is smallest around it. (Pairs do not tell where.)"""
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for name in get_args(LossName):
        sums = torch.stack([discriminator_loss(logit[None], logit[None], name) for logit in logits])
        symmetric = torch.allclose(sums, sums.flip(0)) and not torch.allclose(sums, sums[3])
        assert symmetric == (name in WITH_SIGN), name


def test_the_other_losses_are_their_papers() -> None:
    r, f = torch.randn(2, 9, dtype=torch.float64) * 2
    one = torch.ones_like(r)
    papers = {
        "least_squares": (0.5 * (nn.MSELoss(reduction="sum")(r, one) + (f * f).sum()), 0.5 * ((f - 1) ** 2).sum()),
        "hinge": (-(torch.minimum(r - 1, 0 * r) + torch.minimum(-f - 1, 0 * f)).sum(), -f.sum()),
        "wasserstein": (-(r - f).sum(), -f.sum()),
        "relativistic": (-torch.log(torch.sigmoid(r - f)).sum(), -torch.log(torch.sigmoid(f - r)).sum()),
    }
    assert {*papers, "minimax", "non_saturating"} == set(get_args(LossName))
    name: Any
    for name, (of_d, of_g) in papers.items():
        torch.testing.assert_close(discriminator_loss(r, f, name), of_d)
        torch.testing.assert_close(generator_loss(f, name, real_logits=r), of_g)
    torch.testing.assert_close(discriminator_loss(r, f, "least_squares", 0.9), (((r - 0.9) ** 2 + f * f) / 2).sum())
    torch.testing.assert_close(generator_loss(f, "least_squares", 0.8), ((f - 0.8) ** 2 / 2).sum())


def test_bad_names_and_targets_are_refused() -> None:
    for name in ("minimax", "hinge"):
        with pytest.raises(UserError, match=rf"{name} takes no generator target, found 0\.9"):
            generator_loss(torch.zeros(1), name, 0.9)
    with pytest.raises(UserError, match="found 'hing'"):
        generator_loss(torch.zeros(1), "hing")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found 'hing'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "hing")  # type: ignore[arg-type]
