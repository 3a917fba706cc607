"""What goes wrong on clusters: hosts die or are cut off, ranks raise, are killed or hang, runs fail for good."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import STEPS, Run, launch, leftovers
from tests.train.test_trainer import assert_identical

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

FAULT = '''
"""Makes a rank raise in the step that FAULT_STEP names, on every start or (FAULT_ONCE) on the first."""
import importlib.abc, importlib.util, os, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "gan_dist.train.update":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            step, count = module.Update.step, [0]
            def failing(self, *words):
                count[0] += 1
                if count[0] == 15:
                    raise ValueError("the disk of this rank is on fire")
                return step(self, *words)
            module.Update.step = failing
        spec.loader.exec_module = exec_module
        return spec

if os.environ.get("SLURM_PROCID") == "1":
    sys.meta_path.insert(0, Hook())
'''


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_lost_host_costs_the_steps_since_the_last_checkpoint(
    linuxproc: Cluster, config: str, whole: Path, tmp_path: Path, how: str
) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", *STEPS)
    run.wait_for_step(30)
    # Of the host with rank 0 and the batch script, nobody is left to tell the tale but SLURM.
    lost = linuxproc.hosts["node2" if how == "killed" else "node1"]
    if how == "killed":
        lost.kill()
    else:
        lost.cut()
    try:
        run.wait_for("done", limit_s=150)
        starts = [event["step"] for event in run.events("start")]
        assert len(starts) == 2 and starts[1] >= 20 and starts[1] % 10 == 0
        hosts = {file.name.split("-")[2] for file in (run.path / "logs").glob("*-1-*-*.log")}
        assert hosts == {"node1", "node2", "node3"} - {lost.name}
        assert_identical(run.path, whole)
        if how == "cut off":
            lost.mend()  # it comes back with whatever still runs there, which writes nothing any more
            wait_until(lambda: not run.ranks()["node1"], 30, "end of the ranks that were cut off")
    finally:
        lost.kill()
        lost.boot()
        linuxproc.wait_for_hosts()
    wait_until(lambda: not leftovers(linuxproc), 60, "empty hosts")
    if how == "killed":  # SLURM's own requeueing and the batch script's have not both counted
        assert [line[1] for line in run.history()] in (["lost", "done"], ["crashed", "done"]) and run.restarts() == 1
        assert "rank 1 on node2 was lost" in run.status()
    assert_identical(run.path, whole)  # the host that was cut off has come back and written nothing


@pytest.mark.parametrize(("fault", "proctrack"), [("killed", "linuxproc"), ("hangs", "linuxproc"), ("hangs", "cgroup")])
def test_a_lost_rank_is_named_and_the_run_goes_on(
    request: pytest.FixtureRequest, config: str, whole: Path, tmp_path: Path, fault: str, proctrack: str
) -> None:
    run = Run.submit(request.getfixturevalue(proctrack), config, tmp_path / "run", *STEPS)
    run.wait_for_step(20)
    (pid,) = run.ranks()["node2"]
    os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    what = run.wait_for("crashed", limit_s=75)
    assert what[3].startswith("rank 1 on node2"), what
    assert ("Killed" if fault == "killed" else "was lost") in what[3]
    wait_until(lambda: not any(run.ranks().values()), 20, "end of the siblings")
    status = run.status()
    assert "1 restart(s); the last one: crashed at step-" in status and "rank 1 on node2" in status, status
    run.wait_for("done")
    assert run.restarts() == 1
    assert_identical(run.path, whole)


def test_a_rank_that_raises_ends_the_run_at_the_second_time_with_its_words(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FAULT)
    words = (f"job.env={{PYTHONPATH: {tmp_path / 'hook'}}}", "checkpoint.every_steps=1000")
    run = Run.submit(linuxproc, config, tmp_path / "run", *words)
    told = run.wait_for("failed")
    cause = "rank 1 on node2: ValueError: the disk of this rank is on fire"
    assert [line[1] for line in run.history()] == ["crashed", "failed"]
    assert told[3] == f"failed twice after the same checkpoint (step-00000000): {cause}"
    linuxproc.wait_for_job(run.job, "FAILED")
    assert cause in run.status() and "failed:" in run.status()
    wait_until(lambda: not leftovers(linuxproc), 30, "empty hosts")


def test_a_crash_budget_ends_what_fails_at_ever_new_steps(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FAULT)
    words = (f"job.env={{PYTHONPATH: {tmp_path / 'hook'}}}", "job.max_crashes=1")
    run = Run.submit(linuxproc, config, tmp_path / "run", *words)
    told = run.wait_for("failed")
    assert told[3].startswith("2 crashes (job.max_crashes=1), the last one: rank 1 on node2: ValueError")
    steps = [line[2] for line in run.history()]
    assert len(set(steps)) == 2, steps
    assert run.restarts() == 1


def test_what_no_retry_mends_is_not_retried(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", f"data.shards={tmp_path / 'nowhere'}")
    assert "nowhere" in run.wait_for("failed")[3] and len(run.history()) == 1
    assert linuxproc.wait_for_job(run.job, "FAILED")["ExitCode"] == "2:0"


def test_a_run_directory_that_nodes_do_not_share_is_named(linuxproc: Cluster, config: str) -> None:
    private = linuxproc.directory / "private"
    private.mkdir(exist_ok=True)
    run = Run.submit(linuxproc, config, private / "run", "slurm.extra={begin: now+5}")
    first = linuxproc.directory / "private-node1"  # what the first node sees of it is all, what the second sees nothing
    shutil.copytree(private / "run", first / "run", symlinks=True)
    assert linuxproc.wait_for_job(run.job, "FAILED")["ExitCode"] == "2:0"
    said = (first / "run" / "logs" / f"{run.job}-batch.log").read_text()
    assert "node2 does not see" in said and "put runs on a file system that all nodes share (job.runs)" in said, said
    assert json.loads((run.folder / "job.json").read_text())["job"] == run.job


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["slurm.partition=nowhere"], "invalid partition specified: nowhere"),
        (["slurm.nodes=9", "train.global_batch=16"], "sbatch refused the job: sbatch: error: "),
        (["slurm.time=9-0"], "sbatch refused the job: sbatch: error: "),
    ],
)
def test_refusals_of_slurm_are_passed_on_and_leave_nothing(
    linuxproc: Cluster, config: str, tmp_path: Path, words: list[str], line: str
) -> None:
    done = launch(linuxproc, "submit", config, *words, "--run-dir", str(tmp_path / "run"), check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
