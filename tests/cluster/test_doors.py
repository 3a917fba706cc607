"""Ways into a job: from within other jobs, past a busy controller, with a person's settings, as another user."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import ROOT, START_S, Run, launch, sbatch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NOBODY = 65534
LATER = "slurm.extra={begin: now+1hour}"


def test_plain_sbatch_within_another_job_is_as_from_outside(other: Cluster, config: str, tmp_path: Path) -> None:
    """An allocation with memory per processor, a step bound to one, an array's element, a world of torchrun."""
    env = {
        **other.environment(),
        "GAN_DIST_CODE": str(ROOT),
        "GAN_DIST_PYTHON": sys.executable,
        **dict.fromkeys(
            ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), "7"
        ),
    }
    words = [
        "sbatch",
        "--parsable",
        "--nodes=1",
        "--mem=500M",
        "--cpus-per-task=2",
        "--time=5",
        "-o",
        str(tmp_path / "log"),
    ]
    inner = [*words, "slurm/train.sbatch", str(tmp_path / "run"), config, "--max-steps", "5"]
    outer = ["salloc", "-N1", "-n1", "--time=5", "--mem-per-cpu=100M", "srun", "-n1", "-c1", *inner]
    del env["OMP_NUM_THREADS"]  # these tests' own
    done = subprocess.run(outer, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    run = Run(other, tmp_path / "run", done.stdout.split()[-1])
    run.wait_for_step(5)
    assert run.wait_for("done")[3] == "5", run.story()
    facts = json.loads((run.path / "environment.json").read_text())
    assert (facts["cpus"], facts["threads"], facts["world_size"]) == (2, 2, 1)


def test_every_gpu_of_a_type_with_signs_in_its_name_gets_a_rank(other: Cluster, config: str, tmp_path: Path) -> None:
    words = (
        "slurm.gres=gpu:a100-sxm4.80gb:2",
        "slurm.tasks_per_node=null",
        "slurm.nodes=1-2",
        "slurm.cpus_per_task=null",
    )
    run = Run.submit(other, config, tmp_path / "run", *words, "--max-steps", "5")
    run.wait_for("done")
    nodes = int(other.job(run.job)["NumNodes"])
    assert json.loads((run.path / "environment.json").read_text())["world_size"] == 2 * nodes


def test_srun_without_a_world_is_refused_with_the_right_command(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "gan_dist", "train", config, "--run-dir", str(tmp_path / "run")]
    done = linuxproc.run("srun", "-N2", "-n2", "--time=5", *words, check=False, cwd=ROOT)
    line = "srun started 2 processes, but without WORLD_SIZE each of them would train alone"
    assert done.returncode == 2 and done.stderr.count(line) == 2 and "python -m launch submit" in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answer", ["echo 'Socket timed out on send/recv operation' >&2; exit 1", "exit 0"])
def test_a_job_that_sbatch_does_not_hear_of_is_known(
    linuxproc: Cluster, config: str, tmp_path: Path, answer: str
) -> None:
    real = shutil.which("sbatch", path=linuxproc.environment()["PATH"])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/bash\n{real} "$@" >/dev/null\n{answer}\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{linuxproc.environment()['PATH']}"
    words = ("submit", config, LATER, "slurm.nodes=2", "--run-dir", str(tmp_path / "run"))
    done = launch(linuxproc, *words, PATH=path)
    (job,) = linuxproc.run("squeue", "-h", "-o", "%i", "--name=run").stdout.split()
    assert f"job {job}: 2 rank(s)" in done.stdout and f"the queue has it as {job}" in done.stderr
    assert "PENDING" in launch(linuxproc, "status", str(tmp_path / "run")).stdout
    launch(linuxproc, "cancel", str(tmp_path / "run"))
    linuxproc.wait_for_job(job, "CANCELLED")


def test_what_a_person_filters_for_hides_no_job(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    run = Run.submit(linuxproc, config, tmp_path / "run", LATER)
    mine = {"SQUEUE_STATES": "R", "SQUEUE_PARTITION": "high", "SQUEUE_USERS": "nobody", "SQUEUE_NAMES": "x"}
    mine |= {"SCANCEL_STATE": "RUNNING", "SLURM_TIME_FORMAT": "relative", "SQUEUE_FORMAT": "%i", "SQUEUE_SORT": "i"}
    assert ": PENDING (BeginTime), starts 20" in launch(linuxproc, "status", str(run.path), settings=mine).stdout
    again = launch(linuxproc, "submit", config, "--run-dir", str(run.path), check=False, settings=mine)
    assert again.returncode == 2 and f"has job {run.job} already (PENDING" in again.stderr
    assert launch(linuxproc, "cancel", str(run.path), settings=mine).stdout == f"job {run.job} is cancelled\n"
    linuxproc.wait_for_job(run.job, "CANCELLED")


def test_a_job_of_the_same_id_is_not_touched(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    """As after the controller has lost its state, or on another cluster of the same name."""
    run = Run.submit(linuxproc, config, tmp_path / "run", LATER)
    file = run.folder / "job.json"
    mine = json.loads(file.read_text())
    assert mine["cluster"] == "gan-dist-test" and mine["name"] == "run" and mine["submitted"].startswith("20")
    for key, value in {"name": "walk", "directory": "/elsewhere", "submitted": "2020-01-01T00:00:00"}.items():
        file.write_text(json.dumps({**mine, key: value}))
        assert launch(linuxproc, "cancel", str(run.path), check=False).returncode == 2
        assert "without a recorded outcome" in launch(linuxproc, "status", str(run.path)).stdout
    earlier = {
        key: value for key, value in mine.items() if key not in ("cluster", "name", "directory", "submitted", "user")
    }
    file.write_text(json.dumps(earlier))  # as an earlier version recorded it
    assert "PENDING" in launch(linuxproc, "status", str(run.path)).stdout
    linuxproc.run("scontrol", "requeuehold", run.job, check=False)
    launch(linuxproc, "cancel", str(run.path))
    linuxproc.wait_for_job(run.job, "CANCELLED")


@pytest.fixture
def shared(dataset: Path) -> Iterator[Path]:
    """A directory in which another user can write too."""
    with tempfile.TemporaryDirectory(prefix="gan-dist-shared-") as name:
        mask = os.umask(0)
        Path(name).chmod(0o777)
        try:
            shutil.copytree(dataset, Path(name) / "set")
            for path in (Path(name) / "set").rglob("*"):
                path.chmod(0o777)
            yield Path(name)
        finally:
            os.umask(mask)


def test_jobs_that_slurm_hides_from_a_colleague_are_not_taken_for_none(
    other: Cluster, config: str, shared: Path
) -> None:
    """PrivateData=jobs, and a run that a group shares: root's here, and nobody looks at it from its own account."""
    mine = shared / "config.yaml"
    mine.write_text(re.sub(r"shards: .*", f"shards: {shared / 'set'}", Path(config).read_text()))
    run = Run.submit(other, str(mine), shared / "run", nodes=1)
    run.wait_for_step(10)

    def nobody(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return launch(other, *words, check=check, user=NOBODY, HOME=str(shared), PYTHONDONTWRITEBYTECODE="1")

    seen = nobody("status", str(run.path)).stdout
    assert "running step=" in seen and "cannot be seen: SLURM shows jobs to their owners only" in seen, seen
    again = nobody("submit", str(mine), "--run-dir", str(run.path), check=False)
    assert again.returncode == 2 and f"has job {run.job} of root, which SLURM shows to its owner only" in again.stderr
    assert nobody("cancel", str(run.path), check=False).returncode == 2
    assert "if it runs, it saves and ends now" in nobody("stop", str(run.path)).stdout
    run.wait_for("stopped", limit_s=40)
    assert ": stopped: the file " in nobody("status", str(run.path)).stdout
    other.wait_for_job(run.job, "CANCELLED")


def test_plain_sbatch_has_its_array_from_the_controller(linuxproc: Cluster, paintings: Path, tmp_path: Path) -> None:
    """An element that was submitted from an element of another array prepares its own share."""
    out = tmp_path / "set"
    words = ("--array=0-1", "--cpus-per-task=1", "--time=5", "--output", str(tmp_path / "log-%a"))
    stale = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "9", "SLURM_RESTART_COUNT": "5"}
    options = ("--resolution", "32", "--shard-samples", "16", "--max-reject-fraction", "0.5")
    job = sbatch(linuxproc, *words, "slurm/prepare_array.sbatch", str(out), str(paintings), *options, **stale)
    wait_until((out / "manifest.json").exists, START_S, "manifest")
    attempts = out.with_name("set.launch") / "launch" / f"sbatch-{job}" / "attempts"
    wait_until(lambda: len(list(attempts.glob(f"{job}_*/history"))) == 2, 30, "ends of both elements")
    histories = sorted(attempts.glob("*/history"))
    assert [file.read_text().split("\t")[:2] for file in histories] == [["0", "done"]] * 2
