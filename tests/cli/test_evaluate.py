"""gan-dist evaluate as it is typed: figures on stdout, a table or JSON; notes and warnings on stderr; statuses."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gan_dist.cli.main import main
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.evaluation import protocol as evaluation
from gan_dist.runs.record import read_evaluations
from gan_dist.training.trainer import train
from tests.helpers.training import small


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 110 paintings, with checkpoints of steps 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("cli")
    paint_folder(folder / "paintings", 110)
    prepare([folder / "paintings"], folder / "shards", resolution=32)
    words = ["checkpoint.every_steps=1", "checkpoint.keep=5"]
    train(small(folder / "shards"), words, run_dir=folder / "runs" / "monet", max_steps=2, console=False)
    return folder / "runs" / "monet"


@pytest.fixture
def evaluate(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Returns what types `gan-dist evaluate ...` where the run is known by its name, and returns (status, stdout,
    stderr)."""
    monkeypatch.setenv("GAN_DIST_RUNS", str(run.parent))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back what main sets

    def typed(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["gan-dist", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        output = capsys.readouterr()
        return left.value.code or 0, output.out, output.err

    return typed


def test_a_table_of_all_checkpoints(run: Path, evaluate: Any) -> None:
    status, out, err = evaluate("monet", "--all-checkpoints", "--samples", 100, "--inception", "none")
    head, *lines = [line.split() for line in out.splitlines()]
    assert status == 0 and head[:2] == ["step", "images_seen"] and {"swd", "swd_32", "diversity"} <= set(head)
    assert [line[0] for line in lines] == ["0", "1", "2"] and all(len(line) == len(head) for line in lines)
    for line, row in zip(lines, read_evaluations(run), strict=True):
        assert line[head.index("swd")] == f"{row['swd']:.4g}"
    assert "checkpoint 3 of 3: 100 images" in err and "Inception" not in err


def test_json_alone_on_stdout(run: Path, evaluate: Any) -> None:
    status, out, err = evaluate(run, "--json", "--samples", 100, "--seed", 3, "--step", 1, "--held-out", other(run))
    row = json.loads(out)
    assert status == 0 and row["step"] == 1 and row["protocol"]["seed"] == 3 and row["protocol"]["samples"] == 100
    assert 0 <= row["accuracy_held_out"] <= 1 and row in read_evaluations(run)
    assert "note: Inception's metrics need 2049 samples or more, found 100" in err
    rows = json.loads(evaluate(run, "--json", "--all-checkpoints", "--inception", "none")[1])
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["protocol"]["samples"] == 110


def other(run: Path) -> Path:
    """Returns a set that the run did not learn from."""
    folder = run.parent.parent / "other"
    if not folder.exists():
        paint_folder(folder / "paintings", 30, seed=9)
        prepare([folder / "paintings"], folder / "shards", resolution=32)
    return folder / "shards"


def test_warnings_on_stderr_are_of_the_newest_checkpoint(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "warnings", lambda row, most: [f"step {row['step']} looks odd, {most}", "try less"])
    status, out, err = evaluate("monet", "--all-checkpoints", "--json", "--inception", "none")
    *earlier, _ = rows = json.loads(out)
    most = max(row["diversity"] for row in earlier)
    assert status == 0 and err.endswith(f"WARNING: step 2 looks odd, {most}\nWARNING: try less\n")
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nobody", "no run at"),
        ("monet --step 7", "has no checkpoint of step 7; it has: 2, 1, 0"),
        ("monet --step 1 --all-checkpoints", "--step and --all-checkpoints say different things"),
        ("monet --device tpu", "--device: expected auto, cpu or cuda, found tpu"),
        ("monet --samples 10", "--samples: expected 100 or more for these metrics, found 10"),
        ("monet --seed 99999999999999999999999", "--seed: expected a whole number from 0 to"),
        ("monet --floor", "--floor needs 200 real images or more; "),
        ("monet --seed -1", "--seed: expected a whole number from 0 to"),
        ("monet --inception ~/none.pth", "these metrics need 2049 or more"),
        ("monet --dataset /nowhere", "/nowhere is not a dataset"),
    ],
)
def test_a_slip_is_one_line_and_status_2(evaluate: Any, words: str, message: str) -> None:
    status, out, err = evaluate(*words.split())
    assert (status, out) == (2, "") and err.startswith("gan-dist: ") and err.count("\n") == 1 and message in err


def test_classes_that_are_all_too_small_are_a_note(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": 1, "swd": 1.0, "diversity": 1.0}
    monkeypatch.setattr("gan_dist.evaluation.evaluate.evaluate_run", lambda *_: [{**row, "classes": {}}])
    status, out, err = evaluate("monet", "--classes", "--json")
    assert status == 0 and json.loads(out)["classes"] == {} and err.count("no class has 1,000 images") == 1
    monkeypatch.setattr("gan_dist.evaluation.evaluate.evaluate_run", lambda *_: [row])
    assert not evaluate("monet")[2]
