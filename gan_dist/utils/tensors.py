"""Tensors on their way to the host; a training state as nested mappings of them: copied, moved there, compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from gan_dist.utils.errors import GanDistError

RUNNING = ("running_mean", "running_var")


class HostCopy:
    """A copy of a tensor on its way to the host. Who needs it asks whether it has arrived; nobody else waits."""

    def __init__(self, tensor: Tensor) -> None:
        """Queues the copy behind all that the device was given so far; on a CPU it is made at once."""
        self.device = tensor.device
        # torch keeps pinned memory that is free for the next that asks.
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        """To be read when the copy has arrived."""
        self.host.copy_(tensor, non_blocking=True)
        self._event = record_event(tensor.device)

    @property
    def arrived(self) -> bool:
        """Whether the copy is there. Does not wait."""
        return self._event is None or bool(self._event.query())


def record_event(device: torch.device) -> Any:
    """Returns an event that is over when the device has done all that was queued so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Within it a GPU's float32 convolutions and matrix products are full float32 (ieee) or rounded to TF32.

    For the process, and put back at the end: torch's default is TF32 for the first and full for the second.
    """
    cudnn: Any = torch.backends.cudnn
    kinds: tuple[Any, Any] = (cudnn.conv, torch.backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = precision
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


def copy_state(state: Any, into: Any = None) -> Any:
    """Returns `state` with every tensor copied, in its layout and on its device.

    Tensors of the nested state `into` are reused where they fit: new memory costs more than the copy itself.
    """
    if isinstance(state, Tensor):
        if isinstance(into, Tensor) and _alike(into, state):
            return into.copy_(state.detach())
        return state.detach().clone(memory_format=torch.preserve_format)
    if isinstance(state, Mapping):
        old = into if isinstance(into, Mapping) else {}
        return {key: copy_state(value, old.get(key)) for key, value in state.items()}
    return state


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def to_host(state: Any) -> Any:
    """Returns `state` with every tensor contiguous in CPU memory; copied only where it is not already."""
    if isinstance(state, Tensor):
        return state.detach().cpu().contiguous()
    if isinstance(state, Mapping):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_host(value) for value in state)
    return state


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (dotted name, tensor) for every tensor in a nested state."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from tensors(value, f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from tensors(value, f"{name}.{index}")


def state_digest(state: Mapping[str, Any], running: bool = True) -> str:
    """Returns the sha256 of all tensors in `state`, without batch norm's running statistics unless `running`."""
    digest = hashlib.sha256()
    for name, tensor in tensors(state):
        if running or not name.endswith(RUNNING):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def assert_ranks_agree(digests: list[str]) -> None:
    """Raises GanDistError, naming the ranks whose digest differs from rank 0's, unless all agree."""
    strays = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if strays:
        raise GanDistError(
            f"rank(s) {', '.join(map(str, strays))} of {len(digests)} do not hold rank 0's parameters: the ranks have "
            "diverged; continue from the last checkpoint, and suspect the hardware or mixed software versions"
        )
