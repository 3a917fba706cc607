"""The doctor: every check on this machine, and its advice for machines that this one is not."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gan_dist import doctor
from gan_dist.doctor import Finding, arch_advice, diagnose, driver_advice, healthy


def test_this_machine_can_run_these_tests(tmp_path: Path) -> None:
    findings = diagnose(tmp_path / "not" / "yet" / "there")
    assert healthy(findings), [finding.line() for finding in findings if finding.state == "problem"]
    wanted = {"python", "packages", "torch", "gpu", "nccl", "bf16", "compile", "memory", "shm", "disk"}
    assert {finding.topic for finding in findings} >= wanted | {"network", "slurm"}
    assert all(finding.advice for finding in findings if finding.state != "ok")
    assert list(tmp_path.iterdir()) == []
    rows = json.loads(json.dumps([finding.to_dict() for finding in findings]))
    assert rows[0]["topic"] == "python" and rows[0]["state"] == "ok"


def test_a_check_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(doctor, "check_memory", broken)
    (finding,) = [finding for finding in diagnose() if finding.topic == "memory"]
    assert (finding.state, finding.found) == ("warning", "could not be checked: no such thing")


def test_a_problem_is_unhealthy_and_a_warning_is_not() -> None:
    assert healthy([Finding("a", "ok", ""), Finding("b", "warning", "")])
    assert not healthy([Finding("a", "ok", ""), Finding("b", "problem", "")])
    assert Finding("gpu", "problem", "dusty", "blow").line() == "problem  gpu          dusty; blow"


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ("580.95.05", "13.0", ""),
        ("580.159.04", "13.2", ""),
        ("525.147.05", "12.8", ""),
        ("570.86.15", "13.0", "needs 580.65.*--torch-backend=cu126"),
        ("470.57.02", "12.8", "needs 525.60.*--torch-backend=cu118"),
        ("390.10", "12.8", "ask for a newer driver"),
        ("570.86.15", None, ""),
    ],
)
def test_a_driver_too_old_for_torchs_build(driver: str, cuda: str | None, said: str) -> None:
    advice = driver_advice(driver, cuda)
    if not said:
        assert advice == ""
    else:
        assert re.search(said, advice), advice


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((12, 1), ["sm_80", "compute_120"], True),
        ((6, 1), ["sm_75", "sm_80", "compute_80"], False),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for(capability: tuple[int, int], archs: list[str], fits: bool) -> None:
    advice = arch_advice(capability, archs)
    assert (advice == "") == fits
    if not fits:
        assert "--torch-backend=" in advice


@pytest.mark.parametrize(
    ("row", "state", "said"),
    [
        (["X", "580.1", "81920", "100", "40", "0"], "ok", ""),
        (["X", "580.1", "81920", "100", "40", "3"], "problem", "3 uncorrected memory errors"),
        (["X", "580.1", "81920", "40960", "40", "[N/A]"], "warning", "40.0 GiB are taken"),
        (["X", "580.1", "81920", "100", "91", "0"], "warning", "hot"),
    ],
)
def test_the_health_of_a_gpu(row: list[str], state: str, said: str) -> None:
    finding = doctor._health("0: X", row)
    assert finding.state == state and said in finding.advice


def test_an_old_torch_and_a_missing_package_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_version", lambda: (2, 10))
    (finding,) = doctor.check_torch()
    assert finding.state == "problem" and "2.11 or newer" in finding.advice
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", "no-such-package-here>=1 ; x"])
    (finding,) = doctor.check_packages()
    assert finding.state == "problem" and finding.advice == "pip install no-such-package-here"


def test_a_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs torch without a GPU")
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: [["Old", "470.57", "1", "0", "40", "0", "GPU-1"]])
    (finding,) = doctor.check_gpus()
    assert finding.state == "problem" and "cannot use it" in finding.found and finding.advice


def test_a_gpus_health_is_its_own_whatever_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["H", "580.95", "80000", "0", "40", "7", "GPU-AA"], ["H", "580.95", "80000", "0", "41", "0", "GPU-BB"]]
    facts = SimpleNamespace(name="H", total_memory=80 * 2**30, uuid="bb")
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: rows)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": facts,
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *words, value=value: value)
    ones = torch.ones(2, 2)
    monkeypatch.setattr(torch, "randn", lambda *words, **named: ones)
    (finding,) = doctor.check_gpus()
    assert finding.state == "ok" and "41 C" in finding.found


def test_a_full_or_forbidden_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    (finding,) = doctor.check_disk(tmp_path)
    assert finding.state == "problem" and "No space left" in finding.found
