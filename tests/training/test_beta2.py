"""A second decay rate that moves: the step is torch's own with that rate, and a CUDA graph would see it move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan_dist.config.schema import load_config
from gan_dist.training.adam import RampedAdam
from gan_dist.training.schedule import STILL, Beta2Ramp
from gan_dist.training.statistics import update_ratio
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.helpers.games import batches, game, tensors, worst
from tests.helpers.training import assert_identical, small

RAMP = Beta2Ramp(0.99, 18)
MOVING = ["optim.betas=[0, 0.9]", "optim.beta2_to=0.99", "optim.beta2_images=48"]


def test_the_rate_moves_and_stays() -> None:
    assert [Beta2Ramp(0.99, 100)(0.9, seen) for seen in (0, 50, 100, 999)] == pytest.approx([0.9, 0.945, 0.99, 0.99])
    assert STILL(0.9, 10**9) == 0.9


def _play(update: Any, steps: int) -> Any:
    for step in range(steps):
        update.begin(step * update.global_batch)
        update.step(*batches(update, step))
    return update


def test_a_step_is_torchs_with_betas_that_are_set_before_it() -> None:
    """Also with a rate that rises and falls; the control leaves the rate where it began."""
    settings: dict[str, Any] = {"g_betas": (0.0, 0.9), "d_betas": (0.5, 0.9)}
    ramped, plain = game(**settings, beta2_ramp=RAMP), game(**settings)
    assert isinstance(ramped.d.optimizer, RampedAdam) and not isinstance(plain.d.optimizer, RampedAdam)
    for step in range(5):
        ramped.begin(step * 6)
        ramped.step(*batches(ramped, step))
        for player in (plain.g, plain.d):
            group = player.optimizer.param_groups[0]
            group["betas"] = (player.betas[0], RAMP(0.9, step * 6))
        plain.step(*batches(plain, step))
    assert worst(tensors(ramped), tensors(plain)) < 1e-11
    torch.testing.assert_close(update_ratio(ramped.d.optimizer), update_ratio(plain.d.optimizer))
    assert worst(tensors(_play(game(**settings), 5)), tensors(ramped)) > 1e-3


def test_a_skipped_update_leaves_everything() -> None:
    update = game(beta2_ramp=RAMP)
    reals, latents = batches(update, 0)
    for first in (True, False):
        before = copy.deepcopy(tensors(update))
        spoilt = latents[0].clone()
        spoilt[0, 0] = torch.nan
        assert update.step(reals, [spoilt])[-1] == 2
        after = tensors(update)
        assert all(torch.equal(value, after[name]) for name, value in before.items()), first
        update.step(reals, latents)
        assert all(torch.isfinite(value).all() for value in tensors(update).values())


def test_the_rate_is_read_from_the_device() -> None:
    """What a CUDA graph records has the address of the rate, not its value of then."""
    network = nn.Linear(3, 2).double()
    optimizer = RampedAdam(network.parameters(), fused=True)
    optimizer.beta2, optimizer.found_inf = torch.tensor(0.9, dtype=torch.float64), torch.zeros(())
    parameters: list[Tensor] = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    seen = []
    for rate in (0.9, 0.5):
        optimizer.beta2.fill_(rate)
        optimizer.step()
        seen.append(optimizer.state[parameters[0]]["exp_avg_sq"][0, 0].item())
    assert seen == pytest.approx([0.1, 0.1 * 0.5 + 0.5])


def test_a_run_that_is_interrupted_takes_the_same_rates(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), MOVING, run_dir=tmp_path / "through", max_steps=8, console=False)
    train(small(dataset), MOVING, run_dir=tmp_path / "cut", max_steps=3, console=False)
    train(small(dataset), MOVING, run_dir=tmp_path / "cut", max_steps=8, console=False)
    assert_identical(tmp_path / "through", tmp_path / "cut")
    train(small(dataset), MOVING[:1], run_dir=tmp_path / "still", max_steps=8, console=False)
    with pytest.raises(AssertionError):
        assert_identical(tmp_path / "through", tmp_path / "still")


@pytest.mark.parametrize("words", [MOVING[1:2], MOVING[2:]])
def test_a_ramp_without_an_end_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"optim\.beta2_images: expected 1 or more with an optim\.beta2_to"):
        load_config({"data": {"shards": "none"}}, words)
