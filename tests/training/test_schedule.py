"""Learning rates that rise and fall with the images seen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gan_dist.config.schema import load_config
from gan_dist.training.schedule import Schedule
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.helpers.games import batches, game
from tests.helpers.training import assert_identical, small

MOVING = ["optim.warmup_images=24", "optim.decay=cosine", "optim.decay_images=64", "optim.decay_to=0.2"]


def test_rates_rise_then_fall_and_stay() -> None:
    assert Schedule().constant and Schedule()(10**9) == 1
    rise = Schedule(warmup_images=100)
    assert (rise(0), rise(49), rise(99), rise(10**6)) == (0.01, 0.5, 1, 1)
    linear = Schedule(decay="linear", decay_images=200, decay_to=0.5)
    assert [linear(n) for n in (0, 100, 200, 900)] == [1, 0.75, 0.5, 0.5]
    cosine = Schedule(decay="cosine", decay_images=200)
    assert [round(cosine(n), 12) for n in (0, 100, 200, 900)] == [1, 0.5, 0, 0]
    assert cosine(50) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@given(
    st.integers(0, 10**4), st.sampled_from(["linear", "cosine"]), st.integers(1, 10**4), st.floats(0, 0.99), st.data()
)
def test_a_share_is_always_one(warmup: int, decay: str, until: int, to: float, data: st.DataObject) -> None:
    schedule = Schedule(warmup, decay, until, to)  # type: ignore[arg-type]
    seen = data.draw(st.integers(0, 10**5))
    assert 0 <= schedule(seen) <= 1
    assert schedule(10**5) == pytest.approx(to)


def test_a_step_takes_the_rate_of_its_position() -> None:
    """As torch's own scheduler would: Adam's update is proportional to the rate."""
    moved, plain = game(schedule=Schedule(warmup_images=12), d_lr=4e-3), game(d_lr=4e-3)
    begin = {name: value.clone() for name, value in moved.d.network.named_parameters()}
    for update in (moved, plain):
        update.begin(5)
        update.step(*batches(update, 0))
    assert moved.d.lr == moved.d.optimizer.param_groups[0]["lr"] == 2e-3
    theirs = dict(plain.d.network.named_parameters())
    for name, value in moved.d.network.named_parameters():
        torch.testing.assert_close(value - begin[name], (theirs[name] - begin[name]) / 2, rtol=1e-9, atol=1e-15)


def test_a_run_that_is_interrupted_takes_the_same_rates(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), MOVING, run_dir=tmp_path / "through", max_steps=8, console=False)
    train(small(dataset), MOVING, run_dir=tmp_path / "cut", max_steps=3, console=False)
    train(small(dataset), MOVING, run_dir=tmp_path / "cut", max_steps=8, console=False)
    assert_identical(tmp_path / "through", tmp_path / "cut")
    train(small(dataset), run_dir=tmp_path / "constant", max_steps=8, console=False)
    with pytest.raises(AssertionError):
        assert_identical(tmp_path / "through", tmp_path / "constant")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate/generator"] for line in lines if "learning_rate/generator" in line}
    config = load_config(small(dataset), MOVING)
    optim = config.optim
    schedule = Schedule(optim.warmup_images, optim.decay, optim.decay_images, optim.decay_to)
    for step, rate in rates.items():
        assert rate == optim.g_lr * schedule((step - 1) * config.train.global_batch), step
    assert len(set(rates.values())) == len(rates) > 1


def test_each_network_may_have_betas_of_its_own(dataset: Path) -> None:
    from gan_dist.distributed.world import World
    from gan_dist.training.setup import build_update

    update = build_update(load_config(small(dataset), ["optim.d_betas=[0, 0.9]"]), World(), "fp32")
    betas = [player.optimizer.param_groups[0]["betas"] for player in (update.g, update.d)]
    assert betas == [(0.5, 0.999), (0.0, 0.9)]


@pytest.mark.parametrize("words", [["optim.decay=linear"], ["optim.decay_images=9"]])
def test_a_fall_without_an_end_is_refused(dataset: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match=r"^(configuration: )?optim\.decay_images: expected 1 or more"):
        load_config(small(dataset), words)
