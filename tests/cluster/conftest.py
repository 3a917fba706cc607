"""One booted cluster for each way of tracking processes, shared by all tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.boot import FREEZER, Cluster, missing


def _boot(proctrack: str) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    if proctrack == "cgroup" and not FREEZER.is_dir():
        pytest.skip(f"needs a cgroup v1 hierarchy at {FREEZER}")  # of the kernel: CI cannot install it
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
