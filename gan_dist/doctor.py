"""What this machine and environment can do for gan_dist, and what is wrong with them, each with what to do.

Nothing here changes anything; the probe of the disk uses a temporary file.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from gan_dist.utils.errors import first_line
from gan_dist.utils.system import available_memory, default_workers, existing

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
State = Literal["ok", "warning", "problem"]
CUDA_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Oldest Linux driver for a build of each CUDA generation (NVIDIA, CUDA compatibility, minor version compatibility)."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis: what was checked, its state, what was found, and what to do (mostly empty when ok)."""

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


def diagnose(directory: str | Path = ".") -> list[Finding]:
    """Returns the findings, `directory` being where runs and datasets will lie (for the speed of its disk).

    A check that itself fails becomes a warning that says so.
    """
    checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("gpu", check_gpus),
        ("nccl", check_nccl),
        ("bf16", check_bf16),
        ("compile", check_compile),
        ("memory", check_memory),
        ("shm", check_shared_memory),
        ("disk", lambda: check_disk(Path(directory))),
        ("network", check_network),
        ("slurm", check_slurm),
    )
    findings = []
    for topic, check in checks:
        try:
            findings += check()
        except Exception as error:  # strange machines are what this is for
            findings.append(Finding(topic, "warning", f"could not be checked: {first_line(error)}"))
    return findings


def healthy(findings: list[Finding]) -> bool:
    """Returns whether there is no problem (status 0); warnings do not count."""
    return not any(finding.state == "problem" for finding in findings)


def check_python() -> list[Finding]:
    version = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return [Finding("python", "problem", version, f"gan_dist needs {wanted} or newer: uv python install {wanted}")]
    return [Finding("python", "ok", version)]


