"""The figures of `bench prepare` hang together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gan_dist.bench.prepare import bench_prepare
from gan_dist.utils.errors import UserError
from tests.helpers.sources import fill


@pytest.mark.parametrize("workers", [0, 2])
def test_figures_hang_together(tmp_path: Path, workers: int) -> None:
    figures = bench_prepare(fill(tmp_path / "in", 60, broken=1), workers=workers, samples=40)
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["images"], figures["rejected"], figures["workers"]) == (31, 1, workers)
    assert figures["images_per_second"] > 0 and figures["mb_per_second_per_core"] > 0
    assert figures["images_per_second_per_core"] == pytest.approx(
        figures["images_per_second"] / max(workers, 1), abs=0.1
    )
    shares = figures["shares"]
    assert shares["read"] + shares["decode"] + shares["resize"] == pytest.approx(1, abs=0.001)
    assert 0 < shares["write"] < 1 and figures["floor_fraction"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_missing_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        bench_prepare(tmp_path / "none")
