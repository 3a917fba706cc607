"""A sweep on a real SLURM: killed once, a node lost once, trials pruned; every trial is accounted for."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from gan_dist.runs.study import Sweep, read_sweep
from launch.submit import submissions
from tests.cluster.boot import Cluster, wait_until
from tests.cluster.jobs import ROOT, Run, hook, small_config
from tests.helpers.datasets import write_dataset

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

KNOWN = """
import yaml
from gan_dist.training.update import Update
with open(os.path.join(sys.argv[2], "config.yaml")) as file:
    rate = float(yaml.safe_load(file)["optim"]["g_lr"])
step = Update.step
Update.step = lambda *words: (time.sleep(0.1), step(*words))[1]
module.Evaluator.evaluate = lambda self, step, *words: {"evaluate/swd": rate * (1 + 1 / step), "evaluate/seconds": 0.0}
"""
"""What a job does instead of evaluating: a known function of the learning rate, at the speed of a real run."""
TRIALS, STEPS = 12, 80


@pytest.mark.waits
def test_a_sweep_is_killed_loses_a_node_and_accounts_for_every_trial(tmp_path_factory: pytest.TempPathFactory) -> None:
    at = tmp_path_factory.mktemp("sweep")
    epochs = STEPS * 8 / len(write_dataset(at / "set", (80, 40)))
    config = small_config(
        at / "set",
        at,
        train={"global_batch": 8, "device": "cpu", "epochs": epochs, "threads": 1},
        evaluate={"every_steps": 8, "samples": 100},
        log={"scalars_every": 8, "samples_every": 10000, "grid": 4},
    )
    (at / "space.yaml").write_text("optim.g_lr: {log: [1e-5, 1e-2]}\n")
    folder = at / "runs" / "sweep"
    known = hook(at / "hook", "gan_dist.training.evaluator", KNOWN, "'submitit' in sys.orig_argv")
    words = ["sweep", config, str(at / "space.yaml"), "--run-dir", str(folder), "--trials", str(TRIALS)]
    words += ["--parallel", "2", "--seed", "6", "slurm.time=10", "slurm.cpus_per_task=1", known]

    def begin(cluster: Cluster) -> subprocess.Popen[bytes]:
        env = {**cluster.environment(), "OMP_NUM_THREADS": "1", "GAN_DIST_LEASE_TERM_S": "20"}
        with (at / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "launch", *words], env=env, cwd=ROOT, stdout=log, stderr=log)

    def trial(cluster: Cluster, number: int) -> Run:
        path = folder / f"trial-{number:04d}"
        return Run(cluster, path, submissions(path)[-1].job)

    def so_far() -> Sweep | None:
        return read_sweep(folder) if (folder / "study.journal").exists() else None

    with Cluster(3) as cluster:
        first = begin(cluster)
        try:
            wait_until(lambda: (sweep := so_far()) and len(sweep.trials) == 2, 120, "two trials")
            wait_until(lambda: submissions(folder / "trial-0001"), 60, "two jobs")
            for number in (0, 1):
                trial(cluster, number).wait_for_step(16)
            first.send_signal(signal.SIGKILL)
            first.wait()
            second = begin(cluster)
            wait_until(lambda: "trial-0002" in (at / "log").read_text(), 120, "the next trial")
            lost = trial(cluster, 2)
            lost.wait_for_step(16)
            cluster.hosts[cluster.job(lost.job)["NodeList"]].kill()
            assert second.wait(400) == 0, (at / "log").read_text()
        finally:
            first.kill()
            print((at / "log").read_text())
        sweep = read_sweep(folder)
        states = [each.state for each in sweep.trials]
        assert len(states) == TRIALS and set(states) <= {"complete", "pruned"} and states.count("pruned") >= 2, states
        assert all(len(submissions(each.path)) == 1 for each in sweep.trials), "a trial was submitted twice"
        assert lost.restarts() == 1 and len(lost.events("start")) == 2
        kinds = {each.number: ("end" if each.state == "complete" else "stop") for each in sweep.trials}
        assert all(trial(cluster, number).events(kind) for number, kind in kinds.items())
        best = min(each.settings["optim.g_lr"] for each in sweep.trials if each.state == "complete")
        assert sweep.best and sweep.best.settings["optim.g_lr"] == best
        log = (at / "log").read_text()
        assert f"{TRIALS} of {TRIALS} trials ended: " in log and all(each.name in log for each in sweep.trials)
        assert not cluster.run("squeue", "-h").stdout.strip()
