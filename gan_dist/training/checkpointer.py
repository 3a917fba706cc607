"""Checkpoints off the training path: a thread moves the state to the host, compares it between ranks and writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gan_dist.distributed.world import World
from gan_dist.runs.checkpoint import save
from gan_dist.utils.errors import GanDistError
from gan_dist.utils.tensors import assert_ranks_agree, state_digest, to_host


class Saver:
    """Saves states one at a time, each in a thread whose outcome a later call collects. Every rank has one.

    On all ranks the thread first compares the state between them: one that is not the same everywhere is never
    written. Rank 0 then writes it; `guard` runs last before it becomes visible, and may raise to forbid it.
    """

    def __init__(self, directory: Path, keep: int, world: World, synchronised: bool = True) -> None:
        self.directory, self.keep = directory, keep
        self.guard: Callable[[], None] = lambda: None
        self._world, self._synchronised = world, synchronised
        self._state: Mapping[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._failure: list[OSError | GanDistError] = []

    def start(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Begins to save `state`, whose tensors must be copies that nothing else touches.

        Waits first for a save that is still under way.
        """
        self._join()
        self._state = state
        device, made = self._world.device, None
        if device.type == "cuda":
            made = torch.cuda.Event()  # type: ignore[no-untyped-call]
            made.record()

        def work() -> None:
            try:
                if made is None:
                    self._save(to_host(state), facts)
                    return
                # A stream of its own: the copies wait for no later step, and no step waits for them.
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                stream.wait_event(made)
                with torch.cuda.stream(stream):
                    host = to_host(state)
                self._save(host, facts)
            except (OSError, GanDistError) as error:
                self._failure.append(error)

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=False)
        self._thread.start()

    def spent(self) -> Mapping[str, Any] | None:
        """Returns the state that was saved last, once that is over: its tensors are free to hold the next one."""
        self._join()
        return self._state

    def _save(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        if self._world.size > 1:
            try:
                digests = self._world.gather_objects_aside(state_digest(state, self._synchronised))
            except RuntimeError as error:
                first_line = str(error).strip().split("\n")[0]
                raise GanDistError(f"the ranks could not compare their states: {first_line}") from error
            assert_ranks_agree(digests)
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
