"""Preparation as an array, pipelines, plain sbatch files, doctor and TensorBoard on a real SLURM."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import ROOT, START_S, Run, hook, launch, leftovers, sbatch, slowly
from tests.helpers.training import assert_identical

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ONE = ("slurm.cpus_per_task=1", "slurm.time=5")


def test_one_element_killed_redoes_its_shards_only_and_training_follows(
    linuxproc: Cluster, config: str, paintings: Path, tmp_path: Path
) -> None:
    """The pipeline's last array element shares its job id with the array: requeueing it must touch no sibling."""
    shards = tmp_path / "shards"
    values = yaml.safe_load(Path(config).read_text()) | {"data": {"shards": str(shards)}}
    (tmp_path / "art.yaml").write_text(yaml.safe_dump(values))
    hook = tmp_path / "hook"
    hook.mkdir()
    # The last element dies once, after its first shard; whoever was requeued would leave a second mark.
    (hook / "sitecustomize.py").write_text(
        "import os, sys, pathlib, threading, time\n"
        "task, again = os.environ.get('SLURM_ARRAY_TASK_ID'), os.environ.get('SLURM_RESTART_COUNT', '0')\n"
        f"at = pathlib.Path({str(tmp_path)!r})\n"
        "if task and 'gan_dist' in ' '.join(sys.orig_argv):\n"
        "    (at / f'started-{task}-{again}').touch()\n"
        "    def kill():\n"
        "        kept = at / 'shards' / '.prepare'\n"
        "        while not list(kept.glob('shard-0000[25].tar.json')): time.sleep(0.002)\n"
        "        done = [kept.parent / file.stem for file in kept.glob('shard-*.tar.json')]\n"
        "        done = {file.name: file.stat().st_mtime_ns for file in done}\n"
        "        (at / 'done').write_text(repr(done))\n"
        "        os.kill(os.getpid(), 9)\n"
        "    if task == '2' and again == '0': threading.Thread(target=kill, daemon=True).start()\n"
    )
    words = ["--source", str(paintings), "--prepare", "--resolution 32 --shard-samples 8 --max-reject-fraction 0.5"]
    env = f"job.env={{PYTHONPATH: {hook}}}"
    run = tmp_path / "run"
    output = launch(
        linuxproc,
        "pipeline",
        str(tmp_path / "art.yaml"),
        *words,
        "--tasks",
        "3",
        env,
        *ONE,
        "--run-dir",
        str(run),
        "--max-steps",
        "4",
    ).stdout
    jobs = re.findall(r"job (\d+)", output)
    assert len(jobs) == 3
    wait_until(lambda: (run / "grid.png").exists() and (run / "report.html").exists(), 2 * START_S, "pipeline's end")
    started = sorted(file.name for file in tmp_path.glob("started-*"))
    assert started == ["started-0-0", "started-1-0", "started-2-0", "started-2-1"]
    # What was finished when the element died was written once.
    done = ast.literal_eval((tmp_path / "done").read_text())
    assert done and done == {name: (shards / name).stat().st_mtime_ns for name in done}
    status = launch(linuxproc, "status", str(run)).stdout
    assert "(prepare, 3 element(s)): done" in status and "crashed" in status and "done step=4/4" in status, status
    history = next((run / "launch").glob(f"*/attempts/{jobs[0]}_2/history")).read_text()
    assert [line.split("\t")[1] for line in history.splitlines()] == ["crashed", "done"]


