"""What `status`, `logs` and the way to TensorBoard say, read from directories alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest

from gan_dist.utils.errors import UserError
from launch import slurm
from launch.job.command import options_of_element
from launch.listing import make_row
from launch.status import (
    SKEW_S,
    Attempt,
    Queue,
    all_runs,
    attempts_of,
    ending_of,
    find_run,
    follow,
    last_word,
    rank_logs,
    state_of,
    status_lines,
    why_no_log,
)
from launch.submit import Submission, submissions
from launch.tensorboard import how_to_reach


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two submissions and no SLURM in sight."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "art"
    for number, (job, kind, after) in enumerate((("7", "prepare", None), ("8", "train", "7")), start=1):
        folder = run / "launch" / f"2026112{number}-000000-abcdef"
        folder.mkdir(parents=True)
        made = Submission(folder.name, kind, job, 0.0, "abc", ("x",), 2, after)
        (folder / "job.json").write_text(json.dumps(asdict(made)))
    (run / "launch" / "junk").mkdir()
    (run / "launch" / "junk" / "job.json").write_text("{")
    (run / "logs").mkdir()
    return run


def history(run: Path, number: int, job: str, *lines: str) -> None:
    folder = run / "launch" / f"2026112{number}-000000-abcdef" / "attempts" / job
    folder.mkdir(parents=True)
    (folder / "history").write_text("".join(line.replace(" | ", "\t") + "\n" for line in lines))


def test_status_shows_restarts_and_the_last_outcome(run: Path) -> None:
    history(run, 1, "7_0", "0 | done | - | ended well")
    history(
        run,
        2,
        "8",
        "0 | requeued | step-00000010 | SIGUSR2",
        "1 | crashed | step-00000020 | rank 1 on b: Killed | lost",
        "2 | failed | step-00000030 | it broke",
    )
    text = "\n".join(status_lines(run))
    assert "not begun" in text
    assert "job 7 (prepare, 2 element(s)): done: ended well" in text
    assert "job 8 (train, 2 rank(s)): failed: it broke" in text
    assert "2 restart(s); the last one: crashed at step-00000020: rank 1 on b: Killed" in text
    assert [attempt.restart for attempt in attempts_of(run, submissions(run)[1])] == [0, 1, 2]


def test_status_shows_why_a_stage_could_not_run(run: Path) -> None:
    history(run, 1, "7_0", "0 | done | - | ended well")
    history(run, 1, "7_1", "0 | failed | - | no source at x.zip")
    text = "\n".join(status_lines(run))
    assert "job 8 (train, 2 rank(s)): cancelled, because prepare (job 7) failed: no source at x.zip" in text
    assert "job 7 (prepare, 2 element(s)): failed: no source at x.zip" in text


def test_status_of_a_job_that_slurm_has_forgotten(run: Path) -> None:
    assert "job 7 (prepare, 2 element(s)): ended, without a recorded outcome; see" in "\n".join(status_lines(run))


def test_status_says_what_to_do_when_the_first_node_could_not_write(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "final_state", lambda job: "FAILED")
    (run / "logs" / "77-batch.log").touch()  # another job's
    line = f"FAILED before its script began: the first node could not write {run / 'logs'}; put runs on a file system"
    assert f"job 7 (prepare, 2 element(s)): {line} that all nodes share (job.runs)" in "\n".join(status_lines(run))
    (run / "logs" / "7_1-batch.log").touch()
    (run / "launch" / "20261122-000000-abcdef" / "attempts" / "8").mkdir(parents=True)
    text = "\n".join(status_lines(run))
    assert text.count("FAILED, without a recorded outcome; see") == 2, text


def test_logs_are_found_by_rank_and_followed_into_the_next_restart(run: Path) -> None:
    logs = run / "logs"
    (logs / "8-batch.log").write_text("batch\n")
    (logs / "8-0-gpu-17-0.log").write_text("one\n")
    (logs / "8-0-gpu-17-10.log").write_text("other\n")
    assert [file.name for file in rank_logs(run, "0")] == ["8-0-gpu-17-0.log"]
    assert [file.name for file in rank_logs(run, "batch")] == ["8-batch.log"]
    seen = []
    for text in follow(run, "0", every_s=0.01, limit_s=2):
        seen.append(text)
        if text == "one\n":
            (logs / "8-1-gpu-18-0.log").write_text("two\n")
        if text == "two\n":
            break
    assert seen == ["==> 8-0-gpu-17-0.log\n", "one\n", "==> 8-1-gpu-18-0.log\n", "two\n"]


def test_a_missing_log_is_explained(run: Path, tmp_path: Path) -> None:
    assert why_no_log(run, "1") == f"no log of rank 1 in {run / 'logs'} yet"
    (tmp_path / "config.yaml").write_text("")
    assert why_no_log(tmp_path, "0").startswith(f"{tmp_path} was not started as a job: its output went to a terminal")


def test_a_run_that_was_never_submitted_is_refused(run: Path) -> None:
    assert find_run(str(run)) == run
    assert find_run("art", str(run.parent)) == run
    assert all_runs(str(run.parent)) == [run]
    with pytest.raises(UserError, match="no run was submitted in"):
        all_runs(str(run))
    with pytest.raises(UserError, match="no run at"):
        find_run(str(run.parent / "nothing"))


def test_the_way_to_tensorboard_leads_through_the_login_node_and_warns() -> None:
    job = "\n".join(how_to_reach(Path("/scratch/my runs"), 6007, "node17", "login2", "ada"))
    assert "ssh -N -J ada@login2 -L 6007:localhost:6007 ada@node17" in job
    assert "ada@login2:'/scratch/my runs/' runs/" in job and "--include='report.html'" in job
    assert "no password" in job and "shared" not in job
    here = "\n".join(how_to_reach(Path("/r"), 6007, "login2", None, "ada"))
    assert "ssh -N -L 6007:localhost:6007 ada@login2" in here and "shared login node" in here


def test_an_element_knows_its_part_and_its_processors() -> None:
    env = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    env |= {"SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_STEP": "1"}
    assert options_of_element(["prepare", "a", "b"], env) == ["--task", "2/4"]
    env["SLURM_CPUS_PER_TASK"] = "6"
    assert options_of_element(["prepare", "a", "b"], env) == ["--task", "2/4", "--workers", "6"]
    assert options_of_element(["prepare", "a", "b", "--workers=2"], env) == ["--task", "2/4"]


def test_of_an_array_a_failed_element_speaks_for_all() -> None:
    done, failed, lost = (
        Attempt(f"7_{n}", 0, outcome, "-", "") for n, outcome in enumerate(("done", "failed", "lost"))
    )
    assert last_word([done, failed, done]) == failed
    assert last_word([lost, done]) == done
    assert last_word([done, lost]) is last_word([]) is None  # it may go on


def queued(state: str, reason: str = "", starts: str = "N/A", job: str = "8") -> slurm.Queued:
    """Returns a line of squeue."""
    return slurm.Queued(job, state, "5:00", "", reason, starts)


BEFORE, AFTER = "2026-11-20T00:00:00", "2026-11-22T00:00:00"
TOUCHED = datetime.fromisoformat("2026-11-21T00:00:00").timestamp()
WAITS = "waits to go on (job 8 requeued: Priority)"
STATES = [
    # what the run recorded, what squeue shows of its job, whether that has begun: state, words
    ("running", queued("RUNNING", "node1", BEFORE), True, "running", "running"),
    ("interrupted", queued("RUNNING", "node1", BEFORE), True, "running", "running"),
    ("running", queued("RUNNING", "node1", AFTER), True, "running", "starting"),
    ("stopped", queued("RUNNING", "node1"), True, "running", "starting"),
    ("stopped", queued("RUNNING", "node1", AFTER), True, "running", "starting"),
    ("stopped", queued("RUNNING", "node1", BEFORE), True, "running", "stopped"),
    ("done", queued("RUNNING", "node1", BEFORE), True, "running", "done"),
    ("done", queued("RUNNING", "node1", AFTER), True, "running", "starting"),
    ("empty", queued("RUNNING", "node1"), True, "running", "starting"),
    ("running", queued("PENDING", "(Priority)"), True, "pending", WAITS),
    ("interrupted", queued("PENDING", "(Priority)"), True, "pending", WAITS),
    ("stopped", queued("PENDING", "(Priority)"), True, "pending", WAITS),
    ("stopped", queued("REQUEUE_HOLD", "(None)"), True, "requeue_hold", "waits to go on (job 8 requeued)"),
    ("stopped", queued("PENDING", "(Priority)"), False, "pending", WAITS.replace("requeued", "submitted again")),
    ("done", queued("PENDING", "(Priority)"), False, "pending", WAITS.replace("requeued", "submitted again")),
    ("empty", queued("PENDING", "(Priority)"), False, "pending", "not begun"),
    ("running", queued("SUSPENDED", "node1"), True, "suspended", "suspended"),
    ("running", queued("COMPLETING", "node1"), True, "completing", "completing"),
    ("running", None, True, "interrupted", "interrupted"),
    ("stopped", None, True, "stopped", "stopped"),
    ("empty", None, False, "empty", "empty"),
]


@pytest.mark.parametrize(("recorded", "line", "began", "name", "words"), STATES)
def test_the_state_of_a_run(recorded: str, line: slurm.Queued | None, began: bool, name: str, words: str) -> None:
    made = Submission("id", "train", "8", 0.0, None, (), 2)
    queue = Queue(slurm.View((line,) if line else ()))
    state = state_of(recorded, TOUCHED, [(made, slurm.Job("8", began=began))], queue)
    assert (state.name, state.words) == (name, words)
    assert ("waits to go on: Priority" in (state.reason or "")) == ("Priority)" in words)
    assert state.job == (line and "8")


def test_the_state_of_a_run_whose_jobs_cannot_be_asked_for_is_what_it_recorded() -> None:
    """Of a run that its job finished, it is that; stages other than training do not speak for it."""
    made = {kind: Submission("id", kind, "8", 0.0, None, (), 2) for kind in ("train", "report")}
    silent, job = Queue(slurm.View(), "not known: squeue failed"), slurm.Job("8", began=True)
    state = state_of("running", TOUCHED, [(made["train"], job)], silent)
    assert (state.name, state.words, state.reason) == ("running", "running", "not known: squeue failed")
    assert state_of("running", TOUCHED).name == "running"  # trained without any job
    ending = Attempt("8", 1, "failed", "-", "no disk")
    assert state_of("running", TOUCHED, [(made["train"], job)], silent, ending).words == "failed"
    # what has written since that end is another start, without a job
    older = replace(ending, at=TOUCHED - 2 * SKEW_S)
    for recorded in ("running", "done", "stopped"):
        assert state_of(recorded, TOUCHED, [(made["train"], job)], Queue(slurm.View()), older).words == recorded
    # of several jobs in the queue the one that runs speaks
    pair = [(made["train"], job), (made["report"], slurm.Job("9", began=True))]
    view = slurm.View((queued("PENDING", "(Priority)"), queued("RUNNING", "node1", job="9")))
    running = state_of("done", TOUCHED, pair, Queue(view))
    assert (running.name, running.words, running.job) == ("running", "done", "9")
    report = state_of("done", TOUCHED, [(made["report"], job)], Queue(slurm.View((queued("PENDING"),))))
    assert (report.name, report.words) == ("pending", "done")


def test_status_and_listing_say_that_a_requeued_run_waits_to_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history(run, 2, "8", "0 | crashed | step-00000040 | rank 1 on b: Killed | lost")
    (run / "config.yaml").write_text("seed: 0\n")
    lines = [{"event": "start", "step": 0, "total_steps": 90}, {"step": 40, "images_seen": 640}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = slurm.View((queued("PENDING", "(BeginTime)"),))
    monkeypatch.setattr(slurm, "look", lambda jobs: view)
    text = "\n".join(status_lines(run))
    assert "\n  waits to go on (job 8 requeued: BeginTime) step=40/90, updated " in text and "interrupted" not in text
    row = make_row(run, Queue(view))
    assert (row.state, row.job, row.reason) == ("pending", "8", "requeued, waits to go on: BeginTime")


def test_a_stage_that_could_not_run_has_the_end_of_the_one_before(run: Path) -> None:
    made = submissions(run)
    assert ending_of(run, made) is ending_of(run, []) is None
    history(run, 1, "7_0", "0 | failed | - | no source at x.zip")
    assert (ended := ending_of(run, made)) and ended.reason == "no source at x.zip"
    assert ending_of(run, [made[0], replace(made[1], after=None)]) is None  # it waited for nothing
    assert ending_of(run, [made[0], replace(made[1], after="6")]) is None
    history(run, 2, "8", "0 | requeued | step-00000010 | SIGUSR2", "1 | done | step-00000090 | 90")
    assert (ended := ending_of(run, made)) and ended.outcome == "done"


def test_a_stage_waits_as_long_as_the_one_before_ended_well(run: Path) -> None:
    history(run, 1, "7_0", "0 | done | - | ended well")
    assert ending_of(run, submissions(run)) is None


def test_a_job_that_has_begun_without_a_trace_of_the_run_is_starting(run: Path) -> None:
    starting = Queue(slurm.View((queued("RUNNING", "node1"),)))
    assert status_lines(run, starting)[1] == "  starting"
    assert status_lines(run, Queue(slurm.View((queued("PENDING", "(Priority)"),))))[1] == "  not begun"


def test_what_looks_at_runs_and_submits_them_imports_torch_late_at_most() -> None:
    names = ("checks", "cli", "listing", "seeds", "status", "stopping", "submit")
    code = f"import sys, {', '.join(f'launch.{name}' for name in names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
