"""What ends a run that gets nowhere, and what must not: staging, suspensions, slow reports, wrong environments."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import START_S, Run, hook, launch, slowly
from tests.helpers.training import assert_identical

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_starts_that_never_get_to_a_step_end_and_say_what_to_raise(
    linuxproc: Cluster, config: str, dataset: Path, tmp_path: Path
) -> None:
    """Staging takes longer than a job may run; here the signal before the limit comes when the data are asked for."""
    slow, here = tmp_path / "slow", tmp_path / "here"
    staging = f"touch {here}-${{SLURM_RESTART_COUNT:-0}}; sleep 300"
    slow.write_text(f"case $1 in *.tar) {staging};; esac\ncat {shlex.quote(str(dataset))}/$1\n")
    data = (f"data.shards=pipe:bash {slow} {{}}", f"data.cache_dir={tmp_path / 'cache'}")
    words = (*data, "job.max_starts_without_progress=2")
    run = Run.submit(linuxproc, config, tmp_path / "run", *words, nodes=1)
    for number in range(2):
        wait_until(Path(f"{here}-{number}").exists, START_S, f"staging in start {number}")
        linuxproc.run("scancel", "--signal=USR2", run.job)
        run.wait(lambda number=number: len(run.history()) > number, 40, f"end of start {number}")
    assert [line[1] for line in run.history()] == ["requeued", "failed"]
    assert run.history()[-1][3].startswith("no step in 2 starts; raise slurm.time or lower slurm.signal_lead_s")
    assert "while data were fetched" in run.history()[-1][3]
    assert linuxproc.wait_for_job(run.job, "FAILED")["Restarts"] == "1"


@pytest.mark.waits
def test_a_report_that_takes_long_fails_no_finished_run(
    minute: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Longer than ranks wait for one another, and srun for a rank. The run counts as done before, and has its page."""
    at = tmp_path_factory.mktemp("report")
    slow = """
        make = module.make_report
        module.make_report = lambda *words, **more: (time.sleep(70), make(*words, **more))[1]
    """
    words = ("--max-steps", "5", hook(at / "hook", "gan_dist.training.trainer", slow))
    run = Run.submit(minute, config, at / "run", *words)
    run.wait(lambda: list(run.folder.glob("attempts/*/0/done")), START_S, "outcome")
    assert not (run.path / "report.html").exists()
    assert run.wait_for("done")[3] == "5" and (run.path / "report.html").exists()
    minute.wait_for_job(run.job, "COMPLETED")


@pytest.mark.waits
def test_a_suspended_run_is_said_to_be_one_and_loses_nothing_of_its_budget(
    minute: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For longer than its ranks wait for one another, of which they then accuse one another."""
    words = (
        "--max-steps",
        "120",
        "dist.timeout_s=5",
        "job.max_starts_without_progress=1",
        "checkpoint.every_steps=5000",
    )
    run = Run.submit(minute, config, tmp_path_factory.mktemp("suspended") / "run", *words)
    run.wait_for_step(10)
    minute.run("scontrol", "suspend", run.job)
    status = run.status()
    assert "): SUSPENDED on node" in status and "\n  suspended step=" in status, status
    time.sleep(12)
    minute.run("scontrol", "resume", run.job)
    run.wait_for("done", limit_s=150)
    outcomes = [line[1] for line in run.history()]
    assert outcomes in (["done"], ["lost", "done"]), run.story()
    assert len(outcomes) == 1 or run.history()[0][3].startswith(
        "suspended for longer than its ranks wait for one another"
    )


def test_what_no_start_mends_is_started_once_and_named(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    clean = tmp_path / "apptainer"
    clean.write_text('#!/bin/bash\nexec env -i PATH=/usr/bin:/bin "$@"\n')
    clean.chmod(0o755)
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/bash\nexec {Path("/usr/bin/python3")} -IS "$@"\n')
    bare.chmod(0o755)
    python = sys.executable
    wrong = {
        "bare": ([f"job.python={bare}", "--unchecked"], "cannot run gan_dist with .*python3 .*has no module torch"),
        "clean": ([f"job.container={clean}", f"job.python={python}"], "the environment does not reach Python"),
        "module": (["job.setup=[module load cuda/99, sleep 0]"], "job.setup: module load cuda/99: status 127"),
        "strict": (["job.setup=[set -e, module load cuda/99]"], "job.setup: module load cuda/99: status 127"),
    }
    refused = launch(linuxproc, "submit", config, "--run-dir", str(tmp_path / "no"), *wrong["bare"][0][:1], check=False)
    assert refused.returncode == 2 and "cannot run gan_dist: " in refused.stderr  # it is not even queued
    runs = {
        name: Run.submit(linuxproc, config, tmp_path / name, *words, nodes=1 + (name == "clean"))
        for name, (words, _) in wrong.items()
    }
    for name, run in runs.items():
        assert linuxproc.wait_for_job(run.job, "FAILED")["Restarts"] == "0"
        ((_, what, _, why, *_),) = run.history()
        assert what == "failed" and re.search(wrong[name][1], why), why
        assert why in run.status() and not list((run.path / "logs").glob("*-0-*-0.log"))


def test_a_run_goes_on_on_another_cluster(linuxproc: Cluster, other: Cluster, config: str, tmp_path: Path) -> None:
    """By copying its directory; what it was on the first is no job of the second, whatever ids they have."""
    whole = Run.submit(linuxproc, config, tmp_path / "whole", "--max-steps", "40", nodes=1)
    first = Run.submit(linuxproc, config, tmp_path / "first", slowly(tmp_path / "hook", 0.2), nodes=1)
    first.wait_for_step(10)
    linuxproc.run("scancel", first.job)
    first.wait_for("cancelled", limit_s=40)
    shutil.copytree(first.path, tmp_path / "moved", symlinks=True)
    moved = Run.submit(other, config, tmp_path / "moved", "--max-steps", "40", nodes=1)
    moved.wait_for("done")
    whole.wait_for("done")
    assert [event["step"] for event in moved.events("start")] == [0, first.events("stop")[0]["step"]]
    assert_identical(moved.path, whole.path)
