"""The commands for a GPU machine, played on this one: the first minute there is not for typing errors."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.model import batchnorm
from tests.bench.gpu_figures import __main__ as figures
from tests.bench.gpu_figures import check


def test_each_command_ends_within_ten_minutes() -> None:
    for command, parts in figures.COMMANDS.items():
        assert sum(limit for _, limit in parts.values()) <= 570, command


@pytest.mark.chaos  # a minute and more, together; several times that beside other suites
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["check", "choices", "job", "ranks"])
def test_a_dry_run_measures_every_part(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    status = figures.main([command, "--dry-run", "--out", str(out), "--work", str(tmp_path / "work")])
    log = (out / f"{command}.log").read_text()
    assert status == 0, log
    found = json.loads((out / f"{command}.json").read_text())
    assert found["dry_run"] and list(found["parts"]) == list(figures.COMMANDS[command])
    assert not [name for name, part in found["parts"].items() if "failed" in part or len(part) < 3]
    assert sum(file.stat().st_size for file in out.rglob("*")) < 2**20  # a few small files
    assert f"{command} {list(found['parts'])[-1]}: done" in capsys.readouterr().out


def test_a_part_that_fails_hangs_or_dies_costs_its_own_figures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each part runs as the first word of its name says, in a process of its own.
    monkeypatch.setattr(figures, "MODULE", "tests.helpers.parts")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts: Any = {"fails": (None, 60), "hangs": (None, 2), "dies": (None, 60), "measures": (None, 60)}
    monkeypatch.setitem(figures.COMMANDS, "check", parts)
    start = time.monotonic()
    assert figures.main(["check", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 60
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["parts"]["measures"]["figure"] == 1 and "failed" not in found["parts"]["measures"]
    assert found["parts"]["fails"]["failed"] == "RuntimeError: status 1; check.log says more"
    assert found["parts"]["hangs"]["failed"] == "RuntimeError: ended after its 2 s"
    assert found["parts"]["hangs"]["figure"] == 1  # which it had kept before
    assert found["parts"]["dies"]["failed"] == "RuntimeError: status -11; check.log says more"
    assert "a test of failure" in (tmp_path / "check.log").read_text()


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            figures.main(["check", "--out", str(tmp_path)])
        assert "torch sees no CUDA device here; --dry-run needs none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        figures.main(["job", "--out", str(tmp_path), "--only", "profile", "--dry-run"])
    assert "--only: job has headline, evaluation, not profile" in capsys.readouterr().err


def test_kernels_are_told_apart_by_name() -> None:
    kinds = {
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolutions and products",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var>": "batch norm",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "collectives",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
        "void at::native::vectorized_elementwise_kernel<4, leaky_relu_backward>": "elementwise",
        "Memcpy DtoD (Device -> Device)": "copies and casts",
    }
    assert {name: check.kind_of(name) for name in kinds} == kinds
    source = Path(batchnorm.__file__).with_name("batchnorm_triton.py").read_text()
    ours = re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)
    assert len(ours) >= 7 and {check.kind_of(name) for name in ours} == {"batch norm"}
