"""Whole runs: one game at any world size, bit-exact recovery, stops, and what a run directory refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.runs.checkpoint import find
from gan_dist.training import setup
from gan_dist.training.trainer import train
from gan_dist.training.update import Update
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.stop import StopRequest
from tests.helpers.ranks import run_ranks
from tests.helpers.training import (
    assert_identical,
    cli,
    config_file,
    final_state,
    flat,
    small,
    wait_for_step,
    worst_difference,
)


def test_a_run_leaves_what_the_design_says(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = train(small(dataset), run_dir=run, max_steps=6, console=False)
    assert (outcome.step, outcome.images_seen, outcome.stopped) == (6, 48, None)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "samples/step-00000004.png", "samples/real.png"):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())[-1] == "step-00000006"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" not in line] == [2, 4, 6]
    assert set(final_state(run)) >= {
        *("format", "step", "images_seen", "generator", "discriminator", "optimizer_g", "optimizer_d", "config")
    }
    assert "lease" not in {path.name for path in run.iterdir()}


@pytest.mark.parametrize(("steps", "words"), [(3, []), (6, []), (5, ["checkpoint.every_steps=5"]), (4, []), (2, [])])
def test_the_last_step_has_its_samples_whatever_saved_it(
    dataset: Path, tmp_path: Path, steps: int, words: list[str]
) -> None:
    """Of steps 3 and 6 there is a checkpoint already, of step 4 there are samples."""
    run = tmp_path / "run"
    train(small(dataset), words, run_dir=run, max_steps=steps, console=False)
    drawn = [int(path.stem[5:]) for path in sorted((run / "samples").glob("step-*.png"))]
    assert drawn == sorted({0, *range(4, steps + 1, 4), steps})
    train(small(dataset), words, run_dir=run, max_steps=steps, console=False)  # nothing is left to do
    assert len(list((run / "samples").glob("step-*.png"))) == len(drawn)


def test_it_says_who_computes_batch_norm(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, used = tmp_path / "run", []

    def update(*networks: Any, batchnorm_kernels: str, **settings: Any) -> Update:
        used.append(batchnorm_kernels)
        return Update(*networks, **settings)

    monkeypatch.setattr(setup, "Update", update)
    for answer in ("torch", "triton"):  # as on a machine whose Triton has been mended in between
        monkeypatch.setattr(setup, "resolve_kernels", lambda *asked, answer=answer: (answer, "a test says so"))
        train(small(dataset), run_dir=run, max_steps=2 if answer == "torch" else 4)
        assert json.loads((run / "environment.json").read_text())["resolved"]["batchnorm_kernels"] == answer
    told = capsys.readouterr().out
    assert "batch norm by torch: a test says so" in told and "batch norm by triton: a test says so" in told
    assert "batchnorm_kernels resolved to torch before and to triton now" in told
    assert used == ["torch", "triton"]


@pytest.mark.parametrize("stop_at", [3, 4, 5])
def test_stopped_and_continued_is_bit_identical(dataset: Path, tmp_path: Path, stop_at: int) -> None:
    train(small(dataset), run_dir=tmp_path / "whole", max_steps=8, console=False)
    train(small(dataset), run_dir=tmp_path / "parts", max_steps=stop_at, console=False)
    train(small(dataset), run_dir=tmp_path / "parts", max_steps=8, console=False)
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "event" not in line]
    assert steps == sorted(set(steps)) and {2, 4, 6, 8} <= set(steps)


def test_a_request_to_stop_saves_and_says_why(dataset: Path, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.ask("a test")
    outcome = train(small(dataset), run_dir=tmp_path / "run", stop=stop, console=False)
    assert (outcome.stopped, outcome.step) == ("a test", 0)
    assert find(tmp_path / "run").step == 0


def test_the_stop_file_is_obeyed_and_forgotten(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(small(dataset), run_dir=run, max_steps=2, console=False)
    (run / "stop").touch()
    outcome = train(small(dataset), run_dir=run, max_steps=50, console=False)
    assert outcome.stopped is not None and "stop" in outcome.stopped and outcome.step < 50
    assert not (run / "stop").exists()


def test_a_lost_game_ends_and_names_its_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """Learning rates that throw the weights out of float32's range: no later step has finite gradients."""
    run = tmp_path / "run"
    words = ["optim.d_lr=1e20", "optim.g_lr=1e20", "checkpoint.every_steps=2", "log.scalars_every=1"]
    with pytest.raises(GanDistError, match=r"the last 20 steps up to \d+ had non-finite .* checkpoint is of step \d+"):
        train(small(dataset), words, run_dir=run, max_steps=60, console=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    warned = [line for line in lines if line.get("event") == "warning" and "skipped" in line["reason"]]
    assert len(warned) == 20
    assert max(line.get("updates/skipped", 0) for line in lines) >= 19
    assert all(torch.isfinite(tensor).all() for tensor in flat(final_state(run)).values())


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGUSR2, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)]
)
def test_signals_finish_the_step_save_and_exit_75(dataset: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = cli("train", config_file(dataset, tmp_path), "--run-dir", str(run))
    wait_for_step(run, 3)
    process.send_signal(number)
    text, _ = process.communicate()
    assert process.returncode == 75, text
    assert f"stopped by {number.name}" in text and "Traceback" not in text
    assert find(run).step >= 3


@pytest.mark.chaos
def test_killed_and_run_again_it_continues_bit_exactly(dataset: Path, tmp_path: Path) -> None:
    config = config_file(dataset, tmp_path)
    killed = cli("train", config, "--run-dir", str(tmp_path / "killed"))
    wait_for_step(tmp_path / "killed", 9)
    killed.kill()
    killed.communicate()
    end = find(tmp_path / "killed").step + 20
    for run in ("killed", "whole"):
        process = cli("train", config, "--run-dir", str(tmp_path / run), "--max-steps", str(end))
        text, _ = process.communicate()
        assert process.returncode == 0, text
    assert_identical(tmp_path / "killed", tmp_path / "whole")


CASES = [("minimax", 2), ("non_saturating", 1)]  # all four, update by update: test_equivalence.py


def train_cases(dataset: str, out: Path, sync: bool = True) -> None:
    """Trains every case for three steps in float64."""
    for loss, d_steps in CASES:
        words = [f"loss.name={loss}", f"optim.d_steps={d_steps}", "train.precision=fp64", "loss.real_target=0.9"]
        words += ["train.global_batch=7", f"train.sync_batchnorm={str(sync).lower()}"]
        train(small(Path(dataset)), words, run_dir=out / f"{loss}-{d_steps}", max_steps=3, console=False)


def train_as_one_of_two(rank: int, dataset: str, out: str) -> None:
    import torch.distributed as dist

    # One process group for all runs: each call of train joins the one that is there.
    dist.init_process_group("gloo")
    train_cases(dataset, Path(out) / "two")
    train_cases(dataset, Path(out) / "local", sync=False)
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_play_the_game_of_one_and_local_batchnorm_does_not(dataset: Path, tmp_path: Path) -> None:
    train_cases(str(dataset), tmp_path / "one")
    run_ranks(2, train_as_one_of_two, str(dataset), str(tmp_path))
    for case in (f"{loss}-{d_steps}" for loss, d_steps in CASES):
        assert worst_difference(tmp_path / "one" / case, tmp_path / "two" / case) < 1e-9, case
        assert worst_difference(tmp_path / "one" / case, tmp_path / "local" / case) > 1e-6, case


def test_torchrun_joins_its_ranks(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--standalone", "--nproc-per-node", "2", "-m", "gan_dist", "train", config_file(dataset, tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--run-dir", str(run), "--max-steps", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert done.stdout.count("done: step 3") == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.d_steps=2"], "optim.d_steps was 1, now 2"),
        (["train.global_batch=4"], "train.global_batch was 8, now 4"),
        (["seed=1", "train.epochs=1"], "seed was 0, now 1; train.epochs was 100.0, now 1"),
    ],
)
def test_another_game_is_refused_with_the_command_for_a_new_run(
    dataset: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    run = tmp_path / "run"
    train(small(dataset), run_dir=run, max_steps=1, console=False)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        train(small(dataset), overrides, run_dir=run, max_steps=1, console=False, command=["gan-dist", "train", "c"])
    assert words in str(caught.value) and f"gan-dist train c --run-dir {run}-2" in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_may_change_may_change(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(small(dataset), run_dir=run, max_steps=1, console=False)
    words = ["log.grid=9", "checkpoint.keep=1", "train.epochs=200", "dist.timeout_s=60"]
    assert train(small(dataset), words, run_dir=run, max_steps=3, console=False).step == 3


def test_a_new_run_from_another_takes_its_weights_and_its_own_rates(dataset: Path, tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    train(small(dataset), run_dir=parent, max_steps=3, console=False)
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    words = ["optim.g_lr=1e-5", "train.global_batch=4"]
    train(small(dataset), words, run_dir=child, from_run=f"{parent}@3", max_steps=1, console=False)
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    first, origin = find(child, 0).state, find(parent, 3).state
    assert first["step"] == 0 and first["images_seen"] == 0
    assert all(torch.equal(first["generator"][name], tensor) for name, tensor in origin["generator"].items())
    assert find(child).state["optimizer_g"]["param_groups"][0]["lr"] == 1e-5
    assert find(child).manifest["parent"] == f"{parent}@3"
    with pytest.raises(UserError, match=r"model\.g_channels is 4 there and 8 here"):
        train(small(dataset), ["model.g_channels=8"], run_dir=tmp_path / "x", from_run=str(parent), console=False)
    assert not (tmp_path / "x").exists()


def test_bad_input_is_one_line_and_leaves_nothing(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def refusal(*words: str, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            train(small(dataset), words, **{"run_dir": run, "console": False, **more})
        assert "\n" not in str(caught.value) and not run.exists()
        return str(caught.value)

    assert "model.resolution is 64" in refusal("model.resolution=64")
    assert "nowhere" in refusal(f"data.shards={tmp_path / 'nowhere'}")
    assert "--max-steps" in refusal(max_steps=0)
    assert "these metrics need 100 or more" in refusal("evaluate.every_steps=5", "evaluate.samples=100")
    assert "no run at" in refusal(from_run="nobody")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(run_dir=tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("")
    assert "holds no run" in refusal(run_dir=tmp_path / "full")


def train_on_too_little(rank: int, dataset: str, run: str) -> None:
    with pytest.raises(UserError, match=r"2 ranks, but train\.global_batch is 1: each rank needs an image") as caught:
        train(small(Path(dataset)), ["train.global_batch=1"], run_dir=run)
    assert caught.value.reported_elsewhere == (rank != 0), "one line, not one a rank"


def test_more_ranks_than_images_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    run_ranks(2, train_on_too_little, str(dataset), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
