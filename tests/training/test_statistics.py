"""A step's figures: computed without waiting for the device, read some steps later, and written as if at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gan_dist.model.augment import NO_AUGMENT
from gan_dist.runs.checkpoint import find
from gan_dist.training import checkpointer, trainer
from gan_dist.training.control import WORD_LAG, ControlRing
from gan_dist.training.evaluator import Evaluator
from gan_dist.training.statistics import StepStatistics, update_ratio
from gan_dist.training.trainer import train
from gan_dist.training.update import STATS, Update
from gan_dist.utils.stop import StopRequest
from tests.helpers.games import CPU
from tests.helpers.training import assert_identical, small


@pytest.mark.parametrize("fused", [True, False])
def test_the_update_ratio_is_the_newest_moves(fused: bool) -> None:
    weights = [
        torch.nn.Parameter(torch.randn(7, 3)),
        torch.nn.Parameter(torch.randn(5)),
        torch.nn.Parameter(torch.ones(2)),
    ]
    optimizer = torch.optim.Adam(weights, lr=0.01, betas=(0.5, 0.999), fused=fused)
    assert update_ratio(optimizer) == 0
    for _ in range(4):
        before = torch.cat([weight.detach().flatten() for weight in weights])
        optimizer.zero_grad()
        for weight in weights[:2]:  # the third is never moved
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        after = torch.cat([weight.detach().flatten() for weight in weights])
        expected = (after - before).norm() / after[:-2].norm()
        torch.testing.assert_close(update_ratio(optimizer), expected, rtol=1e-4, atol=0)


def test_what_a_log_needs_is_queued_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():  # on which every look at a value raises
        players = []
        for _ in range(2):
            weights = [torch.nn.Parameter(torch.empty(size, device="cuda")) for size in ((8, 4), (3,))]
            optimizer = torch.optim.Adam(weights, capturable=True)
            for weight in weights:
                moments = {name: torch.empty_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.empty((), device="cuda"), **moments}
            players.append(SimpleNamespace(optimizer=optimizer, parameters=weights, lr=2e-4))
        update: Any = SimpleNamespace(g=players[0], d=players[1], augment=NO_AUGMENT)
        statistics = StepStatistics(update, 10)
        statistics.start(0, 0, 0.0)
        busy: list[Any] = [97, RuntimeError("NVML: not supported"), 50]

        def utilization() -> int:
            answer = busy.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        monkeypatch.setattr(torch.cuda, "utilization", utilization)
        told = []
        for step in (1, 2, 3):
            noted = statistics.note(step, 8 * step, 0.0, torch.empty(len(STATS), device="cuda"))
            assert noted.device.type == "cuda" and noted.shape == (len(STATS) + 2,)
            computed = statistics.compute(step, [0.0] * (len(STATS) + 2), 0)
            assert computed is not None
            told.append(computed[1].get("throughput/gpu_utilization"))
        assert told == [0.97, None, None] and busy == [50]  # a driver that does not tell is not asked again


class LateRing(ControlRing):
    """Reads as on a GPU, some steps later."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.lag = WORD_LAG


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "event" not in line]
    assert len({line["step"] for line in logged}) == len(logged)  # each stands once
    return {line["step"]: line for line in logged}


