"""Functions made operations of torch: opaque to torch.compile, known to fake tensors by their shapes alone; and what
their kernels are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def define(signature: str, fake: Any) -> Any:
    """Returns a decorator that makes a function torch.ops.gan_dist's operation of this `signature`.

    fake: what returns tensors of the results' shapes, given the same arguments.
    """
    name, arguments = f"gan_dist::{signature.partition('(')[0]}", signature[signature.index("(") :]
    torch.library.define(name, arguments)
    torch.library.register_fake(name, fake)

    def register(function: Any) -> Any:
        torch.library.impl(name, ("CPU", "CUDA"))(function)
        return function

    return register


def exact(x: Tensor) -> torch.dtype:
    """Returns the dtype in which sums over `x` are made: float64 where it is that, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def require_close(results: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Raises ArithmeticError unless each result of a kernel, named, is near the one that torch computes in float64: as
    near as `dtype`, in which the kernel reads and writes, allows."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
    for name, (one, other) in results.items():
        if not torch.linalg.vector_norm(one.double() - other) <= tolerance * torch.linalg.vector_norm(other):
            raise ArithmeticError(f"{name} differs from torch's by more than {tolerance:g}")
