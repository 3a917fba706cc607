"""What every test shares: a painted dataset; GPU tests wait for a GPU, and in CI nothing else is skipped.

No test depends on how fast this machine is or how it rounds; tests/__init__.py has switches that play another machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests import PRECISION, THREADS

# Small networks on few cores: more threads would only wait for one another.
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for what is started

# An example takes as long as it takes.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

ALONE = re.compile(r"(?<!not )\b(cluster|gpu)\b")
"""What -m may ask for that is one for all: the SLURM that is booted here, the GPU's memory."""

MAY_SKIP_IN_CI = re.compile(r"needs (a|two) CUDA devices?|needs torch|needs a cgroup v1")
"""What .ci/run cannot install. Programs (SLURM, a browser, ...) it can, so a test that lacks one there has failed."""


def pytest_report_header() -> str:
    return f"gan_dist: {THREADS} thread(s) a process, precision auto is {PRECISION or 'what this machine has'}"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own, which acts on what is set here
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Shares a whole suite out to a worker for each core. Named files and -n 0 stay in this process, as does --pdb."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker is asked too, and has workers of its own if it says so
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not ALONE.search(config.option.markexpr)
    workers = min(4, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 2
    chosen = getattr(config.option, "numprocesses", 0)  # None unless somebody says otherwise; no option without xdist
    if chosen is None and whole and workers > 1 and not config.option.usepdb:
        # A file is one worker's: what its tests share, worlds of ranks for half a minute, is made once.
        config.option.numprocesses, config.option.dist = workers, "loadfile"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _no_skips(report: Any) -> Any:
    """Returns the report, turned into a failure where CI skipped something that it could have run."""
    if os.environ.get("GAN_DIST_CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not MAY_SKIP_IN_CI.search(reason):
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}: skipped in CI, which installs what it needs: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _no_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _no_skips((yield))


@pytest.fixture(scope="session")
def paintings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 70 small paintings in several sizes and formats, 4 of them broken."""
    from gan_dist.data.prepare.synthetic import paint_folder

    folder = tmp_path_factory.mktemp("paintings")
    paint_folder(folder, 70, broken=4)
    return folder


@pytest.fixture(scope="session")
def dataset(paintings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paintings at 32x32, in five shards of unequal sizes. Read only: tests that damage it copy it first."""
    from gan_dist.data.prepare.prepare import prepare

    out = tmp_path_factory.mktemp("dataset") / "shards"
    prepare([paintings], out, resolution=32, shard_samples=16, max_reject_fraction=0.5)
    return out


RunHere = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Generator[RunHere, None, None]:
    """Yields what plays `gan-dist WORDS...` in this process and in tmp_path, and returns it as a finished process.

    A process of its own takes seconds to start: one test of a kind has that, and the others have this.
    """
    from gan_dist.cli.main import main

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back what main sets

    def run_here(*words: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["gan-dist", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code is None or isinstance(left.value.code, int)
        return subprocess.CompletedProcess([*map(str, words)], left.value.code or 0, *capsys.readouterr())

    yield run_here
    for number, handler in handlers.items():
        signal.signal(number, handler)
