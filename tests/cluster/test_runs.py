"""Runs on a real SLURM: to the end, through every way of being interrupted, and through cancelling."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gan_dist.runs.checkpoint import find
from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import FIRST_START, ROOT, STEPS, Run, hook, launch, leftovers, slowly
from tests.helpers.training import assert_identical

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_two_ranks_on_each_of_two_hosts_train_to_the_end(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    def sent(name: str) -> int:
        link = f"/sys/class/net/{linuxproc.hosts[name].link}/statistics/rx_bytes"
        return int(Path(link).read_text())

    before = {name: sent(name) for name in linuxproc.hosts}
    run = Run.submit(linuxproc, config, tmp_path / "run", "--max-steps", "20", ranks=2)
    submitted = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if is_submitted(file)}
    assert len(submitted) == 8, sorted(submitted)  # once it was one of each source file, and its compiled form
    words = [sys.executable, "-m", "launch", "logs", "-f", "--rank", "0", str(run.path)]
    following = subprocess.Popen(words, cwd=ROOT, env=linuxproc.environment(), stdout=subprocess.PIPE, text=True)
    run.wait_for("done")
    linuxproc.wait_for_job(run.job, "COMPLETED")
    assert json.loads((run.path / "environment.json").read_text())["world_size"] == 4
    assert [e["world_size"] for e in run.events("start")] == [4]
    logs = sorted(file.name for file in (run.path / "logs").glob("*-*-*-*.log"))
    job = run.job
    assert logs == [f"{job}-0-node1-0.log", f"{job}-0-node1-1.log", f"{job}-0-node2-2.log", f"{job}-0-node2-3.log"]
    master = json.loads((run.folder / "attempts" / job / "0" / "rendezvous.json").read_text())
    assert master["address"] == linuxproc.hosts["node1"].address and 10000 <= master["port"] < 32768
    # 20 steps of gradients of both networks crossed the bridge; SLURM's own talk is far less.
    assert all(sent(name) - before[name] > 2_000_000 for name in ("node1", "node2"))
    assert {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if is_submitted(file)} == submitted
    status = run.status()
    assert f"job {job} (train, 4 rank(s)): done: 20" in status and "done step=20/20" in status, status
    assert f"==> {logs[3]}\n" in launch(linuxproc, "logs", "--rank", "3", str(run.path)).stdout
    assert launch(linuxproc, "logs", "--rank", "batch", str(run.path)).stdout.count("gan_dist: done") == 1
    time.sleep(1)
    following.terminate()
    output, _ = following.communicate(timeout=20)
    assert output.startswith(f"==> {logs[0]}\n") and "done: step 20" in output, output
    # What sbatch was given is what --dry-run prints, and that is what is recorded.
    words = ["submit", config, "--dry-run", "slurm.nodes=2", "slurm.tasks_per_node=2", "slurm.cpus_per_task=1"]
    dry = launch(linuxproc, *words, "slurm.time=10", "--run-dir", str(run.path)).stdout
    name = re.findall(r"launch/(\d{8}-\d{6}-[0-9a-f]{6})/", dry)[0]
    assert (run.folder / "submission.sh").read_text() == dry.replace(name, run.folder.name)
    wait_until(lambda: not leftovers(linuxproc), 30, "empty hosts")


def is_submitted(file: Path) -> bool:
    """Returns whether a file of a submission is not one of its starts, nor Submitit's, which has one a rank."""
    return file.is_file() and "attempts" not in file.parts and not file.name.endswith("_result.pkl")


def interrupted_once(run: Run, whole: Run, by: str) -> None:
    """Asserts that the run was stopped once by `by`, requeued once, and ended as if nothing had happened."""
    run.wait_for("requeued", "done")
    what = run.history()[0]
    assert what[:2] == ("0", "requeued") and what[3] == by, run.story()
    saved = [event["step"] for event in run.events("stop")]
    assert len(saved) == 1 and what[2] == f"step-{saved[0]:08d}"
    status = run.status()
    assert "requeued at step-" in status and "interrupted" not in status, status
    assert f"\n  waits to go on (job {run.job} requeued" in status or ": PENDING" not in status, status
    run.wait_for("done")
    assert run.restarts() == 1 and [line[1] for line in run.history()] == ["requeued", "done"]
    assert [event["step"] for event in run.events("start")] == [0, saved[0]]
    assert_identical(run.path, whole.finished())


