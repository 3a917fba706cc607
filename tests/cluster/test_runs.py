"""Runs on a real SLURM: to the end, through every way of being interrupted, and through cancelling."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import STEPS, Run, launch, leftovers
from tests.train.test_trainer import assert_identical

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_two_ranks_on_each_of_two_hosts_train_to_the_end(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    def sent(name: str) -> int:
        link = f"/sys/class/net/{linuxproc.hosts[name].link}/statistics/rx_bytes"
        return int(Path(link).read_text())

    before = {name: sent(name) for name in linuxproc.hosts}
    run = Run.submit(linuxproc, config, tmp_path / "run", "--max-steps", "20", ranks=2)
    code = {file: file.stat().st_mtime_ns for file in (run.folder / "code").rglob("*")}
    run.wait_for("done")
    linuxproc.wait_for_job(run.job, "COMPLETED")
    assert json.loads((run.path / "environment.json").read_text())["world_size"] == 4
    assert [e["world_size"] for e in run.events("start")] == [4]
    logs = sorted(file.name for file in (run.path / "logs").glob("*-*-*-*.log"))
    job = run.job
    assert logs == [f"{job}-0-node1-0.log", f"{job}-0-node1-1.log", f"{job}-0-node2-2.log", f"{job}-0-node2-3.log"]
    told = json.loads((run.folder / "attempts" / job / "0" / "rendezvous.json").read_text())
    assert told["address"] == linuxproc.hosts["node1"].address and 10000 <= told["port"] < 32768
    # 20 steps of gradients of both networks crossed the bridge; SLURM's own talk is far less.
    assert all(sent(name) - before[name] > 2_000_000 for name in ("node1", "node2"))
    assert {file: file.stat().st_mtime_ns for file in (run.folder / "code").rglob("*")} == code
    status = run.status()
    assert f"job {job} (train, 4 rank(s)): done: 20" in status and "done step=20/20" in status, status
    assert "done: step 20" in launch(linuxproc, "logs", str(run.path)).stdout
    assert launch(linuxproc, "logs", "--rank", "batch", str(run.path)).stdout.count("gan_dist: done") == 1
    wait_until(lambda: not leftovers(linuxproc), 30, "empty hosts")


def interrupted_once(run: Run, whole: Path, by: str) -> None:
    """Asserts that the run was stopped once by `by`, requeued once, and ended as if nothing had happened."""
    what = run.wait_for("requeued")
    assert what[0] == "0" and what[3] == by, run.story()
    saved = [event["step"] for event in run.events("stop")]
    assert len(saved) == 1 and what[2] == f"step-{saved[0]:08d}"
    assert "requeued at step-" in run.status()
    run.wait_for("done")
    assert run.restarts() == 1 and [line[1] for line in run.history()] == ["requeued", "done"]
    assert [event["step"] for event in run.events("start")] == [0, saved[0]]
    assert_identical(run.path, whole)


def test_usr2_saves_requeues_once_and_changes_no_bit(either: Cluster, config: str, whole: Path, tmp_path: Path) -> None:
    run = Run.submit(either, config, tmp_path / "run", *STEPS)
    run.wait_for_step(20)
    either.run("scancel", "--signal=USR2", run.job)
    interrupted_once(run, whole, "SIGUSR2")


def test_the_time_limit_saves_and_requeues_until_the_run_is_done(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", "slurm.time=1", "slurm.signal_lead_s=25")
    what = run.wait_for("requeued")
    assert what[3] == "SIGUSR2" and len(run.events("stop")) == 1
    linuxproc.wait_for_job(run.job, "PENDING")
    assert "was waiting; it is cancelled" in launch(linuxproc, "stop", str(run.path)).stdout
    linuxproc.wait_for_job(run.job, "CANCELLED")
    assert not (run.path / "stop").exists()


SLOWLY = """
import importlib.abc, importlib.util, os, sys, time

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "gan_dist.train.update":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            step = module.Update.step
            module.Update.step = lambda *words: (time.sleep(0.4), step(*words))[1]
        spec.loader.exec_module = exec_module
        return spec

if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    sys.meta_path.insert(0, Hook())
"""


@pytest.mark.parametrize("user_signal", [False, True], ids=["term", "user-signal"])
def test_preemption_saves_requeues_once_and_changes_no_bit(
    linuxproc: Cluster, config: str, whole: Path, tmp_path: Path, user_signal: bool
) -> None:
    linuxproc.configure(user_signal=user_signal)
    (tmp_path / "sitecustomize.py").write_text(SLOWLY)  # a busy scheduler may take its time to preempt
    try:
        slow = f"job.env={{PYTHONPATH: {tmp_path}}}"
        run = Run.submit(linuxproc, config, tmp_path / "run", *STEPS, "slurm.partition=low", slow)
        run.wait_for_step(6)
        words = ("sbatch", "--parsable", "-phigh", "-N3", "--exclusive", "-o/dev/null", "--wrap", "sleep 3")
        urgent = linuxproc.run(*words).stdout.strip()
        interrupted_once(run, whole, "SIGUSR2" if user_signal else "SIGTERM")
        linuxproc.wait_for_job(urgent, "COMPLETED")
    finally:
        linuxproc.configure(user_signal=False)


def test_a_plain_cancel_saves_does_not_requeue_and_leaves_no_process(
    either: Cluster, config: str, tmp_path: Path
) -> None:
    run = Run.submit(either, config, tmp_path / "run")
    run.wait_for_step(20)
    launch(either, "cancel", str(run.path))
    told = run.wait_for("cancelled", limit_s=40)
    assert told[3] == "saved and stopped by SIGTERM" and run.events("stop")[0]["step"] >= 20
    assert either.wait_for_job(run.job, "CANCELLED")["Restarts"] == "0"
    wait_until(lambda: not leftovers(either), 30, "empty hosts")
    assert "cancelled: saved and stopped by SIGTERM" in run.status()


def test_stop_saves_and_ends_and_the_next_submission_goes_on(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", nodes=1)
    run.wait_for_step(10)
    launch(linuxproc, "stop", str(run.path))
    assert "stop" in run.wait_for("stopped", limit_s=40)[3]
    linuxproc.wait_for_job(run.job, "FAILED")  # with status 75: what waits for a finished run must not start
    step = run.events("stop")[0]["step"]
    time.sleep(1.1)  # submissions are named by the second
    again = Run.submit(linuxproc, config, run.path, "--max-steps", str(step + 5), nodes=1)
    again.wait_for("done")
    assert [event["step"] for event in again.events("start")] == [0, step]


def test_code_edited_while_queued_changes_nothing(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    root = Path(__file__).parents[2]
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("gan_dist/", "launch/", "slurm/", "configs/", "pyproject")):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((root / name).read_bytes())
    words = (
        "--run-dir",
        str(tmp_path / "run"),
        "slurm.cpus_per_task=1",
        "--max-steps",
        "6",
        "slurm.extra={begin: now+8}",
    )
    launch(linuxproc, "submit", config, *words, cwd=checkout)
    for file in (checkout / "gan_dist").rglob("*.py"):
        file.write_text("raise RuntimeError('edited while queued')\n")
    job = json.loads(next((tmp_path / "run" / "launch").glob("*/job.json")).read_text())["job"]
    run = Run(linuxproc, tmp_path / "run", job)
    run.wait_for("done")
