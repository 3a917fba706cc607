"""128 pixels end to end: killed and continued, and grown from 64, on one rank and on two."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml

from gan_dist.runs.checkpoint import find
from tests.helpers.datasets import write_dataset
from tests.helpers.processes import LIMIT, Ranks
from tests.helpers.training import assert_identical, cli, wait_for_step, worst_difference

MODEL = {"latent_dim": 8, "max_channels": 8, "upsample": "nearest", "d_norm": "none", "init": "he"}
GAME = {
    "model": {**MODEL, "resolution": 128, "g_channels": 4, "d_channels": 4},
    "loss": {"gradient_penalty": {"weight": 0.03, "share": 0.5}},
    "train": {"global_batch": 4, "device": "cpu", "ema_half_life_images": 100, "ema_statistics": "standing"},
    "log": {"scalars_every": 1, "samples_every": 3, "grid": 4},  # drawing takes longer than steps do
    "checkpoint": {"every_steps": 2},
}


@pytest.mark.chaos
def test_a_run_at_128_is_killed_and_continued_and_grows_from_64(tmp_path: Path) -> None:
    for side in (64, 128):
        write_dataset(tmp_path / str(side), (9, 7), side)
        file = tmp_path / f"{side}.yaml"
        file.write_text(yaml.safe_dump({**GAME, "data": {"shards": str(tmp_path / str(side))}}))
    small = ["model.resolution=64", "model.g_channels=8", "model.d_channels=8"]

    def train(run: str, *words: str, steps: int = 6) -> str:
        running = cli("train", *words, "--run-dir", str(tmp_path / run), "--max-steps", str(steps))
        said, _ = running.communicate(timeout=LIMIT)
        assert running.returncode == 0, said
        return said

    train("parent", str(tmp_path / "64.yaml"), *small, steps=3)
    grows = [str(tmp_path / "128.yaml"), "--from", str(tmp_path / "parent")]
    assert "generator grown from 64 to 128 pixels" in train("whole", *grows)

    running = cli("train", *grows, "--run-dir", str(tmp_path / "killed"), "--max-steps", "6")
    wait_for_step(tmp_path / "killed", 2)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=LIMIT)
    assert running.returncode == -signal.SIGKILL and find(tmp_path / "killed").step < 6
    assert "continues at step" in train("killed", *grows)
    assert_identical(tmp_path / "whole", tmp_path / "killed")

    # Both ranks grow alike, and play as one.
    words = ["train.precision=fp64", "--from", str(tmp_path / "parent"), "--max-steps", "3"]
    train("one", str(tmp_path / "128.yaml"), *words[:-1], "3", steps=3)
    ranks = Ranks(2, str(tmp_path / "128.yaml"), tmp_path / "two", *words)
    assert ranks.wait() == [0, 0], ranks.log(0) + ranks.log(1)
    assert worst_difference(tmp_path / "one", tmp_path / "two") < 1e-9

    refused = cli(
        "train",
        str(tmp_path / "128.yaml"),
        "model.g_channels=16",
        "model.max_channels=null",
        *grows[1:],
        "--run-dir",
        str(tmp_path / "no"),
    )
    said, _ = refused.communicate(timeout=LIMIT)
    assert refused.returncode == 2 and said.count("\n") == 1 and "model.max_channels=8" in said, said
    assert not (tmp_path / "no").exists()
