"""Checkpoints off the training path: a thread moves the state to the host, compares it between ranks and writes it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gan_dist.distributed import World
from gan_dist.errors import GanDistError
from gan_dist.train.checkpoint import save

RUNNING = ("running_mean", "running_var")


def to_host(state: Any) -> Any:
    """Returns `state` with every tensor in CPU memory; tensors that are there already are not copied."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
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
    """Returns the sha256 of every tensor in `state`; without `running`, of all but batch norm's running statistics."""
    digest = hashlib.sha256()
    for name, tensor in tensors(state):
        if running or not name.endswith(RUNNING):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def must_agree(digests: list[str]) -> None:
    """Raises GanDistError naming the ranks whose digest differs from rank 0's."""
    strays = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if strays:
        raise GanDistError(
            f"rank(s) {', '.join(map(str, strays))} of {len(digests)} do not hold rank 0's parameters: they have "
            "played another game; continue from the last checkpoint, and suspect the hardware or mixed software"
        )


class Saver:
    """Saves states one at a time, each in a thread whose outcome a later call collects. Every rank has one.

    On all ranks the thread first compares the state between them: one that is not the same everywhere is never
    written. Rank 0 then writes it; `guard` runs last before it becomes visible, and may raise to forbid it.
    """

    def __init__(self, directory: Path, keep: int, world: World, synchronised: bool = True) -> None:
        self.directory, self.keep = directory, keep
        self.guard: Callable[[], None] = lambda: None
        self._world, self._synchronised = world, synchronised
        self._thread: threading.Thread | None = None
        self._failure: list[OSError | GanDistError] = []

    def start(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Begins to save `state`, whose tensors must be copies that nothing else touches.

        Waits first for a save that is still under way.
        """
        self._join()
        device, made = self._world.device, None
        if device.type == "cuda":
            made = torch.cuda.Event()  # type: ignore[no-untyped-call]
            made.record()

        def work() -> None:
            try:
                if made is None:
                    self._save(to_host(state), facts)
                    return
                # A stream of its own: the copies wait for no step, and no step waits for them.
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)) as stream:  # type: ignore[no-untyped-call]
                    made.wait(stream)
                    host = to_host(state)
                self._save(host, facts)
            except (OSError, GanDistError) as error:
                self._failure.append(error)

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=False)
        self._thread.start()

    def _save(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        if self._world.size > 1:
            try:
                digests = self._world.gather_objects_aside(state_digest(state, self._synchronised))
            except RuntimeError as error:
                first_line = str(error).strip().split("\n")[0]
                raise GanDistError(f"the ranks could not compare their states: {first_line}") from error
            must_agree(digests)
        if self._world.rank == 0:
            save(self.directory, state, facts, keep=self.keep, guard=self.guard)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self, *, wait: bool = False) -> OSError | GanDistError | None:
        """Returns and forgets why the last finished save failed, or None; `wait` lets one under way finish first."""
        if wait or (self._thread is not None and not self._thread.is_alive()):
            self._join()
        return self._failure.pop() if self._failure and self._thread is None else None
