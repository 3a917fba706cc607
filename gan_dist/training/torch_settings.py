"""What torch and the C library are set to while a run lasts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_NEVER = -1
_USUAL_MMAPS, _USUAL_TRIM, _USUAL_MMAP = 65536, 64 * 2**20, 32 * 2**20
"""glibc's defaults; for its two thresholds, which tune themselves, the largest values they reach."""
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def torch_settings(device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """Applies the process-wide settings that steps on `device` want, and puts them back at the end.

    With `deterministic`, steps give the same bits on a GPU as well.
    """
    with _deterministic_kernels(deterministic), _keep_freed_memory(device.type == "cpu"):
        yield


@contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    # cuBLAS reads this when it is first used; torch refuses its products without it.
    workspace = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # An operation that has no deterministic kernel warns, and does not end the run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            del os.environ[_CUBLAS]


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
