"""How a run begins, is told to stop, and hears of it on every rank at the same step."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gan_dist.distributed.world import World
from gan_dist.training.update import STATS
from gan_dist.training.vitals import code_version
from gan_dist.utils.errors import GanDistError
from gan_dist.utils.stop import StopRequest

WORD_LAG = 4
"""Steps a GPU may run ahead of the control word that the host reads (a CPU has nothing to run ahead)."""
STOP_FILE_EVERY_S = 1.0
MAX_SKIPPED_IN_A_ROW = 20
_STOP, _SKIPPED = STATS.index("control/stop"), STATS.index("control/skipped")


@dataclass
class Watchman:
    """Looks for reasons to stop that no signal brings: the `stop` file in the run directory and the time allowed."""

    stop: StopRequest
    run_dir: Path
    deadline: float | None
    _next_look: float = 0.0

    def look(self) -> None:
        """Asks for a stop when one is due; touches the disk once a second at most."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            self.stop.ask("train.stop_after_minutes")
        if now >= self._next_look:
            self._next_look = now + STOP_FILE_EVERY_S
            if (self.run_dir / "stop").exists():
                self.stop.ask(f"the file {self.run_dir / 'stop'}")

    def forget_file(self) -> None:
        """Removes the stop file that was obeyed, so that the next start runs on."""
        (self.run_dir / "stop").unlink(missing_ok=True)


class ControlWord:
    """The step's reduced statistics as the host may read them without waiting for the current step.

    Each step's vector is copied to one of a ring of pinned buffers; what is read at step s is step s - lag's, so all
    ranks see the same words at the same steps and act alike.
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


def ask(*, stop: bool, save: bool) -> float:
    """Returns a rank's part of the control word: 1 asks for a stop, one half (rank 0 alone) for a checkpoint.

    Summed over the ranks, whole numbers count the wishes to stop and a half that is left is the wish to save.
    """
    return float(stop) + 0.5 * float(save)


@dataclass(frozen=True)
class Decision:
    """What the ranks decided together with a step."""

    stop: bool = False
    save: bool = False
    skipped: bool = False


class Referee:
    """Reads control words, alike on every rank, and counts the updates that were skipped as non-finite."""

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0

    def hear(self, word: list[float]) -> Decision:
        """Returns what the word of a step's statistics says."""
        skipped, asked = round(word[_SKIPPED]), word[_STOP]
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return Decision(stop=asked >= 1, save=asked % 1 > 0, skipped=skipped > 0)

    @property
    def lost(self) -> bool:
        """Whether the weights have diverged: a bad batch passes in one step, they never do."""
        return self.in_a_row >= MAX_SKIPPED_IN_A_ROW


def environment(world: World) -> dict[str, Any]:
    """Returns what a run's environment.json says of the software, the hardware and the world it runs in."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gan_dist": code_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "command": sys.argv,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def out_of_memory(error: BaseException, global_batch: int, ranks: int) -> GanDistError | None:
    """Returns the one line that answers an out-of-memory error of device or host, or None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        where = "the GPU"
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        where = "this machine"
    else:
        return None
    return GanDistError(
        f"{where} is out of memory with train.global_batch={global_batch} on {ranks} rank(s); "
        "lower train.global_batch, model.g_channels or model.d_channels, or use more ranks"
    )
