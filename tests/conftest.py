"""What every test shares: GPU tests wait for a GPU, and in CI nothing else is skipped."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import pytest
import torch

MAY_SKIP_IN_CI = re.compile(r"needs a CUDA device|needs torch")
"""What .ci/run cannot install. Programs (SLURM, a browser, ...) it can, so a test that lacks one there has failed."""


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
