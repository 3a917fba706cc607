"""How a run is asked to stop or to save, and how every rank learns of it, and of skipped updates, at the same step."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from gan_dist.distributed.failures import DeviceHangs
from gan_dist.training.update import STATS
from gan_dist.utils.stop import StopRequest
from gan_dist.utils.tensors import HostCopy

WORD_LAG = 4
"""Steps a GPU may run ahead of the control word that the host reads (a CPU has nothing to run ahead)."""
POLL_S = 5e-5
"""Between looks at the device: a loop without a pause would keep the other threads from Python's lock."""
STOP_FILE_EVERY_S = 1.0
MAX_SKIPPED_IN_A_ROW = 20
_STOP, _SAVE, _SKIPPED = (STATS.index(f"control/{name}") for name in ("stop", "save", "skipped"))


@dataclass
class StopWatcher:
    """Watches for reasons to stop that no signal brings: the `stop` file in the run directory and the time allowed."""

    stop: StopRequest
    run_dir: Path
    deadline: float | None
    _next_check: float = 0.0

    def check(self) -> None:
        """Asks for a stop when one is due; touches the disk once a second at most."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            self.stop.ask("train.stop_after_minutes")
        if now >= self._next_check:
            self._next_check = now + STOP_FILE_EVERY_S
            if (self.run_dir / "stop").exists():
                self.stop.ask(f"the file {self.run_dir / 'stop'}")

    def remove_file(self) -> None:
        """Removes the stop file that was obeyed, so that the next start runs on."""
        (self.run_dir / "stop").unlink(missing_ok=True)


Word = tuple[int, list[float]]
"""A step, and its statistics as the host has read them."""


class ControlRing:
    """Each step's reduced statistics as the host may read them without waiting for the current step.

    A step's vector is copied to pinned memory; step s reads the result of step s - lag, so all ranks
    read the same words at the same steps and act alike.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.lag = WORD_LAG if device.type == "cuda" else 0
        self._timeout_s = timeout_s
        self._ring: deque[tuple[int, HostCopy]] = deque()
        self._since = time.monotonic()
        """When the oldest step in the ring was the next to be done."""

    def push(self, step: int, stats: torch.Tensor) -> list[Word]:
        """Returns the word of `lag` steps ago, or none in the first steps, after queueing that of `step`.

        `stats` are STATS and whatever else is to be read with them. Raises DeviceHangs when the device does not finish
        that earlier step within the time limit.
        """
        if not self._ring:
            self._since = time.monotonic()
        self._ring.append((step, HostCopy(stats)))
        return [self._read()] if len(self._ring) > self.lag else []

    def drain(self) -> list[Word]:
        """Returns the words still in the ring, oldest first, once the device has written them."""
        return [self._read() for _ in range(len(self._ring))]

    def check(self) -> None:
        """Raises DeviceHangs when the device has worked on the oldest step for longer than the time limit."""
        if self._ring and not self._ring[0][1].arrived:
            if time.monotonic() > self._since + self._timeout_s:
                raise DeviceHangs(self._timeout_s)
        else:
            self._since = time.monotonic()

    def _read(self) -> Word:
        step, copy = self._ring.popleft()
        limit = time.monotonic() + self._timeout_s
        while not copy.arrived:
            if time.monotonic() > limit:
                raise DeviceHangs(self._timeout_s)
            time.sleep(POLL_S)
        self._since = time.monotonic()
        return step, copy.host.tolist()


@dataclass(frozen=True)
class Decision:
    """What the ranks decided together with a step, and the step's figures."""

    step: int
    stop: bool
    save: bool
    skipped: bool
    skipped_so_far: int
    """Updates skipped since this start, this step's included."""
    values: list[float]
    """The word: STATS, and whatever else was pushed with them."""


class ControlReader:
    """Turns control words into decisions, alike on every rank, and counts the updates skipped as non-finite."""

    def __init__(self) -> None:
        self.skipped = 0
        self.skipped_in_a_row = 0

    def read(self, word: Word) -> Decision:
        """Returns what the word of a step decides: one rank's request is enough."""
        step, values = word
        skipped = round(values[_SKIPPED])
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return Decision(step, values[_STOP] >= 1, values[_SAVE] >= 1, skipped > 0, self.skipped, values)

    @property
    def diverged(self) -> bool:
        """Whether the weights have diverged: a bad batch recovers after one step, diverged weights never do."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
