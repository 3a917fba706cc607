"""One booted cluster for each way of tracking processes, shared by all tests that ask for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.boot import FREEZER, Cluster, missing
from tests.cluster.jobs import STEPS, Run, small_config


def _boot(proctrack: str) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    if proctrack == "cgroup" and not FREEZER.is_dir():
        pytest.skip(f"needs a cgroup v1 hierarchy at {FREEZER}")  # of the kernel: CI cannot install it
    # CI's time limit ends the session, fixtures and all, instead of the process: no bridge is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated", 143))
    with Cluster(3, proctrack) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def linuxproc() -> Iterator[Cluster]:
    """Three hosts whose signals reach every process of a step."""
    yield from _boot("linuxproc")


@pytest.fixture(scope="session")
def cgroup() -> Iterator[Cluster]:
    """Three hosts whose signals reach the tasks of a step only; the freezer kills what they leave."""
    yield from _boot("cgroup")


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
