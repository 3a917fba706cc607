"""The averaged generator: its half-life in images, its place in checkpoints, the same on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gan_dist.config.schema import load_config
from gan_dist.distributed.world import World
from gan_dist.runs.checkpoint import find
from gan_dist.runs.run_dir import Start
from gan_dist.sampling.generate import load_generator
from gan_dist.training.optim import EMA, EMA_RAMP
from gan_dist.training.setup import build_ema, build_update
from gan_dist.training.trainer import train
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_identical, small

WITH_EMA = ["train.ema_half_life_images=64"]


def drifting(batch: int, half_life: int, images: int) -> float:
    """Returns how far, in images, the average lags behind a weight that grows by one an image."""
    network, twin = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(network.weight)
    ema = EMA(network, twin, half_life, batch)
    for seen in range(batch, images + 1, batch):
        with torch.no_grad():
            network.weight.fill_(seen)
        ema.update(seen)
    return (network.weight.detach() - ema.network.get_parameter("weight")).item()


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_the_half_life_is_in_images_whatever_the_batch(batch: int) -> None:
    """Behind a constant drift an exponential average lags by its mean age: half-life / ln 2, less half a step."""
    half_life = 1000
    lag = drifting(batch, half_life, images=100_000 - 100_000 % batch)
    assert lag == pytest.approx(half_life / math.log(2) - batch / 2, rel=0.01)


def test_half_is_forgotten_after_a_half_life_and_the_beginning_at_once() -> None:
    network, twin = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    ema = EMA(network, twin, 1000, 10, ramp=False)
    with torch.no_grad():
        network.weight.zero_()
    for step in range(1, 101):
        ema.update(10 * step)
    assert float(ema.network.get_parameter("weight")) == pytest.approx(0.5, rel=1e-4)
    nn.init.ones_(network.weight)
    early = EMA(network, twin, 1000, 10)
    with torch.no_grad():
        network.weight.zero_()
    early.update(10)
    assert float(early.network.get_parameter("weight")) == pytest.approx(0.5 ** (1 / EMA_RAMP))


def test_running_statistics_are_averaged_and_counters_follow() -> None:
    network, twin = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    ema = EMA(network, twin, 10, 10, ramp=False)
    network(torch.randn(4, 3, 5, 5))
    ema.update(10)
    mean, halfway = network.running_mean, ema.network.get_buffer("running_mean")
    assert mean is not None and torch.allclose(halfway, mean / 2)
    assert int(ema.network.get_buffer("num_batches_tracked")) == 1


@pytest.mark.parametrize("d_steps", [1, 3])
def test_a_step_counts_all_images_that_it_shows(dataset: Path, d_steps: int) -> None:
    config = load_config(small(dataset), ["train.ema_half_life_images=64", f"optim.d_steps={d_steps}"])
    update = build_update(config, World(), "fp32")
    ema = build_ema(config, update, Start(parent="another@1"))  # without a ramp
    assert ema is not None
    before = ema.network.get_parameter("convt1.weight").clone()
    with torch.no_grad():
        update.g.network.get_parameter("convt1.weight").add_(1.0)
    ema.update(10**6)
    moved = float((ema.network.get_parameter("convt1.weight") - before).mean())
    assert moved == pytest.approx(1 - 0.5 ** (d_steps * config.train.global_batch / 64), rel=1e-4)


def test_it_is_kept_sampled_and_continued_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), WITH_EMA, run_dir=tmp_path / "whole", max_steps=7, console=False)
    for steps in (3, 5, 7):
        train(small(dataset), WITH_EMA, run_dir=tmp_path / "parts", max_steps=steps, console=False)
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    state = find(tmp_path / "whole").state
    weight = load_generator(tmp_path / "whole").state_dict()["convt1.weight"]
    assert torch.equal(weight, state["generator_ema"]["convt1.weight"])
    assert not torch.equal(weight, state["generator"]["convt1.weight"])


def test_a_new_run_takes_it_over(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), WITH_EMA, run_dir=tmp_path / "parent", max_steps=4, console=False)
    train(
        small(dataset),
        WITH_EMA,
        run_dir=tmp_path / "child",
        from_run=str(tmp_path / "parent"),
        max_steps=1,
        console=False,
    )
    first, parent = find(tmp_path / "child", 0).state, find(tmp_path / "parent").state
    assert torch.equal(first["generator_ema"]["convt2.weight"], parent["generator_ema"]["convt2.weight"])
    after = find(tmp_path / "child", 1).state["generator_ema"]["convt2.weight"]
    own = find(tmp_path / "child", 1).state["generator"]["convt2.weight"]
    kept = (after - first["generator_ema"]["convt2.weight"]).norm() / (
        own - first["generator_ema"]["convt2.weight"]
    ).norm()
    assert float(kept) == pytest.approx(1 - 0.5 ** (8 / 64), rel=1e-2)


def train_ranks(rank: int, dataset: str, out: str) -> None:
    dist.init_process_group("gloo")
    words = [*WITH_EMA, "train.precision=fp64", "train.global_batch=7"]
    train(small(Path(dataset)), words, run_dir=Path(out) / str(dist.get_world_size()), max_steps=4, console=False)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.chaos
def test_it_is_the_same_on_two_ranks(dataset: Path, tmp_path: Path) -> None:
    for size in (1, 2):
        run_ranks(size, train_ranks, str(dataset), str(tmp_path))
    one, two = (find(tmp_path / size).state["generator_ema"] for size in ("1", "2"))
    for name, tensor in one.items():
        scale = tensor.double().abs().max().clamp(min=1e-12)
        assert float((tensor.double() - two[name].double()).abs().max() / scale) < 1e-9, name