def test_training_is_cancelled_when_preparation_fails_for_good(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--source", str(tmp_path / "nowhere.zip"), "--tasks", "2", *ONE, f"data.shards={tmp_path / 'shards'}")
    jobs = re.findall(r"job (\d+)", launch(linuxproc, "pipeline", config, *words, "--run-dir", str(run)).stdout)
    for job in jobs[1:]:
        linuxproc.wait_for_job(job, "CANCELLED")
    status = launch(linuxproc, "status", str(run)).stdout
    assert f"job {jobs[1]} (train, 1 rank(s)): cancelled, because prepare (job {jobs[0]}) failed: " in status, status
    assert "nowhere.zip" in status and not (run / "config.yaml").exists()


def test_arrays_prepare_the_same_dataset_with_and_without_the_launcher(
    linuxproc: Cluster, paintings: Path, tmp_path: Path
) -> None:
    options = ("--resolution", "32", "--shard-samples", "16", "--max-reject-fraction", "0.5")
    mine, plain = tmp_path / "mine", tmp_path / "plain"
    slow = "square = module.square; module.square = lambda *a, **k: (time.sleep(0.2), square(*a, **k))[1]"
    first = hook(
        tmp_path / "hook", "gan_dist.data.prepare.images", slow, "os.environ.get('SLURM_RESTART_COUNT', '0') == '0'"
    )
    output = launch(
        linuxproc,
        *("prepare", str(paintings), str(mine), *options, "--tasks", "2", *ONE, first),
        SLURM_JOB_ID="1",  # from within another job
        SLURM_ARRAY_JOB_ID="1",
        SLURM_ARRAY_TASK_ID="9",
        SLURM_RESTART_COUNT="5",
        SBATCH_PARTITION="high",  # a person's defaults: those stand that the options leave open
        SBATCH_TIMELIMIT="1",
        SBATCH_ARRAY_INX="0-8",
    ).stdout
    out = ("--output", str(tmp_path / "log-%a"))
    words = (
        "--array=0-1",
        "--cpus-per-task=1",
        "--time=5",
        *out,
        "slurm/prepare_array.sbatch",
        str(plain),
        str(paintings),
    )
    sbatch(linuxproc, *words, *options)
    job = re.findall(r"job (\d+)", output)[0]
    queued = linuxproc.job(f"{job}_0")
    assert queued["Partition"] == "high" and queued["TimeLimit"] == "00:05:00"
    wait_until(lambda: list(mine.glob("shard-*.tar")), START_S, "shard")
    linuxproc.run("scancel", "--signal=USR2", job)  # to every process there is: workers leave it to their parent
    wait_until(lambda: (mine / "manifest.json").exists() and (plain / "manifest.json").exists(), START_S, "manifests")
    assert (mine / "manifest.json").read_bytes() == (plain / "manifest.json").read_bytes()
    linuxproc.wait_for_job(job, "COMPLETED")
    outcomes = [
        file.read_text().split("\t")[1] for file in tmp_path.glob(f"mine.launch/launch/*/attempts/{job}_*/history")
    ]
    assert outcomes == ["requeued", "requeued"]
    for dataset in (mine, plain):
        status = launch(linuxproc, "status", f"{dataset}.launch").stdout
        assert "(prepare, " in status and "no job of this run" not in status, status


def test_two_jobs_on_one_host_do_not_meet(linuxproc: Cluster, config: str, tmp_path: Path) -> None:
    """Their shell is strict and inherits nothing, as some sites want it."""
    words = ("--max-steps", "30", "slurm.extra={nodelist: node3, export: NONE}", "job.setup=[set -euo pipefail]")
    runs = [Run.submit(linuxproc, config, tmp_path / name, *words, nodes=1, ranks=2) for name in ("a", "b")]
    for run in runs:
        run.wait_for("done")
        assert json.loads((run.path / "environment.json").read_text())["world_size"] == 2
    ports = {next(run.folder.glob("attempts/*/0/rendezvous.json")).read_text() for run in runs}
    assert len(ports) == 2
    assert_identical(runs[0].path, runs[1].path)


def test_plain_sbatch_speaks_the_same_protocol_and_knows_the_same_run(
    linuxproc: Cluster, config: str, tmp_path: Path
) -> None:
    wrap = tmp_path / "wrap"
    wrap.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/wrapped\nexec "$@"\n')
    wrap.chmod(0o755)
    words = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10", "slurm/train.sbatch")
    run = Run(linuxproc, tmp_path / "run", "")
    out = ("--output", str(tmp_path / "log"))
    # NCCL reads a list of prefixes, gloo the whole name of an interface that is there.
    env = {"GAN_DIST_CONTAINER": str(wrap), "NCCL_SOCKET_IFNAME": "en,net"}
    run.job = sbatch(linuxproc, *out, *words, str(run.path), config, "--max-steps", "100", **env)
    run.wait_for_step(20)
    linuxproc.run("scancel", "--signal=USR2", run.job)
    assert run.wait_for("requeued")[3] == "SIGUSR2"
    run.wait_for("done")
    assert run.restarts() == 1 and "(train, 2 rank(s)): done: 100" in run.status()
    # Every rank of both starts went through the container's words, and the batch script went round them.
    assert (tmp_path / "wrapped").read_text().count("-m launch.job.rank train") == 4


SLOW = """
write = module.save
def slow(*words, **more):
    if sys.modules["__main__"].STOP:
        time.sleep(32)
    return write(*words, **more)
module.save = slow
"""


@pytest.mark.waits
def test_torchrun_saves_for_as_long_as_it_takes_and_survives_a_lost_host(
    config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two clusters at once, for most of this is waiting: on one a save takes long, on the other a host is lost."""
    tmp_path = tmp_path_factory.mktemp("torchrun")

    def start(cluster: Cluster, name: str, *more: str) -> Run:
        run = Run(cluster, tmp_path / name, "")
        words = ("--nodes=2", "--cpus-per-task=2", "--time=10", f"--output={tmp_path / name}.log")
        rest = (str(run.path), config, "--max-steps", "120", *more)
        env = {"PYTHONPATH": str(tmp_path / f"hook-{name}"), "GAN_DIST_RANKS_PER_NODE": "1"}
        run.job = sbatch(cluster, *words, "slurm/train_torchrun.sbatch", *rest, **env)
        return run

    hook(tmp_path / "hook-patient", "gan_dist.training.checkpointer", SLOW, "os.environ.get('RANK') == '0'")
    slowly(tmp_path / "hook-robbed")
    with Cluster(2) as linuxproc, Cluster(3) as other:
        patient = start(linuxproc, "patient", "dist.timeout_s=90")
        robbed = start(other, "robbed")
        patient.wait_for_step(20)
        linuxproc.run("scancel", "--signal=USR2", patient.job)
        began = time.monotonic()
        robbed.wait_for_step(22)
        assert other.hosts["node1"].pids("launch.job.torchrun")  # and the batch script
        other.hosts["node1"].kill()

        assert patient.wait_for("requeued", limit_s=120)[3] == "SIGUSR2" and time.monotonic() - began > 31
        logs = {file.name.removeprefix(f"{patient.job}-0-") for file in (patient.path / "logs").glob("*-0-*-*.log")}
        assert logs == {"node1-torchrun.log", "node1-0.log", "node2-torchrun.log", "node2-1.log"}
        agents = "".join(file.read_text() for file in (patient.path / "logs").glob("*-0-*-torchrun.log"))
        assert "SIGUSR2" not in agents, agents  # sent again and again, it hit nobody who was on the way out
        for run in (patient, robbed):
            run.wait_for("done", limit_s=200)
            assert run.restarts() == 1
        saved = patient.events("stop")[0]["step"]
        assert [event["step"] for event in patient.events("start")] == [0, saved]
        starts = [event["step"] for event in robbed.events("start")]
        assert len(starts) == 2 and starts[1] >= 20
        wait_until(lambda: not leftovers(linuxproc) + leftovers(other), 60, "empty hosts")
    assert_identical(patient.path, robbed.path)


def test_doctor_prints_a_row_for_each_node_and_passes_refusals_on(linuxproc: Cluster, tmp_path: Path) -> None:
    words = ("slurm.nodes=3", "slurm.cpus_per_task=1", "slurm.time=5", f"job.runs={tmp_path}")
    output = launch(linuxproc, "doctor", *words).stdout
    for name, host in linuxproc.hosts.items():
        assert re.search(rf"^{name} .*torch .*net0 {host.address}", output, re.MULTILINE), output
    assert "all-reduce and 10 steps over 3 rank(s): ok" in output
    assert not list(tmp_path.iterdir())
    refused = launch(linuxproc, "doctor", *words, "slurm.partition=nowhere", check=False)
    assert refused.returncode == 2 and "invalid partition specified: nowhere" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_doctor_names_a_node_that_reports_nothing(linuxproc: Cluster, tmp_path: Path) -> None:
    broken = """
        def diagnose():
            raise RuntimeError("the driver of this node is too old")
        module.diagnose = diagnose
    """
    sick = hook(tmp_path / "hook", "gan_dist.doctor", broken, "os.environ.get('SLURMD_NODENAME') == 'node2'")
    words = ("slurm.nodes=2", "slurm.cpus_per_task=1", "slurm.time=5", f"job.runs={tmp_path / 'runs'}")
    done = launch(linuxproc, "doctor", *words, sick, check=False)
    assert re.search(r"^node1 +ok .*torch ", done.stdout, re.MULTILINE), done.stdout
    assert "\nnode2  problem  no report: RuntimeError: the driver of this node is too old\n" in done.stdout
    (home,) = (tmp_path / "runs").iterdir()
    line = f"launch: 1 node(s) reported nothing; logs in {home / 'logs'}\n"
    assert (done.returncode, done.stderr) == (1, line)
    assert "Traceback" in (home / "logs" / "doctor-node2.log").read_text()


def test_tensorboard_as_a_job_says_how_to_reach_it(linuxproc: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("slurm: {cpus_per_task: 1, time: 5, signal_lead_s: 30}")
    (tmp_path / "runs").mkdir()
    output = launch(linuxproc, "tensorboard", str(tmp_path / "runs"), "--cluster", str(file)).stdout
    job, port = re.findall(r"job (\d+)", output)[0], re.findall(r"-L (\d+):localhost:\1", output)
    assert port and re.search(r"ssh -N -J root@\S+ -L \d+:localhost:\d+ root@node\d", output), output
    assert "rsync -avzm" in output and "bind_all" not in output
    host = linuxproc.hosts[re.findall(r"root@(node\d)", output)[0]]
    url = f"http://127.0.0.1:{port[0]}/data/environment"
    ask = ("nsenter", "-t", str(host.process and host.process.pid), "-n", sys.executable, "-c")
    code = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=5).status)"
    wait_until(lambda: subprocess.run([*ask, code], capture_output=True, check=False).stdout == b"200\n", 60, "answer")
    with pytest.raises(OSError):  # nobody else on the cluster's network can reach it
        urllib.request.urlopen(f"http://{host.address}:{port[0]}/", timeout=3)
    linuxproc.run("scancel", job)
    log = tmp_path / "plain.log"
    words = ("--time=5", "--output", str(log), "slurm/tensorboard.sbatch", str(tmp_path / "runs"))
    job = sbatch(linuxproc, *words)
    wait_until(lambda: log.exists() and re.search(r"ssh -N -J root@\S+ -L", log.read_text()), START_S, "way in")
    linuxproc.run("scancel", job)
    wait_until(lambda: not leftovers(linuxproc), 40, "empty hosts")


def test_local_trains_two_ranks_and_usr2_saves(config: str, tmp_path: Path) -> None:
    run = Run(None, tmp_path / "run", "")  # type: ignore[arg-type]
    words = [sys.executable, "-m", "launch", "local", config, "--ranks", "2", "--run-dir", str(run.path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: max(run.steps(), default=0) >= 10, START_S, "step 10")
    os.kill(process.pid, signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGUSR2" in output, output
