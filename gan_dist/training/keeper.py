"""When a run is saved, and what stands in its checkpoints: by steps, by the clock, at the ends of epochs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from gan_dist.distributed.world import World
from gan_dist.training.checkpointer import Saver
from gan_dist.utils.errors import GanDistError


class Keeper:
    """Saves the run's state, once a step at most; every rank has one and calls it alike.

    `snapshot(into)` returns the state's tensors, copied, in the memory of an earlier state where it can; `facts` go
    into every checkpoint's manifest. `every_steps`, `every_minutes` and `keep_epochs` are the configuration's.
    """

    def __init__(
        self,
        saver: Saver,
        world: World,
        snapshot: Callable[[Any], Mapping[str, Any]],
        facts: Mapping[str, Any],
        *,
        every_steps: int,
        every_minutes: float,
        keep_epochs: bool,
        saved_step: int,
    ) -> None:
        self._saver, self._world, self._snapshot, self._facts = saver, world, snapshot, facts
        self._every_steps, self._every_s, self._keep_epochs = every_steps, 60 * every_minutes, keep_epochs
        self.saved_step = saved_step
        """The newest step that was given to be saved; -1 before the first."""
        self._due = math.inf

    def start_clock(self) -> None:
        """Counts the minutes from now."""
        self._due = time.monotonic() + self._every_s if self._every_s else math.inf

    def clock_strikes(self) -> bool:
        """Returns whether this rank's clock wants a checkpoint; the clock then starts anew."""
        struck = time.monotonic() >= self._due
        if struck:
            self.start_clock()
        return struck

    def is_due(self, step: int, epoch_ended: bool, asked: bool) -> bool:
        """Returns whether `step` is to be saved; `asked` is what the ranks heard of rank 0's clock."""
        by_steps = self._every_steps > 0 and step % self._every_steps == 0
        return by_steps or asked or self.is_for_good(epoch_ended)

    def is_for_good(self, epoch_ended: bool) -> bool:
        """Returns whether the checkpoint at hand is never pruned."""
        return self._keep_epochs and epoch_ended

    def save(self, step: int, images_seen: int, *, kept: bool = False, wait: bool = False, best: Any = None) -> float:
        """Saves `step`, in the background unless `wait`; returns the seconds for which the training path stood still.

        `best` marks it as the best so far: what the evaluation said of it.
        Raises GanDistError, on every rank, when `wait` and it could not be saved.
        """
        began = time.monotonic()
        counts = {"format": 1, "step": step, "images_seen": images_seen}
        self._saver.start(
            {**counts, **self._snapshot(self._saver.spent())}, {**self._facts, "kept": kept, "best": best}
        )
        self.saved_step = step
        if wait:
            self.await_saved()
        return time.monotonic() - began

    def await_saved(self) -> None:
        """Returns when the newest save is on rank 0's disk. Raises GanDistError, on every rank, when it is not."""
        failure = self._world.from_first(lambda: self._saver.failure(wait=True))
        if isinstance(failure, GanDistError):
            raise failure
        if failure is not None:
            raise GanDistError(
                f"the checkpoint of step {self.saved_step} could not be saved in {self._saver.directory}: "
                f"{os.strerror(failure.errno) if failure.errno else failure}; earlier ones are as they were"
            )