def check_packages() -> list[Finding]:
    """Whether what gan_dist declares is installed, and torchvision was built for this torch."""
    missing = []
    try:
        declared = importlib.metadata.requires("gan-dist") or []
    except importlib.metadata.PackageNotFoundError:
        return [
            Finding("packages", "warning", "gan-dist is not installed here", "run from a checkout: pip install -e .")
        ]
    names = [re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0] for requirement in declared]
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return [Finding("packages", "problem", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")]
    try:
        import torchvision
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        advice = "its build does not match torch's: pip install --force-reinstall torch torchvision, from one index"
        return [Finding("packages", "problem", f"torchvision fails: {first_line(error)}", advice)]
    return [Finding("packages", "ok", f"{len(names)} packages, torchvision {torchvision.__version__}")]


def torch_version() -> tuple[int, int]:
    """Returns torch's version as (major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def check_torch() -> list[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    if torch_version() < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return [
            Finding("torch", "problem", found, f"gan_dist needs {wanted} or newer: pip install -U torch torchvision")
        ]
    return [Finding("torch", "ok", found)]


def nvidia_smi(*fields: str) -> list[list[str]] | None:
    """Returns a row of the fields for each GPU, or None where no driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [[field.strip() for field in line.split(",")] for line in output.splitlines() if line.strip()]


def driver_advice(driver: str, cuda: str | None) -> str:
    """Returns what to do about a driver that is too old for torch's CUDA build; empty where it is new enough."""
    major = int((cuda or "0").split(".")[0])
    needed = CUDA_DRIVERS.get(major)
    parts = re.match(r"(\d+)\.(\d+)", driver)
    if needed is None or parts is None:
        return ""
    version = int(parts[1]), int(parts[2])
    if version >= needed:
        return ""
    usable = [generation for generation, oldest in CUDA_DRIVERS.items() if version >= oldest]
    advice = "ask for a newer driver"
    if usable:
        build = {11: "cu118", 12: "cu126", 13: "cu130"}[max(usable)]
        advice = f"uv pip install torch torchvision --torch-backend={build}, or ask for a newer driver"
    return f"driver {driver} is too old for torch's CUDA {cuda} (needs {needed[0]}.{needed[1]}): {advice}"


def arch_advice(capability: tuple[int, int], archs: list[str]) -> str:
    """Returns what to do about a torch build without code for a GPU of `capability`; empty where it has some.

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
        "uuid",
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
            findings.append(Finding("gpu", "problem", found, "its results are not finite; leave this GPU out"))
            continue
        # nvidia-smi lists every GPU of the machine, torch those of CUDA_VISIBLE_DEVICES, in its order
        uuid = str(getattr(facts, "uuid", "?")).lower()
        row = next((row for row in rows or () if row[-1].lower().removeprefix("gpu-") == uuid), None)
        findings.append(_health(found, row))
    return findings


def _health(found: str, row: list[str] | None) -> Finding:
    if row is None:
        return Finding("gpu", "ok", found)
    _, driver, total, used, heat, errors, *_ = row
    found += f", driver {driver}, {heat} C"
    if errors.isdigit() and int(errors) > 0:
        return Finding("gpu", "problem", found, f"{errors} uncorrected memory errors: have it reset or replaced")
    if total.isdigit() and used.isdigit() and int(used) > 0.2 * int(total):
        return Finding(
            "gpu", "warning", found, f"{int(used) / 1024:.1f} GiB are taken already: does another job use it?"
        )
    if heat.isdigit() and int(heat) >= 85:
        return Finding("gpu", "warning", found, "it is hot and slows itself down")
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
    line = "the CPU has it; train.precision=bf16 is about twice as fast" if native else "the CPU has none"
    return [Finding("bf16", "ok", line)]


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def check_compile() -> list[Finding]:
    """Whether torch.compile can build: a C++ compiler and Python's headers for the CPU, Triton for a GPU."""
    if torch.cuda.is_available():
        try:
            import triton
        except ImportError:
            return [Finding("compile", "warning", "no Triton", "pip install triton, or train.runner=eager")]
        if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("clang") is None:
            advice = "Triton builds its launchers with gcc or clang: install one, or train.runner=eager"
            return [Finding("compile", "warning", "no C compiler", advice)]
        return [Finding("compile", "ok", f"Triton {triton.__version__}")]
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        advice = "the compiled runner needs g++ or clang++; train.runner=eager needs none"
        return [Finding("compile", "warning", "no C++ compiler", advice)]
    import sysconfig

    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return [Finding("compile", "warning", f"{compiler}, but no Python.h", "install Python's headers (python3-dev)")]
    return [Finding("compile", "ok", f"{compiler} and Python's headers")]


def check_memory() -> list[Finding]:
    memory = available_memory()
    if memory >= 2**60:
        return [Finding("memory", "warning", "unknown on this system")]
    found = f"{memory / 2**30:.1f} GiB available to this process, {default_workers()} CPU cores"
    if memory < 4 * 2**30:
        return [Finding("memory", "warning", found, "lower train.global_batch or prepare with fewer --workers")]
    return [Finding("memory", "ok", found)]


def check_shared_memory() -> list[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        return [Finding("shm", "warning", "no /dev/shm", "NCCL between GPUs of one machine needs it")]
    free = shutil.disk_usage(path).free
    found = f"{free / 2**30:.1f} GiB free in /dev/shm"
    if free < 2**30:
        advice = "NCCL between GPUs needs more: start the container with --shm-size=8g or --ipc=host"
        return [Finding("shm", "warning", found, advice)]
    return [Finding("shm", "ok", found)]


def check_disk(directory: Path, size: int = 64 * 2**20) -> list[Finding]:
    """How fast `size` bytes are written to `directory` and read back, and how much room it has."""
    here = existing(directory.expanduser().absolute())
    free = shutil.disk_usage(here).free
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=here) as file:
            began = time.perf_counter()
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = size / (time.perf_counter() - began) / 1e6
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(2**20):
                pass
            read = size / (time.perf_counter() - began) / 1e6
    except OSError as error:
        return [Finding("disk", "problem", f"{here} cannot be written: {error.strerror}", "choose another directory")]
    found = f"{here}: {free / 2**30:.1f} GiB free, writes {written:,.0f} MB/s, reads {read:,.0f} MB/s"
    if free < 5 * 2**30:
        return [Finding("disk", "warning", found, "a run keeps a few GiB of checkpoints: make room")]
    if read < 50:
        return [Finding("disk", "warning", found, "slow: set data.cache_dir to a node-local disk")]
    return [Finding("disk", "ok", found)]


def check_network() -> list[Finding]:
    """The interfaces that ranks on several machines may use, and whether this host's name resolves."""
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    others = [name for name in names if name != "lo"]
    host = socket.gethostname()
    found = f"{host}: {', '.join(others) or 'loopback only'}"
    try:
        address = socket.gethostbyname(host)
    except OSError:
        advice = "its own name does not resolve: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return [Finding("network", "warning", found, advice)]
    if len([name for name in others if not re.match(r"docker|veth|br-|virbr|tun|tap", name)]) > 1:
        advice = "if ranks on several machines do not meet, name one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return [Finding("network", "ok", f"{found} ({address})", advice)]
    return [Finding("network", "ok", f"{found} ({address})")]


def check_slurm() -> list[Finding]:
    try:
        submitit = importlib.metadata.version("submitit")
    except importlib.metadata.PackageNotFoundError:
        submitit = ""
    helper = f"Submitit {submitit}" if submitit else "no Submitit"
    program = shutil.which("sbatch")
    if program is None:
        return [Finding("slurm", "ok", f"no SLURM here; {helper}")]
    try:
        answer = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=20, check=True)
        version = answer.stdout.strip()
        subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        found = f"{program}, but it does not answer ({type(error).__name__})"
        return [Finding("slurm", "warning", found, "is slurmctld up?")]
    if not submitit:
        return [Finding("slurm", "problem", f"{version}, but no Submitit", "pip install submitit")]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f", inside job {job}" if job else ""
    return [Finding("slurm", "ok", f"{version}, {helper}{inside}")]
