"""The words that ranks leave about how they ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gan_dist.utils.errors import GanDistError
from gan_dist.utils.stop import Cancelled
from launch.job import rank
from launch.job.rank import STOP
from launch.job.torchrun import verdict

ROOT = Path(__file__).parents[3]


class Failing(rank.TrainJob):
    """A rank in which training raises `error`."""

    error: GanDistError

    def train(self) -> None:
        """Raises it."""
        raise self.error


def words_of(error: GanDistError, attempt: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, str]]:
    """Returns (the status of a rank that raises `error`, the words that it left by file)."""
    for key, value in {rank.ATTEMPT: str(attempt), "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(rank, "ignore_signals", lambda: None)
    monkeypatch.setattr(Failing, "error", error, raising=False)
    status = Failing("config", (), "run").run()
    return status, {file.name: file.read_text() for file in attempt.iterdir()}


def test_a_stop_before_there_was_anything_to_save_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STOP, "reason", "SIGUSR2")
    files = {"stopped": "requeue SIGUSR2, while data were fetched\n"}
    assert words_of(Cancelled("stopped by SIGUSR2"), tmp_path, monkeypatch) == (0, files)
    assert verdict(tmp_path, 0) == 75
    (tmp_path / "stopped").unlink()
    elsewhere = Cancelled("stopped by SIGUSR2")
    elsewhere.reported_elsewhere = True
    assert words_of(elsewhere, tmp_path, monkeypatch) == (0, {})


def test_a_failure_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, words = words_of(GanDistError("no\nroom"), tmp_path, monkeypatch)
    assert status == 1 and words["failed-0"].split("\t")[1:4] == ["1", "error", "0"]
    assert words["failed-0"].endswith("\tno room\n") and list(words) == ["failed-0"]


def test_wrong_arguments_are_reported_as_bad_usage(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.job.rank", "train", "small.yaml", "--max-steeps", "3", "--run-dir", "run"],
        env={**os.environ, rank.ATTEMPT: str(tmp_path), "SLURM_PROCID": "3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    message = "unrecognized arguments: --max-steeps 3; expected the arguments of `gan-dist train`"
    assert done.returncode == 2 and done.stderr == f"gan-dist: {message}\n"
    assert (tmp_path / "failed-3").read_text().split("\t")[1:4] == ["2", "error", "3"]


def test_threads_follow_the_processors_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a person stand; outside of a job there is one, as under torchrun."""
    cases: list[tuple[dict[str, str], str]] = [
        ({"SLURM_CPUS_PER_TASK": "8"}, "8"),
        ({"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "2"}, "2"),
        ({"SLURM_CPUS_PER_TASK": ""}, "1"),
        ({}, "1"),
    ]
    for env, threads in cases:
        with monkeypatch.context() as patch:
            for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            words_of(ValueError("no"), tmp_path, patch)  # type: ignore[arg-type]
            assert os.environ["OMP_NUM_THREADS"] == threads, env
    shares = [rank.threads_of_ranks({"SLURM_CPUS_PER_TASK": "8"}, ranks) for ranks in (1, 3, 4, 16)]
    assert shares == [8, 2, 2, 1]  # of torchrun's ranks, which share one task


def test_what_cannot_be_imported_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Exception = ImportError("libcudart.so.12: cannot open shared object file")
    status, words = words_of(missing, tmp_path, monkeypatch)  # type: ignore[arg-type]
    assert status == 2 and words["failed-0"].split("\t")[1:3] == ["2", "error"]
    status, words = words_of(ValueError("no"), tmp_path, monkeypatch)  # type: ignore[arg-type]
    assert status == 1 and words["failed-0"].endswith("\tValueError: no\n")


def test_other_ranks_stay_until_the_report_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or srun would end rank 0 a minute after they have left; and not for ever, in case there is none."""
    began = time.monotonic()
    timer = threading.Timer(0.5, (tmp_path / rank.REPORTED).touch)
    timer.start()
    rank.await_report(tmp_path)
    timer.join()
    assert 0.4 < time.monotonic() - began < 20
    monkeypatch.setattr(rank, "REPORT_S", 0.1)
    rank.await_report(tmp_path / "nowhere")
