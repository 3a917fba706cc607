"""What this machine and environment can do for gan_dist, and what is wrong with them, each with what to do.

Nothing here changes anything; probes of the disk and of compilation use a temporary folder that goes again.
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
from pathlib import Path

import torch

from gan_dist.devices import Finding, check_bf16, check_gpus, check_nccl
from gan_dist.utils.errors import first_line

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)


def diagnose(directory: str | Path = ".") -> list[Finding]:
    """Returns the findings, `directory` being where runs and datasets will lie (for the speed of its disk).

    A check that fails itself becomes a warning that says so: the doctor never falls ill.
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
        ("limits", check_limits),
        ("disk", lambda: check_disk(Path(directory))),
        ("clock", lambda: check_clock(Path(directory))),
        ("network", check_network),
        ("slurm", check_slurm),
    )
    findings = []
    for topic, check in checks:
        try:
            findings += check()
        except Exception as error:  # a strange machine is the very thing to be looked at here
            findings.append(Finding(topic, "warning", f"could not be looked at: {first_line(error)}"))
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


def check_compile() -> list[Finding]:
    """Whether torch.compile can build: a C++ compiler and Python's headers for the CPU, Triton for a GPU."""
    if torch.cuda.is_available():
        try:
            import triton  # type: ignore[import-untyped]
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
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return [Finding("memory", "warning", "unknown on this system")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [total]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    found = f"{min(limits) / 2**30:.1f} GiB for this process, {cores} CPU cores"
    if min(limits) < 4 * 2**30:
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


def check_limits() -> list[Finding]:
    try:
        import resource
    except ImportError:
        return [Finding("limits", "ok", "this system has no ulimits")]
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    held = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB"
    found = f"{files} open files, {held} of locked memory"
    if files < 1024:
        return [Finding("limits", "warning", found, f"ulimit -n {min(hard, 4096) if hard > 0 else 4096}")]
    if torch.cuda.is_available() and locked != resource.RLIM_INFINITY and locked < 2**26:
        return [Finding("limits", "warning", found, "InfiniBand wants ulimit -l unlimited")]
    return [Finding("limits", "ok", found)]


def check_disk(directory: Path, size: int = 64 * 2**20) -> list[Finding]:
    """How fast `directory` takes and gives back `size` bytes, and how much room it has."""
    here = _existing(directory)
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


def _existing(directory: Path) -> Path:
    """Returns `directory`, or the nearest folder above it that is there."""
    here = directory.expanduser().absolute()
    while not here.is_dir():
        here = here.parent
    return here


def check_clock(directory: Path) -> list[Finding]:
    """Whether this machine's clock agrees with the disk's, whose server's clock may be another."""
    with tempfile.NamedTemporaryFile(dir=_existing(directory)) as file:
        skew = Path(file.name).stat().st_mtime - time.time()
    found = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {abs(skew):.1f} s from the disk's"
    if time.gmtime().tm_year < 2025:
        return [Finding("clock", "problem", found, "the clock is wrong: certificates and leases fail; start NTP")]
    if abs(skew) > 5:
        return [Finding("clock", "warning", found, "leases on run directories compare clocks: synchronise them (NTP)")]
    return [Finding("clock", "ok", found)]


def check_network() -> list[Finding]:
    """Interfaces that ranks on several machines may use, and whether this host's name resolves."""
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
        asked = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=20, check=True)
        version = asked.stdout.strip()
        subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [
            Finding(
                "slurm", "warning", f"{program}, but it does not answer ({type(error).__name__})", "is slurmctld up?"
            )
        ]
    if not submitit:
        return [Finding("slurm", "problem", f"{version}, but no Submitit", "pip install submitit")]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f", inside job {job}" if job else ""
    return [Finding("slurm", "ok", f"{version}, {helper}{inside}")]
