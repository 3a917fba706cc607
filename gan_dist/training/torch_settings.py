"""What torch and the C library are set to while a run lasts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from gan_dist.utils.tensors import float32_products

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_NEVER = -1
_USUAL_MMAPS, _USUAL_TRIM, _USUAL_MMAP = 65536, 64 * 2**20, 32 * 2**20
"""glibc's defaults; for its two thresholds, which tune themselves, the largest values they reach."""
_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS"}
"""What libraries must find in the environment to repeat their bits, unless somebody has chosen otherwise. cuBLAS reads
its line at its first product; NCCL, whose sums in the switch have no fixed order, at the first collective. torch would
set that one too, but when a process group is made: before a run's settings are known."""


def resolve_deterministic(asked: bool | Literal["auto"], device: torch.device) -> bool:
    """Returns what train.deterministic means on `device`: a CPU's kernels are deterministic without being asked."""
    return device.type == "cuda" if asked == "auto" else asked


@contextmanager
def torch_settings(device: torch.device, deterministic: bool = False, precision: str | None = None) -> Iterator[None]:
    """Applies the process-wide settings that steps on `device` want, and puts them back at the end.

    With `deterministic`, steps give the same bits on a GPU as well. `precision` is the run's (bf16, tf32, ...):
    a GPU's float32 is full unless it is tf32; None leaves it as it is.
    """
    with ExitStack() as settings:
        settings.enter_context(_deterministic_kernels(deterministic))
        settings.enter_context(_keep_freed_memory(device.type == "cpu"))
        if precision is not None and device.type == "cuda":
            settings.enter_context(float32_products("tf32" if precision == "tf32" else "ieee"))
        yield


@contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    ours = {name: value for name, value in _REPEATABLE.items() if name not in os.environ}
    os.environ.update(ours)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # By default it also fills each new tensor with NaN, to show who reads what nobody wrote: a write more of each.
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    # An operation that has no deterministic kernel warns, and does not end the run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fills
        for name in ours:
            del os.environ[name]


@contextmanager
def _keep_freed_memory(wanted: bool) -> Iterator[None]:
    """Makes the C library keep the memory that tensors free for those of the next step.

    glibc otherwise returns large blocks to the kernel, which clears each page anew: 48,000 page faults per step at
    batch 128, a twelfth of the step's time on 2 cores. Does nothing under another C library, or a tuned one.
    """
    wanted = wanted and not any(name.startswith("MALLOC_") for name in os.environ)
    wanted = wanted and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if wanted and os.name == "posix" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _USUAL_MMAPS)
        mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        ctypes.CDLL(None).malloc_trim(0)
