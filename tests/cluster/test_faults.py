"""What goes wrong on clusters: hosts die or are cut off, ranks raise, are killed or hang, runs fail for good."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import STEPS, Run, hook, launch, leftovers, slowly, wait_for_empty_hosts
from tests.helpers.training import assert_identical

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

FAULT = """
step, count = module.Update.step, [0]
def failing(self, *words):
    count[0] += 1
    if count[0] == 15:
        raise ValueError("the disk of this rank is on fire")
    return step(self, *words)
module.Update.step = failing
"""


def failing(folder: Path) -> str:
    """Returns the option that makes rank 1 raise in the 15th step of each start."""
    return hook(folder, "gan_dist.training.update", FAULT, "os.environ.get('SLURM_PROCID') == '1'")


@pytest.mark.waits
def test_a_lost_host_costs_the_steps_since_the_last_checkpoint(
    config: str, whole: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two clusters at once, for most of this is waiting: on one a host is killed, on the other one is cut off."""
    tmp_path = tmp_path_factory.mktemp("lost")
    slow = slowly(tmp_path / "hook")
    with Cluster(3) as linuxproc, Cluster(3) as other:
        killed = Run.submit(linuxproc, config, tmp_path / "killed", *STEPS, slow)
        cut_off = Run.submit(other, config, tmp_path / "cut off", *STEPS, slow)
        # Of the host with rank 0 and the batch script, nobody is left to tell the tale but SLURM.
        dead, silent = linuxproc.hosts["node2"], other.hosts["node1"]
        killed.wait_for_step(22)
        dead.kill()
        cut_off.wait_for_step(22)
        silent.cut()
        for run, lost in ((killed, dead), (cut_off, silent)):
            run.wait_for("done", limit_s=150)
            starts = [event["step"] for event in run.events("start")]
            assert len(starts) == 2 and starts[1] >= 20 and starts[1] % 10 == 0
            hosts = {file.name.split("-")[2] for file in (run.path / "logs").glob("*-1-*-*.log")}
            assert hosts == {"node1", "node2", "node3"} - {lost.name}
            assert_identical(run.path, whole.finished())
        # SLURM's own requeueing and the batch script's have not both counted.
        assert [line[1] for line in killed.history()] in (["lost", "done"], ["crashed", "done"])
        assert killed.restarts() == 1 and "rank 1 on node2 was lost" in killed.status()
        silent.mend()  # it comes back with whatever still runs there, which writes nothing any more
        wait_for_empty_hosts(linuxproc, other, limit_s=180)  # its srun gives up 60 s after it has heard
        assert [line[1] for line in cut_off.history() if line[1] != "lost"] == ["done"]
    assert_identical(cut_off.path, whole.finished())


def test_a_lost_rank_is_named_and_the_run_goes_on(
    linuxproc: Cluster, cgroup: Cluster, config: str, whole: Run, tmp_path: Path
) -> None:
    """One is killed, two hang, all at once: most of this is waiting for the others to notice."""
    words = (*STEPS, "slurm.extra.nodelist=node1,node2", slowly(tmp_path / "hook"))
    faults = [(linuxproc, signal.SIGKILL, "Killed"), (linuxproc, signal.SIGSTOP, "was lost")]
    faults.append((cgroup, signal.SIGSTOP, "was lost"))
    runs = [Run.submit(faults[n][0], config, tmp_path / f"run-{n}", *words) for n in range(len(faults))]
    ranks: list[int] = []
    for run, (_, fault, _) in zip(runs, faults, strict=True):
        run.wait_for_step(12)
        ranks += [pid for pids in run.ranks().values() for pid in pids]
        (pid,) = run.ranks()["node2"]
        os.kill(pid, fault)
    assert len(ranks) == 2 * len(runs)
    for run, (_, _, how) in zip(runs, faults, strict=True):
        run.wait_for("crashed", "done", limit_s=75)
        _, what, _, why, *_ = run.history()[0]
        assert what == "crashed" and why.startswith("rank 1 on node2") and how in why, why
        status = run.status()
        assert "1 restart(s); the last one: crashed at step-" in status and "rank 1 on node2" in status, status
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 20, "end of the siblings")
    for run in runs:
        run.wait_for("done")
        assert run.restarts() == 1
        assert_identical(run.path, whole.finished())


def test_a_rank_that_raises_again_and_again_ends_the_run_with_its_message(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    words = (failing(tmp_path / "hook"), "checkpoint.every_steps=1000", "job.max_starts_without_progress=2")
    run = Run.submit(linuxproc, config, tmp_path / "run", *words)
    end = run.wait_for("failed")
    cause = "rank 1 on node2: ValueError: the disk of this rank is on fire"
    assert [line[1] for line in run.history()] == ["crashed", "failed"]
    assert end[3] == f"no newer checkpoint in 2 starts (still at step-00000000), the last one: {cause}"
    linuxproc.wait_for_job(run.job, "FAILED")
    assert cause in run.status() and "failed:" in run.status()
    wait_until(lambda: not leftovers(linuxproc), 30, "empty hosts")


def test_what_fails_at_ever_new_steps_goes_on_until_it_may_not_be_requeued(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    """Each start saves step 10 of its own: that begins the count of job.max_starts_without_progress anew."""
    words = (failing(tmp_path / "hook"), "job.max_starts_without_progress=1", "job.max_requeues=2")
    run = Run.submit(linuxproc, config, tmp_path / "run", *words)
    end = run.wait_for("failed", limit_s=150)
    assert end[3].startswith("requeued 2 times (job.max_requeues), the last one: rank 1 on node2: ValueError")
    assert len({line[2] for line in run.history()}) == 3, run.history()
    assert run.restarts() == 2


def test_what_no_retry_mends_is_not_retried(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", f"data.shards={tmp_path / 'nowhere'}", "--unchecked")
    assert "nowhere" in run.wait_for("failed")[3] and len(run.history()) == 1
    assert linuxproc.wait_for_job(run.job, "FAILED")["ExitCode"] == "2:0"


def test_a_run_directory_that_nodes_do_not_share_is_named(linuxproc: Cluster, config: str) -> None:
    private = linuxproc.directory / "private"
    private.mkdir(exist_ok=True)
    run = Run.submit(linuxproc, config, private / "run", "slurm.extra={begin: now+5}")
    first = linuxproc.directory / "private-node1"  # what the first node sees of it is all, what the second sees nothing
    shutil.copytree(private / "run", first / "run", symlinks=True)
    assert linuxproc.wait_for_job(run.job, "FAILED")["ExitCode"] == "2:0"
    log = (first / "run" / "logs" / f"{run.job}-batch.log").read_text()
    assert "node2 does not see" in log and "put runs on a file system that all nodes share (job.runs)" in log, log
    assert json.loads((run.folder / "job.json").read_text())["job"] == run.job


def test_status_names_a_run_directory_that_the_first_node_does_not_see(linuxproc: Cluster, config: str) -> None:
    private = linuxproc.directory / "private"
    private.mkdir(exist_ok=True)
    run = Run.submit(linuxproc, config, private / "unseen", nodes=1)
    linuxproc.wait_for_job(run.job, "FAILED")
    status = run.status()
    assert f"the first node could not write {run.path / 'logs'}; put runs on a file system that all nodes" in status


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
