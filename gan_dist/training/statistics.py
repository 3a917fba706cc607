"""The figures of a logged step: its reduced statistics, rates since the last log, and what is dear enough to wait."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from gan_dist.training.update import STATS, Update
from gan_dist.training.vitals import update_ratio


class Scalars:
    """Makes the tags of each log; `begin` marks where the first rates count from."""

    def __init__(self, update: Update, num_samples: int) -> None:
        self._players = {"generator": update.g, "discriminator": update.d}
        self._num_samples = num_samples
        self._stall: float | None = None

    def begin(self, step: int, images_seen: int, waited: float) -> None:
        """Notes where things stand; `waited` is the time that the device has waited for data so far, in seconds."""
        self._mark = (time.monotonic(), step, images_seen, waited)

    def stalled(self, seconds: float) -> None:
        """Notes how long a checkpoint has just kept the training path."""
        self._stall = seconds

    def paused(self, seconds: float) -> None:
        """Leaves an evaluation's time out of the rates: they tell of training."""
        then, step, images, waited = self._mark
        self._mark = (then + seconds, step, images, waited)

    def of(self, step: int, images_seen: int, waited: float, stats: Tensor, skipped: int) -> dict[str, float]:
        """Returns {tag: value} of this step; `stats` are STATS as the step returned them, on the device.

        Reading them waits for the device: this is the one place that does, and only when a log is due.
        """
        read = dict(zip(STATS, stats.tolist(), strict=True))
        now, (then, since, images, waited_then) = time.monotonic(), self._mark
        seconds = max(now - then, 1e-9)
        self.begin(step, images_seen, waited)
        values = {tag: value for tag, value in read.items() if not tag.startswith("control/")}
        values["value/jsd_lower_bound"] = (values["value/minimax"] + math.log(4)) / 2
        values["throughput/images_per_second"] = (images_seen - images) / seconds
        values["throughput/data_wait_fraction"] = min(1.0, (waited - waited_then) / seconds)
        values["throughput/step_seconds"] = seconds / max(1, step - since)
        for name, player in self._players.items():
            values[f"learning_rate/{name}"] = float(player.optimizer.param_groups[0]["lr"])
            values[f"update_ratio/{name}"] = update_ratio(player.optimizer).item()
        values["updates/skipped"] = skipped
        values["progress/epoch"] = images_seen / self._num_samples
        if self._stall is not None:
            values["checkpoint/stall_seconds"], self._stall = self._stall, None
        if stats.device.type == "cuda":
            values["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values
