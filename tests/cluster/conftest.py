"""One booted cluster for each way of tracking processes, shared by all tests that ask for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, missing
from tests.cluster.jobs import FIRST_START, STEPS, Run, hook, slowly, small_config

_booted: list[Cluster] = []


def _boot(proctrack: str) -> Iterator[Cluster]:
    if reason := missing(proctrack):
        pytest.skip(reason)
    # CI's time limit ends the session, fixtures and all, instead of the process: no bridge is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated", 143))
    with Cluster(3, proctrack) as cluster:
        _booted.append(cluster)
        yield cluster
        _booted.remove(cluster)


@pytest.fixture(autouse=True)
def _no_job_outlives_its_test() -> Iterator[None]:
    """What a failed test leaves in the queue would slow down the others, or make them fail."""
    yield
    for cluster in _booted:
        cluster.run("scancel", "--user=root", check=False)


@pytest.fixture(scope="session")
def linuxproc() -> Iterator[Cluster]:
    """Three hosts whose signals reach every process of a step."""
    yield from _boot("linuxproc")


@pytest.fixture(scope="session")
def cgroup() -> Iterator[Cluster]:
    """Three hosts whose signals reach the tasks of a step only; the freezer kills what they leave."""
    yield from _boot("cgroup")


@pytest.fixture(scope="session")
def other() -> Iterator[Cluster]:
    """A cluster of another name and other habits: bound tasks, typed GPUs, jobs that only their owners see."""
    if reason := missing():
        pytest.skip(reason)
    habits = {"name": "other", "task_plugin": "affinity", "gres": "gpu:a100-sxm4.80gb:2", "private_data": "jobs"}
    with Cluster(2, "linuxproc", {**habits, "cpus": 2}) as cluster:
        _booted.append(cluster)
        yield cluster
        _booted.remove(cluster)


LIMIT = (*STEPS, "slurm.time=1", "slurm.signal_lead_s=10")
LATE = """
from gan_dist.training.update import Update
step, save = Update.step, module.save
Update.step = lambda *words: (time.sleep(0.4), step(*words))[1]
module.save = lambda *words, **more: (words[1]["step"] and time.sleep(100), save(*words, **more))
"""


@pytest.fixture(scope="session")
def minute() -> Iterator[Cluster]:
    """A cluster whose jobs meet their time limits while others are tested elsewhere."""
    if reason := missing("cgroup"):
        pytest.skip(reason)
    with Cluster(2, "cgroup") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def limited(minute: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A slow run that meets its time limit."""
    slow = slowly(tmp_path_factory.mktemp("slowly"))
    return Run.submit(minute, config, tmp_path_factory.mktemp("limited") / "run", *LIMIT, slow)


@pytest.fixture(scope="session")
def late(minute: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first start saves until long after its time limit."""
    slow = hook(tmp_path_factory.mktemp("late"), "gan_dist.training.checkpointer", LATE, FIRST_START)
    words = (*LIMIT, slow, "checkpoint.every_steps=100000", "dist.timeout_s=200")
    return Run.submit(minute, config, tmp_path_factory.mktemp("late") / "run", *words)


@pytest.fixture(scope="session", autouse=True)
def _begin_early(request: pytest.FixtureRequest) -> None:
    """The least that SLURM knows is a minute, in which others can be tested."""
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in ("limited", "late"):
        if name in wanted and not missing("cgroup"):
            request.getfixturevalue(name)


@pytest.fixture(params=["linuxproc", "cgroup"])
def either(request: pytest.FixtureRequest) -> Cluster:
    """Each of the two in turn."""
    booted: Cluster = request.getfixturevalue(request.param)
    return booted


@pytest.fixture(scope="session")
def config(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration of small networks that saves every tenth step."""
    return small_config(dataset, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def whole(linuxproc: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of STEPS by two ranks on two hosts."""
    run = Run.submit(linuxproc, config, tmp_path_factory.mktemp("runs") / "whole", *STEPS)
    run.wait_for("done")
    return run.path
