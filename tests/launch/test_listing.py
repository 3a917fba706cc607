"""All runs at one look, read from directories and one call of squeue."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from gan_dist.utils.errors import UserError
from launch import slurm, status
from launch.listing import list_runs, table_lines
from launch.status import status_lines
from launch.submit import Submission


def make_run(home: Path, name: str, job: str, event: str, history: str = "", swd: float | None = None) -> None:
    """Makes a run with a submission, as far as a listing looks at it."""
    run = home / name
    attempts = run / "launch" / "20261122-000000-abcdef" / "attempts" / job
    attempts.mkdir(parents=True)
    made = Submission("20261122-000000-abcdef", "train", job, 0.0, None, (), 1)
    (attempts.parents[1] / "job.json").write_text(json.dumps(asdict(made)))
    if history:
        (attempts / "history").write_text(history.replace(" | ", "\t") + "\n")
    if event:
        (run / "config.yaml").write_text("seed: 0\n")
        (run / "environment.json").write_text('{"host": "node7"}')
        lines: list[dict[str, object]] = [{"event": "start", "step": 0, "time": 0, "total_steps": 90}]
        figures = {
            "throughput/images_per_second": 512.4,
            "throughput/data_wait_fraction": 0.031,
            **({"throughput/gpu_utilization": 0.97} if swd else {}),
            **({"evaluate/swd": swd} if swd else {}),
        }
        lines += [{"step": 40, "images_seen": 640, **figures}, {"step": 50, "images_seen": 800, **figures}]
        lines += [{"event": event, "step": 50, "time": 0}] if event != "start" else []
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_newer_start_by_hand_speaks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job failed before; how it ended then is old."""
    monkeypatch.setattr(slurm, "look", lambda jobs: slurm.View())
    make_run(tmp_path, "art", "4", "stop", "0 | failed | - | rank 1 on b: no disk")
    metrics, history = tmp_path / "art/metrics.jsonl", next(tmp_path.glob("art/launch/*/attempts/4/history"))
    assert [(row.state, row.reason) for row in list_runs(str(tmp_path))] == [("failed", "rank 1 on b: no disk")]
    lines = [{"event": "start", "step": 50, "time": 0, "total_steps": 90}]
    lines += [{"event": "stop", "step": 60, "time": 0, "reason": "SIGINT"}]
    metrics.write_text(metrics.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    os.utime(history, (time.time() - 7200,) * 2)
    assert [(row.state, row.reason) for row in list_runs(str(tmp_path))] == [("stopped", "SIGINT")]
    assert "(SIGINT)" in status_lines(tmp_path / "art")[1]


def test_every_run_has_a_row_that_says_what_it_does_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "trains", "1", "start", swd=0.25)
    make_run(tmp_path, "waits", "2", "stop")
    make_run(tmp_path, "ended", "3", "end", "0 | done | step-00000090 | 90")
    make_run(tmp_path, "broke", "4", "start", "0 | failed | - | rank 1 on b: no disk")
    make_run(tmp_path, "gone", "5", "start")
    make_run(tmp_path, "new", "6", "")
    make_run(tmp_path, "starts", "7", "")
    (tmp_path / ".doctor-1" / "launch").mkdir(parents=True)
    lines = (
        slurm.Queued("1", "RUNNING", "5:00", "node7", "node7", "N/A"),
        slurm.Queued("2", "PENDING", "5:00", "", "(Priority)", "N/A"),
        slurm.Queued("7", "RUNNING", "5:00", "node8", "node8", "N/A"),
    )
    asked: list[int] = []

    def look(jobs: list[slurm.Job]) -> slurm.View:
        asked.append(len(jobs))
        return slurm.View(lines)

    monkeypatch.setattr(slurm, "look", look)
    rows = {row.name: row for row in list_runs(str(tmp_path))}
    assert asked == [7]
    found = {name: (row.state, row.job, row.step, row.node, row.reason) for name, row in rows.items()}
    assert found == {
        "trains": ("running", "1", 50, "node7", None),
        "waits": ("pending", "2", 50, None, "requeued, waits to go on: Priority"),
        "ended": ("done", "3", 50, None, None),
        "broke": ("failed", "4", 50, "node7", "rank 1 on b: no disk"),
        "gone": ("interrupted", "5", 50, "node7", None),
        "new": ("empty", "6", 0, None, None),
        "starts": ("running", "7", 0, "node8", "no step is logged yet"),
    }
    row = rows["trains"]
    assert (row.best_swd, row.images_per_second, row.total_steps, row.data_wait) == (0.25, 512.4, 90, 0.031)
    assert row.gpu_utilization == 0.97 and rows["broke"].gpu_utilization is None  # trained on a CPU
    keys = "name run state job step total_steps images_per_second gpu_utilization data_wait best_swd node reason"
    assert list(asdict(row)) == [*keys.split(), "updated_s"]  # scripts read them
    text = table_lines([row, rows["broke"]])
    assert text[0].split() == [
        "run",
        "state",
        "step",
        "images/s",
        "gpu",
        "data",
        "wait",
        "best",
        "swd",
        "node",
        "job",
        "why",
    ]
    assert text[1].split() == ["trains", "running", "50/90", "512", "97%", "3%", "0.25", "node7", "1"]
    assert table_lines([rows["starts"]])[1].split()[:5] == ["starts", "running", "-", "-", "-"]
    assert text[2].endswith("rank 1 on b: no disk") and json.dumps(asdict(row))


