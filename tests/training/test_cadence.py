"""When checkpoints are made: by steps, by the clock, at the ends of epochs; and how long they stay."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from gan_dist.data.dataset import open_dataset
from gan_dist.runs.checkpoint import load, step_directories
from gan_dist.training.trainer import train
from tests.helpers.ranks import run_ranks
from tests.helpers.training import small


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in step_directories(run / "checkpoints"))


def test_the_end_of_every_epoch_is_kept_beyond_the_newest(dataset: Path, tmp_path: Path) -> None:
    run, images = tmp_path / "run", open_dataset(dataset).num_samples
    words = ["checkpoint.keep_epochs=true", "checkpoint.keep=1", "checkpoint.every_steps=4"]
    train(small(dataset), words, run_dir=run, max_steps=30, console=False)
    ends = [step for step in range(1, 31) if step * 8 // images > (step - 1) * 8 // images]
    assert len(ends) >= 3
    assert steps(run) == sorted({*ends, 30})
    assert load(run / "checkpoints" / f"step-{ends[0]:08d}").manifest["kept"] is True


def train_by_the_clock(rank: int, dataset: str, run: str) -> None:
    dist.init_process_group("gloo")
    clock, ticks = time.monotonic, itertools.count()
    time.monotonic = lambda: clock() + 0.1 * next(ticks)  # on the fastest machine many a minute passes
    words = ["checkpoint.every_steps=0", "checkpoint.every_minutes=0.01", "checkpoint.keep=1000"]
    train(small(Path(dataset)), words, run_dir=run, max_steps=150, console=False)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.chaos
def test_the_clock_of_rank_0_makes_all_ranks_save_the_same_step(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(2, train_by_the_clock, str(dataset), str(run))
    found = steps(run)
    assert found[0] == 0 and found[-1] == 150 and len(found) >= 4, found
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("checkpoint/stall_seconds", 0) > 0 for line in lines)
