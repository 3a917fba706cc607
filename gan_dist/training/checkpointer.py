"""When a run is saved, and saving off the training path, in a thread that compares the state and writes it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gan_dist.distributed.failures import DeviceHangs
from gan_dist.distributed.world import World
from gan_dist.runs.checkpoint import save
from gan_dist.utils.errors import GanDistError, first_line
from gan_dist.utils.tensors import assert_ranks_agree, record_event, state_digest, to_host

WAIT_S = 1.0


class Checkpointer:
    """Saves states, one at a time, each in a thread whose outcome a later call collects.

    Every rank has one and makes the same calls.
    On all ranks the thread first compares the state between them: one that is not the same everywhere is never
    written. Rank 0 then writes it; `before_publishing` runs last before it becomes visible, and may raise to forbid it.
    `facts` go into every checkpoint's manifest. `every_steps`, `every_minutes`, `keep` and `keep_epochs` are the
    configuration's; `synchronised` says whether batch norm's running statistics are the same on all ranks.
    Who waits for a save gets DeviceHangs where the device has not made the copy to be saved within `timeout_s`.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        keep: int,
        timeout_s: float,
        every_steps: int = 0,
        every_minutes: float = 0,
        keep_epochs: bool = False,
        saved_step: int = -1,
        synchronised: bool = True,
        facts: Mapping[str, Any] | None = None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.saved_step = saved_step
        """The newest step that was given to be saved; -1 before the first."""
        self._world, self._synchronised = world, synchronised
        self._keep, self._keep_epochs = keep, keep_epochs
        self._every_steps, self._every_s = every_steps, 60 * every_minutes
        self._facts, self._before_publishing = facts or {}, before_publishing
        self._next_by_clock = math.inf
        self._timeout_s, self._began = timeout_s, 0.0
        self._copied: Any = None
        self._state: Mapping[str, Any] | None = None
        self._stream: Any = None
        self._thread: threading.Thread | None = None
        self._failure: OSError | GanDistError | None = None

    # When: by steps, by rank 0's clock, at the ends of epochs.

    def start_clock(self) -> None:
        """Counts the minutes from now."""
        self._next_by_clock = time.monotonic() + self._every_s if self._every_s else math.inf

    def clock_is_due(self) -> bool:
        """Returns whether this rank's clock wants a checkpoint; the clock then starts anew."""
        due = time.monotonic() >= self._next_by_clock
        if due:
            self.start_clock()
        return due

    def is_due(self, step: int, epoch_ended: bool, requested: bool) -> bool:
        """Returns whether `step` is to be saved; `requested` is what the ranks agreed on beside the cadence."""
        by_steps = self._every_steps > 0 and step % self._every_steps == 0
        return by_steps or requested or self.is_permanent(epoch_ended)

    def is_permanent(self, epoch_ended: bool) -> bool:
        """Returns whether the checkpoint at hand is never pruned."""
        return self._keep_epochs and epoch_ended

    # How: off the training path.

    def previous_state(self) -> Mapping[str, Any] | None:
        """Returns the state saved last, once its save is over: its tensors are free to hold the next one."""
        self._join()
        return self._state

    def save(self, state: Mapping[str, Any], *, kept: bool = False, best: Mapping[str, Any] | None = None) -> None:
        """Begins to save `state`, whose tensors must be copies that nothing else touches; waits for an earlier save.

        A `kept` checkpoint is never pruned; `best` marks it as the best so far: what the evaluation said of it.
        """
        self._join()
        self._state, self.saved_step = state, int(state["step"])
        device, self._began = self._world.device, time.monotonic()
        copied = self._copied = record_event(device)

        def work() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # a new thread's is GPU 0, where it would open a context
                host = self._copy_and_compare(lambda: self._on_host(state, copied))
                if self._world.rank == 0:
                    facts = {**self._facts, "kept": kept, "best": best}
                    save(self.directory, host, facts, keep=self._keep, guard=self._before_publishing)
            except (OSError, GanDistError) as error:
                self._failure = self._failure or error
            except BaseException as error:  # whatever it was, nothing was saved
                self._failure = self._failure or GanDistError(
                    f"the checkpoint could not be made: {type(error).__name__}: {first_line(error)}"
                )

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=False)
        self._thread.start()

    def failure(self, *, wait: bool = False) -> OSError | GanDistError | None:
        """Returns and forgets why the last finished save failed, or None; `wait` lets one under way finish first."""
        if wait or (self._thread is not None and not self._thread.is_alive()):
            self._join()
        failure = None
        if self._thread is None:
            failure, self._failure = self._failure, None
        return failure

    def wait(self) -> None:
        """Waits until the newest save is on rank 0's disk. Raises GanDistError, on every rank, when it is not there."""
        failure = self._world.from_first(lambda: self.failure(wait=True))
        if isinstance(failure, GanDistError):
            raise failure
        if failure is not None:
            raise GanDistError(
                f"the checkpoint of step {self.saved_step} could not be saved in {self.directory}: "
                f"{os.strerror(failure.errno) if failure.errno else failure}; earlier ones are as they were"
            )

    def _on_host(self, state: Mapping[str, Any], copied: Any) -> Mapping[str, Any]:
        with ExitStack() as context:
            if copied is not None:
                # A stream of its own: the copies wait for no later step, and no step waits for them. One for all saves:
                # torch's pool has 32 and would soon hand out the one that samples arrive in.
                self._stream = self._stream or torch.cuda.Stream(self._world.device)  # type: ignore[no-untyped-call]
                self._stream.wait_event(copied)
                context.enter_context(torch.cuda.stream(self._stream))
            host: Mapping[str, Any] = to_host(state)
        return host

    def _copy_and_compare(self, copy: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns the state that `copy` makes, once all ranks have made the same. A rank that fails tells the others,
        which would wait for it. Raises GanDistError, on every rank."""
        if self._world.size == 1:
            return copy()
        state: Mapping[str, Any] = {}
        digest = reason = ""
        try:
            state = copy()
            digest = state_digest(state, self._synchronised)
        except Exception as error:
            reason = _reason(error)
        try:
            answers = self._world.gather_objects_aside((digest, reason))
        except RuntimeError as error:
            raise GanDistError(f"the ranks could not compare their states: {first_line(error)}") from error
        for rank, (_, reason) in enumerate(answers):
            if reason:
                raise GanDistError(f"the checkpoint could not be made: rank {rank}: {reason}")
        assert_ranks_agree([digest for digest, _ in answers])
        return state

    def _join(self) -> None:
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(timeout=WAIT_S)
                late = time.monotonic() > self._began + self._timeout_s
                if late and self._copied is not None and not self._copied.query():
                    raise DeviceHangs(self._timeout_s)
            self._thread = None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