def test_a_run_without_a_step_says_so_and_one_without_a_file_has_no_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, "begins", "1", "start")
    lines = (tmp_path / "begins" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "begins" / "metrics.jsonl").write_text(lines[0] + "\n")
    make_run(tmp_path, "configured", "2", "")
    (tmp_path / "configured" / "config.yaml").touch()
    line = slurm.Queued("1", "RUNNING", "5:00", "node7", "node7", "2026-01-01T00:00:00")
    monkeypatch.setattr(slurm, "look", lambda jobs: slurm.View((line,)))
    rows = {row.name: row for row in list_runs(str(tmp_path))}
    assert (rows["begins"].state, rows["begins"].reason) == ("running", "no step is logged yet")
    assert rows["begins"].updated_s is not None and rows["configured"].updated_s is None


def test_a_home_without_runs_is_one_line_and_a_silent_squeue_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no run in "):
        list_runs(str(tmp_path))
    make_run(tmp_path, "trains", "1", "start")
    monkeypatch.setattr("launch.listing.look", lambda runs: status.Queue(slurm.View(), "not known: squeue failed"))
    (row,) = list_runs(str(tmp_path))
    assert (row.state, row.reason) == ("running", "not known: squeue failed")


def test_what_cannot_be_seen_is_not_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague's jobs (PrivateData), and those of another cluster: `ls` and `status` say so, unless they ended."""
    make_run(tmp_path, "begins", "1", "")
    make_run(tmp_path, "trains", "2", "start")
    make_run(tmp_path, "ended", "3", "stop", "0 | stopped | step-00000050 | the file stop")
    monkeypatch.setattr(slurm, "cluster_name", lambda: "here")
    monkeypatch.setattr(slurm, "look", lambda jobs: slurm.View(hidden=frozenset(jobs)))
    rows = {row.name: (row.state, row.reason) for row in list_runs(str(tmp_path))}
    hidden = f"cannot be seen: SLURM shows jobs to their owners only (PrivateData); ask {slurm.user_name()}"
    assert rows == {"begins": ("empty", hidden), "trains": ("running", hidden), "ended": ("stopped", "the file stop")}
    lines = status.status_lines(tmp_path / "ended")
    assert lines[1].startswith("  stopped step=50/90") and lines[2].endswith(
        "(train, 1 rank(s)): stopped: the file stop"
    )
    assert hidden in status.status_lines(tmp_path / "begins")[2]
    assert status.status_lines(tmp_path / "trains")[1].startswith("  running step=50/90")
    shutil.rmtree(tmp_path / "trains" / "launch")  # one that `launch local` trains just now has no job at all
    (tmp_path / "trains" / "metrics.jsonl").touch()
    assert status.status_lines(tmp_path / "trains")[1].startswith("  running step=50/90")
    make_run(tmp_path, "other", "2", "start")
    monkeypatch.setattr(slurm, "look", lambda jobs: slurm.View(elsewhere=frozenset(jobs)))
    elsewhere = "not known here: a job of cluster None, and this is here"
    assert {row.name: row.reason for row in list_runs(str(tmp_path))}["other"] == elsewhere