def test_usr2_saves_requeues_once_and_changes_no_bit(
    linuxproc: Cluster, cgroup: Cluster, config: str, whole: Run, tmp_path: Path
) -> None:
    slow = slowly(tmp_path / "hook", 0.2)
    runs = [Run.submit(each, config, tmp_path / each.proctrack, *STEPS, slow) for each in (linuxproc, cgroup)]
    for run in runs:
        run.wait_for_step(20)
        run.cluster.run("scancel", "--signal=USR2", run.job)
    for run in runs:
        interrupted_once(run, whole, "SIGUSR2")


LIMIT = (*STEPS, "slurm.time=1", "slurm.signal_lead_s=10")
LATE = """
from gan_dist.training.update import Update
step, save = Update.step, module.save
Update.step = lambda *words: (time.sleep(2.4), step(*words))[1]
module.save = lambda *words, **more: (words[1]["step"] and time.sleep(200), save(*words, **more))
"""


def give_time(run: Run) -> None:
    """Raises the limit that a run has met once: on a busy machine it needs more than another minute for the rest."""
    words = ("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    run.wait(lambda: run.cluster.run(*words, check=False).returncode == 0, 60, "job in the queue again")


@pytest.mark.waits
def test_the_time_limit_saves_requeues_and_changes_no_bit(
    minute: Cluster, config: str, whole: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = tmp_path_factory.mktemp("limited")
    run = Run.submit(minute, config, at / "run", *LIMIT, slowly(at / "hook", 0.8))
    run.wait_for("requeued", "done")
    give_time(run)
    interrupted_once(run, whole, "SIGUSR2")


@pytest.mark.waits
def test_a_save_that_overruns_the_time_limit_is_reported_and_requeued(
    minute: Cluster, config: str, whole: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = tmp_path_factory.mktemp("late")
    slow = hook(at / "hook", "gan_dist.training.checkpointer", LATE, FIRST_START)
    # Two minutes: on a busy machine the first may end before there is anything to save. SLURM may send USR2 a minute
    # early and see the limit half a minute late; then comes KillWait: the save outlasts them all.
    words = (
        *STEPS,
        "slurm.time=2",
        "slurm.signal_lead_s=10",
        "checkpoint.every_steps=100000",
        "dist.timeout_s=400",
        slow,
    )
    late = Run.submit(minute, config, at / "run", *words)
    late.wait_for("crashed", "done", limit_s=240)
    give_time(late)
    _, what, checkpoint, why, *_ = late.history()[0]
    assert (what, checkpoint) == ("crashed", "step-00000000"), late.story()
    assert why == "the time limit came before the ranks had saved; raise slurm.signal_lead_s"
    late.wait_for("done")
    assert late.restarts() == 1 and "raise slurm.signal_lead_s" in late.status()
    assert [event["step"] for event in late.events("start")] == [0, 0]
    assert_identical(late.path, whole.finished())


LAST = """
import os
save = module.save
def wait():
    facts = os.path.join(os.environ["GAN_DIST_ATTEMPT"], "facts")
    while "status=143" not in open(facts).read():
        time.sleep(0.1)
    time.sleep(4)
module.save = lambda *words, **more: (words[1]["step"] and wait(), save(*words, **more))
"""


@pytest.mark.waits
def test_a_job_that_is_done_just_after_its_time_limit_is_not_started_again(
    minute: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It was requeued as soon as the limit came, lest a busy node has no time for it later; that is taken back."""
    at = tmp_path_factory.mktemp("last")
    slow = hook(at / "hook", "gan_dist.training.checkpointer", LAST)
    words = (
        "--max-steps",
        "4",
        "slurm.time=1",
        "slurm.signal_lead_s=10",
        "checkpoint.every_steps=100000",
        "dist.timeout_s=400",
        slow,
    )
    run = Run.submit(minute, config, at / "run", *words)
    run.wait_for("done", limit_s=240)
    over = ("CANCELLED", "TIMEOUT", "COMPLETED")
    run.wait(lambda: minute.job(run.job)["JobState"] in over, 90, "an end that stays")
    time.sleep(15)  # a requeued job would be pending for ten seconds, and begin
    assert minute.job(run.job)["JobState"] in over and run.status().count("done: 4"), run.story()
    assert [line[1] for line in run.history()] == ["done"] and len(run.events("start")) == 1, run.story()


@pytest.mark.parametrize(
    "preemptions",
    [
        [("SIGTERM", "cgroup", {}), ("SIGUSR2", "linuxproc", {"user_signal": True})],
        [("SIGTERM", "linuxproc", {"preempt_mode": "CANCEL", "grace_s": 0})],
    ],
    ids=["TERM, and USR2", "TERM and CANCEL"],
)
def test_preemption_saves_requeues_once_and_changes_no_bit(
    request: pytest.FixtureRequest,
    config: str,
    whole: Run,
    tmp_path: Path,
    preemptions: list[tuple[str, str, dict[str, Any]]],
) -> None:
    low = ("slurm.partition=low", slowly(tmp_path / "hook"))
    clusters: list[Cluster] = [request.getfixturevalue(proctrack) for _, proctrack, _ in preemptions]
    usual = [
        {key: getattr(cluster.layout, key) for key in of[2]} for cluster, of in zip(clusters, preemptions, strict=True)
    ]
    try:
        for cluster, (_, _, settings) in zip(clusters, preemptions, strict=True):
            if settings:
                cluster.configure(**settings)
        runs = [Run.submit(cluster, config, tmp_path / cluster.proctrack, *STEPS, *low) for cluster in clusters]
        urgent = []
        for run in runs:
            run.wait_for_step(6)
            words = ("sbatch", "--parsable", "-phigh", "-N3", "--exclusive", "-o/dev/null", "--wrap", "sleep 3")
            urgent.append(run.cluster.run(*words).stdout.strip())
        for run, (by, _, _), job in zip(runs, preemptions, urgent, strict=True):
            interrupted_once(run, whole, by)
            run.cluster.wait_for_job(job, "COMPLETED")
    finally:
        for cluster, settings in zip(clusters, usual, strict=True):
            if settings:
                cluster.configure(**settings)


def test_a_plain_cancel_saves_does_not_requeue_and_leaves_no_process(
    either: Cluster, config: str, tmp_path: Path
) -> None:
    run = Run.submit(either, config, tmp_path / "run")
    run.wait_for_step(20)
    launch(either, "cancel", str(run.path))
    end = run.wait_for("cancelled", limit_s=40)
    assert end[3] == "saved and stopped by SIGTERM" and run.events("stop")[0]["step"] >= 20
    assert either.wait_for_job(run.job, "CANCELLED")["Restarts"] == "0"
    wait_until(lambda: not leftovers(either), 30, "empty hosts")
    assert "cancelled: saved and stopped by SIGTERM" in run.status()


def test_a_cancel_that_leaves_no_time_to_save_leaves_the_last_checkpoint(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    slow = hook(
        tmp_path / "hook",
        "gan_dist.training.checkpointer",
        """
        save = module.save
        module.save = lambda *words, **more: (words[1]["step"] and time.sleep(60), save(*words, **more))
    """,
    )
    linuxproc.configure(kill_wait_s=4)
    try:
        run = Run.submit(linuxproc, config, tmp_path / "run", slow, "checkpoint.every_steps=1000", nodes=1)
        run.wait_for_step(10)
        linuxproc.run("scancel", run.job)
        assert linuxproc.wait_for_job(run.job, "CANCELLED")["Restarts"] == "0"
        wait_until(lambda: not leftovers(linuxproc), 40, "empty hosts")
    finally:
        linuxproc.configure(kill_wait_s=12)
    assert "CANCELLED" in run.status() and find(run.path).step == 0 and not run.events("stop")


def test_stop_saves_and_ends_and_the_next_submission_goes_on(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", nodes=1)
    run.wait_for_step(10)
    status = run.status()
    assert re.search(rf"job {run.job} \(train, 1 rank\(s\)\): RUNNING on node\d, \S+ left\n", status), status
    assert re.search(r"\n  running step=\d+/\d+ .*images/s=\S+ loss_d=\S+ .*left=\S+, updated \d+ s ago\n", status), (
        status
    )
    launch(linuxproc, "stop", str(run.path))
    assert "stop" in run.wait_for("stopped", limit_s=40)[3]
    linuxproc.wait_for_job(run.job, "CANCELLED")  # no failure, and what waits for a finished run must not start
    step = run.events("stop")[0]["step"]
    time.sleep(1.1)  # submissions are named by the second
    again = Run.submit(linuxproc, config, run.path, "--max-steps", str(step + 5), nodes=1)
    again.wait_for("done")
    assert [event["step"] for event in again.events("start")] == [0, step]


def test_a_job_that_waits_is_known_to_wait_and_taken_out_by_stop(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", "slurm.extra={begin: now+600}")
    assert re.search(
        rf"not begun\n  job {run.job} \(train, 2 rank\(s\)\): PENDING \(BeginTime\), starts 20", run.status()
    )
    again = launch(linuxproc, "submit", config, "--run-dir", str(run.path), check=False)
    assert again.returncode == 2 and f"has job {run.job} already (PENDING" in again.stderr, again.stderr
    silent = launch(linuxproc, "status", str(run.path), SLURM_CONF="/dev/null").stdout
    assert f"job {run.job} (train, 2 rank(s)): not known: squeue failed: " in silent, silent  # and not: ended
    assert "was pending and is cancelled" in launch(linuxproc, "stop", str(run.path)).stdout
    linuxproc.wait_for_job(run.job, "CANCELLED")
    assert not (run.path / "stop").exists()


def test_code_edited_while_queued_changes_nothing(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("gan_dist/", "launch/", "slurm/", "configs/", "pyproject")):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    words = (
        "--run-dir",
        str(tmp_path / "run"),
        "slurm.cpus_per_task=1",
        "--max-steps",
        "6",
        "slurm.extra={begin: now+8}",
    )
    with (checkout / "gan_dist" / "utils" / "errors.py").open("a") as edited:
        edited.write("\nprint('this is the code as it was submitted')\n")
    launch(linuxproc, "submit", config, *words, cwd=checkout)
    for file in (checkout / "gan_dist").rglob("*.py"):
        file.write_text("raise RuntimeError('edited while queued')\n")
    job = json.loads(next((tmp_path / "run" / "launch").glob("*/job.json")).read_text())["job"]
    run = Run(linuxproc, tmp_path / "run", job)
    run.wait_for("done")
    assert "this is the code as it was submitted" in launch(linuxproc, "logs", str(run.path)).stdout


def test_seeds_are_elements_of_one_array_and_each_is_requeued_alone(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    shape = ("slurm.nodes=1", "slurm.tasks_per_node=1", "slurm.cpus_per_task=1", "slurm.time=10", "--max-steps", "60")
    output = launch(linuxproc, "submit", config, *shape, "--seeds", "1,2", "--run-dir", str(tmp_path / "art")).stdout
    job = re.findall(r"job (\d+)_1: run ", output)[0]
    runs = [Run(linuxproc, tmp_path / f"art-seed-{seed}", f"{job}_{seed}") for seed in (1, 2)]
    runs[1].wait_for_step(10)
    linuxproc.run("scancel", "--signal=USR2", runs[1].job)
    for run in runs:
        run.wait_for("done")
    assert [[line[1] for line in run.history()] for run in runs] == [["done"], ["requeued", "done"]]
    rows = json.loads(launch(linuxproc, "ls", "--json", GAN_DIST_RUNS=str(tmp_path)).stdout)
    found = {(row["name"], row["state"], row["step"], row["job"]) for row in rows}
    assert found == {(run.path.name, "done", 60, run.job) for run in runs}
