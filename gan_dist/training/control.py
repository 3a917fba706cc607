"""How a run is asked to stop or to save, and how every rank learns of it, and of skipped updates, at the same step."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gan_dist.training.update import STATS
from gan_dist.utils.errors import GanDistError
from gan_dist.utils.stop import StopRequest

WORD_LAG = 4
"""Steps a GPU may run ahead of the control word that the host reads (a CPU has nothing to run ahead)."""
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


class ControlRing:
    """Each step's reduced statistics as the host may read them without waiting for the current step.

    A step's vector is copied to one of a ring of pinned buffers; step s reads the result of step s - lag, so all ranks
    read the same words at the same steps and act alike.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.lag = WORD_LAG if device.type == "cuda" else 0
        self._pinned = device.type == "cuda"
        self._timeout_s = timeout_s
        self._ring: deque[tuple[torch.Tensor, Any]] = deque()
        self._free: list[torch.Tensor] = []

    def push(self, stats: torch.Tensor) -> list[float] | None:
        """Returns the statistics of `lag` steps ago (None in the first steps) after queueing the current step's.

        Raises GanDistError when the device does not finish that earlier step within the time limit.
        """
        host = self._free.pop() if self._free else torch.empty(stats.shape, dtype=stats.dtype, pin_memory=self._pinned)
        host.copy_(stats, non_blocking=True)
        event: Any = None
        if self._pinned:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._ring.append((host, event))
        return self._read() if len(self._ring) > self.lag else None

    def drain(self) -> list[list[float]]:
        """Returns the words still in the ring, oldest first, once the device has written them."""
        return [self._read() for _ in range(len(self._ring))]

    def _read(self) -> list[float]:
        host, event = self._ring.popleft()
        if event is not None:
            limit = time.monotonic() + self._timeout_s
            while not event.query():
                if time.monotonic() > limit:
                    raise GanDistError(f"the device did not finish a step within dist.timeout_s={self._timeout_s:g} s")
                time.sleep(0)
        self._free.append(host)
        return list(host.tolist())


@dataclass(frozen=True)
class Decision:
    """What the ranks decided together with a step."""

    stop: bool = False
    save: bool = False
    skipped: bool = False


class ControlReader:
    """Turns control words into decisions, alike on every rank, and counts the updates skipped as non-finite."""

    def __init__(self) -> None:
        self.skipped = 0
        self.skipped_in_a_row = 0

    def read(self, word: list[float]) -> Decision:
        """Returns what the word of a step's statistics decides: one rank's request is enough."""
        skipped = round(word[_SKIPPED])
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return Decision(stop=word[_STOP] >= 1, save=word[_SAVE] >= 1, skipped=skipped > 0)

    @property
    def diverged(self) -> bool:
        """Whether the weights have diverged: a bad batch recovers after one step, diverged weights never do."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
