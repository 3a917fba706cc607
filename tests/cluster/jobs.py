"""Runs submitted to a booted cluster, as a user would, and what became of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.job.verdict import FINAL
from tests.cluster.boot import Cluster, wait_until
from tests.helpers.training import small

ROOT = Path(__file__).parents[2]
STEPS = ("--max-steps", "60")
"""How long a run is that is disturbed and compared with one that is not."""
FIRST_START = "os.environ.get('SLURM_RESTART_COUNT', '0') == '0'"
"""What a hook asks of a process that a job starts before it was ever requeued."""
START_S = 100
"""Seconds that a job may take from submission, or from a requeue, to its first steps on a busy machine."""


HOOK = """
import importlib.abc, importlib.util, os, sys, time

def change(module):
{change}

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def execute_and_change(module):  # in an archive one loader loads all modules of a folder
            execute(module)
            if module.__name__ == name:
                change(module)
        spec.loader.exec_module = execute_and_change
        return spec

if {when}:
    sys.meta_path.insert(0, Hook())
"""


def hook(folder: Path, module: str, change: str, when: str = "True") -> str:
    """Returns the option by which every Python of a job runs the lines `change` on `module` once that is loaded.

    `when` is asked of each process: a condition on os.environ.
    """
    folder.mkdir(exist_ok=True)
    lines = textwrap.indent(textwrap.dedent(change).strip(), "    ")
    (folder / "sitecustomize.py").write_text(HOOK.format(module=module, change=lines, when=when))
    return f"job.env={{PYTHONPATH: {folder}}}"


def slowly(folder: Path, seconds: float = 0.4) -> str:
    """Returns the option that makes the steps of a run's first start slow: schedulers may take their time to end it."""
    step = f"""
        step = module.Update.step
        module.Update.step = lambda *words: (time.sleep({seconds}), step(*words))[1]
    """
    return hook(folder, "gan_dist.training.update", step, FIRST_START)


def as_user(user: int) -> list[str]:
    """Returns the words that run a command as another user, who may read everything: this Python may be root's own."""
    who = (f"--reuid={user}", f"--regid={user}", "--clear-groups")
    return ["setpriv", *who, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]


def launch(
    cluster: Cluster,
    *words: str,
    check: bool = True,
    cwd: Path = ROOT,
    user: int | None = None,
    settings: Mapping[str, str] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Returns what `python -m launch WORDS` printed on the cluster's login node, by default as root.

    `settings` are a person's, as `env` is.
    """
    env = {**cluster.environment(), "OMP_NUM_THREADS": "1", **(settings or {}), **env}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [*(as_user(user) if user else []), sys.executable, "-m", "launch", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def sbatch(cluster: Cluster, *words: str, **env: str) -> str:
    """Returns the id of a job submitted by plain sbatch, with this environment's python on PATH."""
    path = f"{Path(sys.executable).parent}:{cluster.environment()['PATH']}"
    done = subprocess.run(
        ["sbatch", "--parsable", *words],
        env={**cluster.environment(), "PATH": path, "GAN_DIST_CODE": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def small_config(dataset: Path, directory: Path, **sections: dict[str, Any]) -> str:
    """Returns a file with a configuration that trains a thousand steps in a minute, and saves every tenth."""
    values = small(dataset) | {"checkpoint": {"every_steps": 10}, "dist": {"timeout_s": 10.0, "init_timeout_s": 90.0}}
    values["log"] = {"scalars_every": 2, "samples_every": 1000, "grid": 4}
    values["train"] = {**values["train"], "epochs": 10000}
    file = directory / "small.yaml"
    file.write_text(yaml.safe_dump({**values, **sections}))
    return str(file)


@dataclass
class Run:
    """One submitted run."""

    cluster: Cluster
    path: Path
    job: str

    @classmethod
    def submit(cls, cluster: Cluster, config: str, path: Path, *words: str, nodes: int = 2, ranks: int = 1) -> Run:
        """Submits `nodes` times `ranks` ranks with a short time limit, and returns the run."""
        shape = [f"slurm.nodes={nodes}", f"slurm.tasks_per_node={ranks}", "slurm.cpus_per_task=1", "slurm.time=10"]
        given = {word.partition("=")[0] for word in words}
        shape = [word for word in shape if word.partition("=")[0] not in given]
        output = launch(cluster, "submit", config, *shape, "--run-dir", str(path), *words).stdout
        return cls(cluster, path, re.findall(r"job (\d+)", output)[0])

    @property
    def folder(self) -> Path:
        """The newest submission's directory."""
        return sorted((self.path / "launch").iterdir())[-1]

    def history(self) -> list[tuple[str, ...]]:
        """Returns (restart, what, checkpoint, why, ...) of each ended start."""
        file = self.folder / "attempts" / self.job / "history"
        return [tuple(line.split("\t")) for line in file.read_text().splitlines()] if file.exists() else []

    def steps(self) -> list[int]:
        """Returns the steps that were logged so far."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        return [line["step"] for line in lines if "event" not in line]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Returns the run's events of one name."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line.get("event") == name]

    def wait_for_step(self, step: int) -> None:
        """Returns once this step was logged."""
        self.wait(lambda: max(self.steps(), default=0) >= step, START_S, f"step {step}")

    def wait_for(self, *what: str, limit_s: float = START_S) -> tuple[str, ...]:
        """Returns the last line of the history once that says one of `what` happened."""

        def there() -> tuple[str, ...] | None:
            ends = self.history()
            if ends and ends[-1][1] in FINAL and ends[-1][1] not in what:
                raise AssertionError(f"expected {' or '.join(what)}, found:\n{self.story()}")
            return ends[-1] if ends and ends[-1][1] in what else None

        found: tuple[str, ...] = self.wait(there, limit_s, " or ".join(what))
        return found

    def wait(self, true: Any, limit_s: float, what: str) -> Any:
        """Returns the first true value; what the run says of itself when there is none within the limit."""
        try:
            return wait_until(true, limit_s, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        """Returns everything there is to know when a test failed."""
        logs = sorted((self.path / "logs").glob("*.log"))
        tails = [f"{file.name}:\n" + "\n".join(file.read_text(errors="replace").splitlines()[-12:]) for file in logs]
        return "\n".join([str(self.cluster.job(self.job)), str(self.history()), *tails])

    def restarts(self) -> int:
        """Returns how often SLURM has requeued the job."""
        return int(self.cluster.job(self.job)["Restarts"])

    def status(self) -> str:
        """Returns what `launch status` says."""
        return launch(self.cluster, "status", str(self.path)).stdout

    def finished(self) -> Path:
        """Returns the directory of the run once it is done."""
        self.wait_for("done")
        return self.path

    def ranks(self) -> dict[str, list[int]]:
        """Returns {host: pids of the run's ranks there}."""
        mark = f"launch.job.rank submitit {self.folder}"
        return {
            name: [pid for pid, words in host.processes().items() if mark in words and not words.startswith("srun")]
            for name, host in self.cluster.hosts.items()
            if host.process is not None
        }


def leftovers(cluster: Cluster) -> list[str]:
    """Returns the processes that jobs have left on the hosts."""
    return [words for host in cluster.hosts.values() if host.process for words in host.processes().values()]


def wait_for_empty_hosts(*clusters: Cluster, limit_s: float = 60) -> None:
    """Returns once jobs have left no process on any host. Raises TimeoutError with those that are left."""
    try:
        wait_until(lambda: not any(map(leftovers, clusters)), limit_s, "empty hosts")
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {[leftovers(cluster) for cluster in clusters]}") from None
