"""GPUs as the doctor sees them: whether torch has code for them, the driver serves torch's build, and they are well."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from gan_dist.utils.errors import first_line

State = Literal["ok", "warning", "problem"]
CUDA_DRIVERS = {11: 450.80, 12: 525.60, 13: 580.65}
"""Oldest Linux driver for a build of each CUDA generation (NVIDIA, CUDA compatibility, minor version compatibility)."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis: what was looked at, how it is, what was found, and what to do (empty when ok)."""

    topic: str
    state: State
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Returns the finding for --json."""
        return asdict(self)

    def line(self) -> str:
        """Returns the finding as one line of text."""
        return f"{self.state:<8} {self.topic:<12} {self.found}" + (f"; {self.advice}" if self.advice else "")


def nvidia_smi(*fields: str) -> list[list[str]] | None:
    """Returns a row of the asked fields for each GPU, or None where there is no driver that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [[field.strip() for field in line.split(",")] for line in told.splitlines() if line.strip()]


def driver_advice(driver: str, cuda: str | None) -> str:
    """Returns what mends a driver that is too old for torch's CUDA build, or nothing where it is new enough."""
    major = int((cuda or "0").split(".")[0])
    needed = CUDA_DRIVERS.get(major)
    found = re.match(r"\d+\.\d+", driver)
    if needed is None or found is None or float(found[0]) >= needed:
        return ""
    usable = [generation for generation, oldest in CUDA_DRIVERS.items() if float(found[0]) >= oldest]
    mend = "ask for a newer driver"
    if usable:
        build = {11: "cu118", 12: "cu126", 13: "cu130"}[max(usable)]
        mend = f"uv pip install torch torchvision --torch-backend={build}, or ask for a newer driver"
    return f"driver {driver} is too old for torch's CUDA {cuda} (needs {needed:g}): {mend}"


def arch_advice(capability: tuple[int, int], archs: list[str]) -> str:
    """Returns what mends a torch build without code for a GPU of `capability`, or nothing where it has some.

    archs: torch.cuda.get_arch_list(). sm_XY runs on the same X with Y or more; compute_XY on anything newer too.
    """
    mine = 10 * capability[0] + capability[1]
    for arch in archs:
        kind, _, number = arch.partition("_")
        built = int(re.sub(r"\D", "", number) or 0)
        if kind == "sm" and built // 10 == mine // 10 and built <= mine:
            return ""
        if kind == "compute" and built <= mine:
            return ""
    # The newest wheels drop old GPUs first; the CUDA 12.6 builds keep them longest.
    build = "cu126" if mine < 75 else "cu130"
    return (
        f"this torch has no code for sm_{mine} (it has {', '.join(archs) or 'none'}): "
        f"uv pip install torch torchvision --torch-backend={build}"
    )


def check_gpus() -> list[Finding]:
    """Each GPU, its driver, whether torch has code for it, and its health."""
    rows = nvidia_smi(
        "name",
        "driver_version",
        "memory.total",
        "memory.used",
        "temperature.gpu",
        "ecc.errors.uncorrected.volatile.total",
    )
    if not torch.cuda.is_available():
        if rows is None:
            return [Finding("gpu", "ok", "none: runs on the CPU, about a thousand times slower than a large GPU")]
        if torch.version.cuda is None:
            advice = "torch was built without CUDA: pip install --force-reinstall torch torchvision"
        else:
            advice = driver_advice(rows[0][1], torch.version.cuda) or "CUDA_VISIBLE_DEVICES may hide it"
        return [Finding("gpu", "problem", f"{len(rows)} x {rows[0][0]}, but torch cannot use it", advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = torch.cuda.get_device_capability(index)
        found = f"{index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}"
        if advice := arch_advice(capability, torch.cuda.get_arch_list()):
            findings.append(Finding("gpu", "problem", found, advice))
            continue
        try:
            probe = torch.randn(256, 256, device=f"cuda:{index}")
            finite = bool(torch.isfinite(probe @ probe).all())
        except RuntimeError as error:
            findings.append(Finding("gpu", "problem", found, f"it fails: {first_line(error)}"))
            continue
        if not finite:
            findings.append(Finding("gpu", "problem", found, "it computes nonsense; leave this GPU out"))
            continue
        findings.append(_health(found, rows[index] if rows and index < len(rows) else None))
    return findings


def _health(found: str, row: list[str] | None) -> Finding:
    if row is None:
        return Finding("gpu", "ok", found)
    _, driver, total, used, heat, errors = row
    found += f", driver {driver}, {heat} C"
    if errors.isdigit() and int(errors) > 0:
        return Finding("gpu", "problem", found, f"{errors} uncorrected memory errors: have it reset or replaced")
    if total.isdigit() and used.isdigit() and int(used) > 0.2 * int(total):
        return Finding("gpu", "warning", found, f"{int(used) / 1024:.1f} GiB are taken already: is another job on it?")
    if heat.isdigit() and int(heat) >= 85:
        return Finding("gpu", "warning", found, "hot: it slows itself down")
    return Finding("gpu", "ok", found)


def check_nccl() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("nccl", "ok", "not needed without GPUs; gloo carries the ranks")]
    if not torch.distributed.is_nccl_available():
        return [Finding("nccl", "problem", "this torch has none", "several GPUs need it: install torch's CUDA build")]
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return [Finding("nccl", "ok", ".".join(map(str, version)))]


def check_bf16() -> list[Finding]:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return [Finding("bf16", "ok", "the GPU has it; train.precision=auto takes it")]
        return [Finding("bf16", "ok", "the GPU has none; train.precision=auto takes fp32")]
    native = any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16"))
    told = "the CPU has it; train.precision=bf16 is about twice as fast" if native else "the CPU has none"
    return [Finding("bf16", "ok", told)]


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()