def of_the_game(lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Returns the lines without what depends on a clock."""
    timed = ("throughput/", "checkpoint/", "evaluate/seconds", "evaluate/share_of_time", "memory/")
    return {
        step: {key: value for key, value in line.items() if not key.startswith(timed)} for step, line in lines.items()
    }


def test_figures_that_are_read_later_are_those_of_their_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "is_due", lambda self, step, end: step % 7 == 0)
    monkeypatch.setattr(Evaluator, "evaluate", lambda self, step, *words: {"evaluate/swd": float(step)})
    words = ["log.scalars_every=2", "checkpoint.every_steps=5"]
    train(small(dataset), words, run_dir=tmp_path / "at once", max_steps=15, console=False)
    monkeypatch.setattr(trainer, "ControlRing", LateRing)
    train(small(dataset), words, run_dir=tmp_path / "later", max_steps=15, console=False)
    assert_identical(tmp_path / "at once", tmp_path / "later")
    later = metrics(tmp_path / "later")
    assert of_the_game(later) == of_the_game(metrics(tmp_path / "at once"))
    assert sorted(later) == [2, 4, 6, 7, 8, 10, 12, 14, 15]
    assert all(line["throughput/images_per_second"] > 0 for line in later.values())
    assert later[7]["evaluate/swd"] == 7 and "loss/generator" in later[7] and "evaluate/swd" not in later[8]


def test_a_checkpoint_is_never_ahead_of_its_figures(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Any = vars(checkpointer)["save"]
    found = []

    def look(directory: Path, state: Any, facts: Any, *, keep: int, guard: Callable[[], None]) -> Path:
        def then() -> None:
            guard()
            found.append((state["step"], max(metrics(tmp_path / "run"), default=0)))

        path: Path = honest(directory, state, facts, keep=keep, guard=then)
        return path

    monkeypatch.setattr(checkpointer, "save", look)
    monkeypatch.setattr(trainer, "ControlRing", LateRing)
    words = ["log.scalars_every=1", "checkpoint.every_steps=3"]
    train(small(dataset), words, run_dir=tmp_path / "run", max_steps=10, console=False)
    assert [step for step, _ in found] == [0, 3, 6, 9, 10]
    assert all(logged >= step for step, logged in found)


@pytest.mark.parametrize("asked_at", [2, 3, 8])
def test_a_stop_leaves_no_figure_out_and_goes_on_where_it_was(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_at: int
) -> None:
    monkeypatch.setattr(trainer, "ControlRing", LateRing)
    words = ["log.scalars_every=1", "checkpoint.every_steps=100"]
    whole, parts, step, stop = tmp_path / "whole", tmp_path / "parts", Update.step, StopRequest()
    train(small(dataset), words, run_dir=whole, max_steps=20, console=False)
    calls = iter(range(1, 99))

    def asked(self: Update, *given: Any) -> Tensor:
        if next(calls) == asked_at:
            stop.ask("a test")
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Update, "step", asked)
        outcome = train(small(dataset), words, run_dir=parts, max_steps=20, stop=stop, console=False)
    # Asked in a step's call, it is in the next step's word, and that is read some steps later.
    assert outcome.stopped == "a test" and outcome.step == find(parts).step == asked_at + 1 + WORD_LAG
    assert sorted(metrics(parts)) == list(range(1, outcome.step + 1))
    train(small(dataset), words, run_dir=parts, max_steps=20, console=False)
    assert_identical(whole, parts)
    assert of_the_game(metrics(parts)) == of_the_game(metrics(whole))


def test_an_update_skipped_in_the_last_steps_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ControlRing", LateRing)
    generator_pass, calls = Update.generator_pass, iter(range(1, 99))

    def broken(self: Update, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        loss, extras = generator_pass(self, fake, real)
        return (loss * float("nan"), extras) if next(calls) == 6 else (loss, extras)

    monkeypatch.setattr(Update, "generator_pass", broken)
    run = tmp_path / "run"
    train(small(dataset), ["log.scalars_every=1"], run_dir=run, max_steps=7, console=False)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert warning["reason"].startswith("step 6: an update was skipped")
    assert [line["updates/skipped"] for _, line in sorted(metrics(run).items())] == [0, 0, 0, 0, 0, 1, 1]


def test_a_ring_reads_each_step_once_and_in_order() -> None:
    ring = LateRing(CPU, 9)
    pushed = [(step, [float(step)] * (3 + step % 2)) for step in range(1, 8)]  # some have more to tell than others
    read = [word for step, values in pushed for word in ring.push(step, torch.tensor(values))]
    assert read == pushed[:-WORD_LAG] and ring.drain() == pushed[-WORD_LAG:] and ring.drain() == []
    assert ring.push(8, torch.zeros(3)) == []
