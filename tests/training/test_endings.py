"""How a run on GPUs ends: what it recorded is freed before the ranks part, and a device that hangs holds nothing up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gan_dist.training import setup
from gan_dist.training.runner import Captured, Eager
from gan_dist.training.trainer import train
from tests.helpers.fake_cuda import FakeGraph, play_cuda
from tests.helpers.games import batches, game
from tests.helpers.ranks import run_ranks
from tests.helpers.training import small


def test_a_captured_runner_waits_for_its_last_replay_and_frees_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, update = play_cuda(monkeypatch), game()
    for orderly in (True, False):
        runner: Any = Captured(update, "a test")
        runner.step(*batches(update, 0))
        graph: FakeGraph = runner.graph
        waits.clear()
        runner.close(orderly)
        assert graph.calls == ["replay", "reset"] and runner.graph is None and not runner.inputs
        assert waits == (["synchronize"] if orderly else [])


def test_a_broken_device_that_refuses_the_reset_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: FakeGraph) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    play_cuda(monkeypatch)
    monkeypatch.setattr(FakeGraph, "reset", refuse)
    runner, update = Captured(game(), "a test"), game()
    runner.step(*batches(update, 0))
    runner.close(orderly=False)
    assert runner.graph is None


def train_and_note_the_end(rank: int, dataset: str, out: str) -> None:
    """Trains as one of two ranks, once to the end and once into an error; notes what is called in which order."""
    calls: list[str] = []
    destroy, fail_at = dist.destroy_process_group, 99

    class Recorded(Eager):
        def step(self, *words: Any) -> torch.Tensor:
            if self.update.g.optimizer.state[self.update.g.parameters[0]]["step"] >= fail_at:
                raise ValueError("a test")
            return super().step(*words)

        def close(self, orderly: bool = True) -> None:
            calls.append(f"close, orderly={orderly}")

    def note(*words: Any) -> None:
        calls.append("destroy")
        destroy(*words)

    setup.make_runner = lambda name, update: Recorded(update, "a test")  # type: ignore[attr-defined]
    dist.destroy_process_group = note  # type: ignore[assignment]
    train(small(Path(dataset)), run_dir=f"{out}/run", max_steps=2, console=False)
    assert calls == ["close, orderly=True", "destroy"]
    calls.clear()
    fail_at = 3
    with pytest.raises(ValueError, match="a test"):
        train(small(Path(dataset)), run_dir=f"{out}/run", max_steps=9, console=False)
    assert calls == ["close, orderly=False", "destroy"]
    Path(out, str(rank)).touch()


def test_the_runner_is_closed_before_the_process_group_is_destroyed(dataset: Path, tmp_path: Path) -> None:
    run_ranks(2, train_and_note_the_end, str(dataset), str(tmp_path))
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
