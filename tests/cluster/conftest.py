"""One booted cluster for each way of tracking processes, shared by all tests that ask for it."""

from __future__ import annotations

import inspect
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, missing
from tests.cluster.jobs import STEPS, Run, small_config

LANES = 1
_booted: list[Cluster] = []
_begun: dict[str, Future[None]] = {}
"""Tests marked `waits` that run in threads of their own. What they are given is the whole session's."""


def _boot(proctrack: str) -> Iterator[Cluster]:
    if reason := missing(proctrack):
        pytest.skip(reason)
    # CI's time limit ends the session, fixtures and all, instead of the process: no bridge is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated", 143))
    with Cluster(3, proctrack, {"message_timeout_s": 30}) as cluster:
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


@pytest.fixture(scope="session")
def minute() -> Iterator[Cluster]:
    """A cluster for runs that wait for something, while others are tested elsewhere."""
    if reason := missing("cgroup"):
        pytest.skip(reason)
    with Cluster(2, "cgroup", {"kill_wait_s": 30}) as cluster:  # as real ones
        yield cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that mostly wait come last: they are begun with the first."""
    items.sort(key=lambda item: item.get_closest_marker("waits") is not None)


@pytest.fixture(scope="session", autouse=True)
def _begin_early(request: pytest.FixtureRequest) -> Iterator[None]:
    """Begins the tests that mostly wait, LANES of them at a time, beside all others."""
    waiting = [item for item in request.session.items if item.get_closest_marker("waits")]
    calls: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
    if not missing("cgroup"):
        for item in waiting:
            assert isinstance(item, pytest.Function)
            words = {name: request.getfixturevalue(name) for name in inspect.signature(item.obj).parameters}
            _begun[item.nodeid] = Future()
            calls.put((_begun[item.nodeid], partial(item.obj, **words)))
    for _ in range(LANES if _begun else 0):
        threading.Thread(target=_work, args=(calls,), daemon=True).start()
    yield
    for cluster in list(Cluster.running):  # of a test that was not waited for
        cluster.__exit__()


def _work(calls: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]]) -> None:
    with suppress(queue.Empty):
        while True:
            future, call = calls.get_nowait()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Waits for a test that was begun early, and fails as it failed; runs any other as ever."""
    if pyfuncitem.nodeid not in _begun:
        return None
    _begun[pyfuncitem.nodeid].result()
    return True


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
def whole(minute: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run of STEPS by two ranks on two hosts, beside the tests that are compared with it."""
    return Run.submit(minute, config, tmp_path_factory.mktemp("runs") / "whole", *STEPS)
