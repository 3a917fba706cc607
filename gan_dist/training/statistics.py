"""The figures of a logged step: its reduced statistics, rates since the last log, and those too dear for every step."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from gan_dist.training.update import STATS, Update


class StepStatistics:
    """Makes the tags of each log. Rates count from the last one; the first ones from `start`."""

    def __init__(self, update: Update, num_samples: int) -> None:
        self._players = {"generator": update.g, "discriminator": update.d}
        self._num_samples = num_samples
        self._stall: float | None = None

    def start(self, step: int, images_seen: int, wait_seconds: float) -> None:
        """Starts an interval; `wait_seconds` is how long the device has waited for data so far."""
        self._mark = (time.monotonic(), step, images_seen, wait_seconds)

    def note_stall(self, seconds: float) -> None:
        """Notes how long a checkpoint has just kept the training path."""
        self._stall = seconds

    def exclude(self, seconds: float) -> None:
        """Leaves `seconds` out of the rates: they are of training, not of an evaluation in between."""
        then, step, images, wait_seconds = self._mark
        self._mark = (then + seconds, step, images, wait_seconds)

    def compute(
        self, step: int, images_seen: int, wait_seconds: float, stats: Tensor, skipped: int
    ) -> dict[str, float]:
        """Returns {tag: value} of this step; `stats` are STATS as the step returned them, on the device.

        Reading them waits for the device: this is the one place that does, and only when a log is due.
        """
        read = dict(zip(STATS, stats.tolist(), strict=True))
        now, (then, since, images, wait_seconds_then) = time.monotonic(), self._mark
        seconds = max(now - then, 1e-9)
        self.start(step, images_seen, wait_seconds)
        values = {tag: value for tag, value in read.items() if not tag.startswith("control/")}
        values["value/jsd_lower_bound"] = (values["value/minimax"] + math.log(4)) / 2
        values["throughput/images_per_second"] = (images_seen - images) / seconds
        values["throughput/data_wait_fraction"] = min(1.0, (wait_seconds - wait_seconds_then) / seconds)
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


def update_ratio(optimizer: torch.optim.Adam) -> Tensor:
    """Returns the norm of Adam's newest update over the norm of the weights, a float32 scalar on their device.

    Computed from Adam's moments (Kingma and Ba 2015, algorithm 1), so nothing need be kept from before the step,
    however that was executed. 0 before the first step. About 1e-3 is healthy; 1e-1 tears the network up.
    """
    updates, weights = [], []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            step = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device).clamp(min=1)
            mean = state["exp_avg"] / (1 - beta1**step)
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
            updates.append(torch.linalg.vector_norm(group["lr"] * mean / root))
            weights.append(torch.linalg.vector_norm(parameter.detach()))
    if not updates:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(torch.stack(each)) for each in (updates, weights)]
    ratio: Tensor = norms[0] / norms[1].clamp(min=1e-12)
    return ratio.float()
