"""Evaluation while a run trains: the game is not disturbed, the best checkpoint stays, a wish to stop is heard."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.distributed.world import World
from gan_dist.evaluation import protocol as evaluate
from gan_dist.evaluation.evaluate import EvaluationOptions, evaluate_run
from gan_dist.evaluation.protocol import Evaluation
from gan_dist.report.report import make_report
from gan_dist.runs.checkpoint import find, read_best, save, step_directories
from gan_dist.runs.record import by_protocol, read_run
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from gan_dist.utils.stop import StopRequest
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_identical, small

EVALUATE = ["evaluate.every_steps=2", "evaluate.samples=100", "train.ema_half_life_images=64"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 paintings at 32x32."""
    folder = tmp_path_factory.mktemp("many")
    paint_folder(folder / "paintings", 110)
    prepare([folder / "paintings"], folder / "shards", resolution=32, shard_samples=50)
    return folder / "shards"


def play(many: Path, run: Path, *words: str, steps: int = 5, **more: Any) -> Any:
    return train(small(many), [*EVALUATE, *words], run_dir=run, max_steps=steps, **{"console": False, **more})


def test_not_a_bit_of_the_game_is_changed(
    many: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    play(many, tmp_path / "evaluated", f"evaluate.held_out={dataset}", console=True)
    assert "of held-out ones for real" in capsys.readouterr().out
    play(many, tmp_path / "left_alone", "evaluate.every_steps=0")
    assert_identical(tmp_path / "evaluated", tmp_path / "left_alone")
    run = read_run(tmp_path / "evaluated")
    assert [row["step"] for row in run.evaluations] == [2, 4, 5]  # each second step, and the last
    assert {"swd_32", "swd_16", "diversity", "near_copies", "accuracy_training", "accuracy_held_out", "seconds"} <= set(
        run.evaluations[0]
    )
    spent, whole = sum(row["seconds"] for row in run.evaluations), time.monotonic() - began
    assert spent / whole < run.evaluations[-1]["share_of_time"] < 1
    assert run.evaluations[-1]["diversity"] < 0.5 and not [e for e in run.events if e["event"] == "warning"]
    points = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [point["step"] for point in points if "event" not in point]
    assert steps == sorted(set(steps)), "a step stands twice"
    assert "<h2>Evaluation</h2>" in make_report(run.path).read_text()


def test_what_is_evaluated_is_what_will_be_drawn(many: Path, tmp_path: Path) -> None:
    """The averaged generator where there is one: the checkpoint's, by the same protocol, gives the same figure.

    An average with an endless half-life stays its parent's generator, which draws grey, while the living one, at a
    rate of 0.2, draws colours: no rounding brings their figures together."""
    play(many, tmp_path / "parent", "evaluate.every_steps=0", steps=1)
    for name, half_life in (("averaged", 10**12), ("plain", 0)):
        run, words = tmp_path / name, ("optim.g_lr=0.2", f"train.ema_half_life_images={half_life}")
        play(many, run, *words, steps=4, from_run=str(tmp_path / "parent"))
        row = read_run(run).evaluations[-1]
        (again,) = evaluate_run(World(), run, EvaluationOptions(samples=100, inception="none"))
        assert again["swd"] == pytest.approx(row["swd"], rel=1e-2)
        assert row["protocol"]["averaged"] == (name == "averaged")
    living, averaged = (
        evaluate_run(World(), tmp_path / "averaged", EvaluationOptions(samples=100, inception="none", averaged=which))[
            0
        ]["swd"]
        for which in (False, True)
    )
    assert living != pytest.approx(averaged, rel=0.05)


def test_figures_of_two_protocols_stay_apart(many: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    play(many, run, steps=4)
    play(many, run, "evaluate.samples=110", steps=6)
    evaluate_run(World(), run, EvaluationOptions(samples=100, inception="none"))
    rows = read_run(run).evaluations
    assert [(row["step"], row["protocol"]["samples"]) for row in rows] == [(2, 100), (4, 100), (6, 110), (6, 100)]
    assert all(row["protocol"]["averaged"] and row["protocol"]["dataset"] for row in rows)
    assert [[row["step"] for row in group] for group in by_protocol(rows)] == [[2, 4, 6], [6]]
    page = make_report(run).read_text()
    assert "100 images against as many" in page and "110 images against as many" in page
    assert "Protocol at step" not in page  # it stands beside the figures, not among what happened
    # Measured again in the same way, what training noted beside the figures stays.
    evaluate_run(World(), run, EvaluationOptions(step=6, samples=110, inception="none"))
    assert len(read_run(run).evaluations) == 4 and read_run(run).evaluations[2]["seconds"] > 0


def test_the_best_checkpoint_is_marked_and_kept(many: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    play(many, run, "checkpoint.keep=1", "optim.g_lr=0.05", "checkpoint.every_steps=1", steps=8)
    rows = read_run(run).evaluations
    best = min(rows, key=lambda row: row["swd"])
    marked = read_best(run / "checkpoints")
    assert marked is not None and (marked["step"], marked["swd"]) == (best["step"], best["swd"])
    assert [int(path.name[5:]) for path in step_directories(run / "checkpoints")] == sorted({8, best["step"]})[::-1]
    assert find(run, best["step"]).manifest["best"]["swd"] == best["swd"]
    # A run that goes on knows what was the best; another protocol's figure is another matter.
    play(many, run, "checkpoint.keep=1", "optim.g_lr=0.05", "checkpoint.every_steps=1", steps=10)
    again = min(read_run(run).evaluations, key=lambda row: row["swd"])
    marked = read_best(run / "checkpoints")
    assert marked is not None and marked["swd"] == again["swd"]


def test_the_best_outlives_newer_ones_until_it_is_beaten(tmp_path: Path) -> None:
    for step, figure in ((1, 9.0), (2, 5.0), (3, None), (4, None), (5, 4.0), (6, None)):
        best = {"best": {"step": step, "swd": figure}} if figure else {"best": None}
        save(tmp_path, {"step": step, "images_seen": step, "generator": {}}, best, keep=1)
        if step == 4:
            assert [path.name[-1] for path in step_directories(tmp_path)] == ["4", "2"]
    assert [path.name[-1] for path in step_directories(tmp_path)] == ["6", "5"]
    assert read_best(tmp_path) == {"step": 5, "swd": 4.0}


def test_a_wish_to_stop_is_heard_within_an_evaluation(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, real = StopRequest(), Evaluation._reals

    def wished(self: Evaluation, lo: int, hi: int) -> Any:
        stop.ask("a test")
        return real(self, lo, hi)

    monkeypatch.setattr(Evaluation, "_reals", wished)
    outcome = play(many, tmp_path / "run", steps=50, stop=stop)
    assert outcome.stopped == "a test" and outcome.step == 3  # the step after the one that was being evaluated
    assert not read_run(tmp_path / "run").evaluations
    monkeypatch.undo()
    play(many, tmp_path / "run", steps=6)
    play(many, tmp_path / "whole", steps=6)
    assert_identical(tmp_path / "run", tmp_path / "whole")


def test_a_collapse_is_a_warning_with_what_to_try(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "YOUNG_IMAGES", 45 * 6)
    play(many, tmp_path / "run", "optim.g_lr=1e-9", "evaluate.every_steps=45", "log.samples_every=99", steps=45)
    (reason,) = [event["reason"] for event in read_run(tmp_path / "run").events if event["event"] == "warning"]
    assert "collapses to few" in reason and "try a lower optim.g_lr" in reason


def test_a_young_runs_collapse_is_known_by_what_it_had(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([0.2, 1, 0.45, 1, 0.25, 1])  # of samples and of real images, at steps 2, 4 and 6
    monkeypatch.setattr(evaluate, "pairwise_distance", lambda *_: next(distances))
    play(many, tmp_path / "run", steps=6)
    warned = [event for event in read_run(tmp_path / "run").events if event["event"] == "warning"]
    assert [event["step"] for event in warned] == [6]
    assert "differ 25% as much as real images do, after 45%: the generator collapses" in warned[0]["reason"]


def test_rates_tell_of_training_alone(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, clock, idle = Evaluation._reals, time.monotonic, 0

    def slow(self: Evaluation, lo: int, hi: int) -> Any:
        nonlocal idle
        idle += 10_000
        return real(self, lo, hi)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + idle)
    monkeypatch.setattr(Evaluation, "_reals", slow)
    play(many, tmp_path / "run", "log.scalars_every=1", steps=2)
    point = read_run(tmp_path / "run").points[-1]
    assert point["evaluate/seconds"] > 10_000 > point["throughput/step_seconds"]


def test_what_it_cannot_have_is_refused_before_anything_is_written(many: Path, dataset: Path, tmp_path: Path) -> None:
    paint_folder(tmp_path / "few", 3)
    prepare([tmp_path / "few"], tmp_path / "big", resolution=64)
    for match, words in (
        ("expected 110 or fewer", ["evaluate.samples=111"]),
        ("expected 100 or more", ["evaluate.samples=99"]),
        ("evaluate.held_out: .* holds 64x64 images", [f"evaluate.held_out={tmp_path / 'big'}"]),
        ("evaluate.held_out: .* is what the run learns from", [f"evaluate.held_out={many}"]),
        ("keeps only a part of the dataset here", ["data.placement=windowed", "data.window_shards=1"]),
        (
            "keeps only a part of the dataset here",
            [f"data.shards=file://{many}", "data.window_shards=1", f"data.cache_dir={tmp_path / 'cache'}"],
        ),
    ):
        with pytest.raises(UserError, match=match):
            play(many, tmp_path / "run", *words)
        assert not (tmp_path / "run" / "config.yaml").exists()


def train_ranks(rank: int, dataset: str, held_out: str, out: str) -> None:
    words = ["train.precision=fp64", "train.global_batch=6", f"evaluate.held_out={held_out}"]
    play(Path(dataset), Path(out) / os.environ["WORLD_SIZE"], *words, steps=4)


@pytest.mark.chaos
def test_ranks_evaluate_what_one_would(many: Path, dataset: Path, tmp_path: Path) -> None:
    for size in (1, 2, 3):
        run_ranks(size, train_ranks, str(many), str(dataset), str(tmp_path))
    one, two, three = (read_run(tmp_path / size).evaluations for size in ("1", "2", "3"))
    names = ("swd", "swd_32", "swd_16", "diversity", "near_copies", "accuracy_training", "accuracy_held_out")
    for other in (two, three):
        for mine, theirs in zip(one, other, strict=True):
            for name in names:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
