"""A whole suite is shared out to workers; what is one for all, what is named and what a worker does itself is not."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_cmdline_main

WHOLE, NAMED = pytest.Config.ArgsSource.TESTPATHS, pytest.Config.ArgsSource.ARGS
PLAIN = "not chaos and not cluster"


@pytest.mark.parametrize(
    ("source", "marks", "asked", "cores", "expected"),
    [
        (WHOLE, PLAIN, None, 2, 2),
        (WHOLE, "chaos", None, 2, 2),
        (WHOLE, PLAIN, None, 64, 4),
        (WHOLE, PLAIN, None, 1, None),
        (WHOLE, PLAIN, 0, 2, 0),
        (WHOLE, PLAIN, 3, 2, 3),
        (WHOLE, "cluster", None, 2, None),
        (WHOLE, "gpu and not chaos", None, 2, None),
        (NAMED, PLAIN, None, 2, None),
    ],
)
def test_who_gets_workers(
    monkeypatch: pytest.MonkeyPatch, source: Any, marks: str, asked: int | None, cores: int, expected: int | None
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    config: Any = SimpleNamespace(args_source=source)
    config.option = SimpleNamespace(markexpr=marks, numprocesses=asked, dist="no", usepdb=False)
    pytest_cmdline_main(config)
    assert config.option.numprocesses == expected
    assert config.option.dist == ("loadfile" if asked is None and expected else "no")


def test_a_worker_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    config: Any = SimpleNamespace(args_source=WHOLE)
    config.option = SimpleNamespace(markexpr=PLAIN, numprocesses=None, dist="no", usepdb=False)
    pytest_cmdline_main(config)
    assert config.option.numprocesses is None


def test_without_the_plugin_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    config: Any = SimpleNamespace(args_source=WHOLE, option=SimpleNamespace(markexpr=PLAIN, usepdb=False))
    pytest_cmdline_main(config)
    assert not hasattr(config.option, "numprocesses")
