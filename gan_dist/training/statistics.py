"""The figures of a logged step: its reduced statistics, rates since the last log, and those too dear for every step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gan_dist.training.update import STATS, Update


class StepStatistics:
    """Makes the tags of each log. Rates count from the last one; the first ones from `start`.

    Nothing here waits for the device: `note` queues what a log needs of it, `compute` gets what came of that later.
    """

    def __init__(self, update: Update, num_samples: int) -> None:
        self._players = {"generator": update.g, "discriminator": update.d}
        self._adapted = update.probability if update.augment.adapts else None
        self._num_samples = num_samples
        self._stall: float | None = None
        self._driver_tells = True
        self._noted: dict[int, _Mark] = {}

    def start(self, step: int, images_seen: int, wait_seconds: float) -> None:
        """Starts an interval; `wait_seconds` is how long the device has waited for data so far."""
        self._last = _Mark(time.monotonic(), step, images_seen, wait_seconds)

    def note_stall(self, seconds: float) -> None:
        """Notes how long a checkpoint has just kept the training path."""
        self._stall = seconds

    def exclude(self, seconds: float) -> None:
        """Leaves `seconds` out of the rates: they are of training, not of an evaluation in between."""
        self._last = replace(self._last, time=self._last.time + seconds)

    def note(self, step: int, images_seen: int, wait_seconds: float, stats: Tensor) -> Tensor:
        """Returns what `compute` is to be given of this `step`, one vector on the device: its STATS, and more.

        The rates will be those of this moment.
        """
        rates = {f"learning_rate/{name}": player.lr for name, player in self._players.items()}
        self._noted[step] = _Mark(time.monotonic(), step, images_seen, wait_seconds, rates)
        more = [update_ratio(player.optimizer) for player in self._players.values()]
        if self._adapted is not None:
            more.append(self._adapted)
        return torch.cat([stats, torch.stack(more).to(stats)])

    def compute(self, step: int, read: Sequence[float], skipped: int) -> tuple[int, dict[str, float]] | None:
        """Returns (images seen, {tag: value}) of a step that was noted, else None; `read` is what `note` returned."""
        if (mark := self._noted.pop(step, None)) is None:
            return None
        last, self._last = self._last, mark
        seconds = max(mark.time - last.time, 1e-9)
        values = {tag: value for tag, value in zip(STATS, read, strict=False) if not tag.startswith("control/")}
        values["value/jsd_lower_bound"] = (values["value/minimax"] + math.log(4)) / 2
        values["throughput/images_per_second"] = (mark.images_seen - last.images_seen) / seconds
        values["throughput/data_wait_fraction"] = min(1.0, (mark.wait_seconds - last.wait_seconds) / seconds)
        values["throughput/step_seconds"] = seconds / max(1, step - last.step)
        values |= mark.rates
        more = [f"update_ratio/{name}" for name in self._players]
        more += ["augment/probability"] if self._adapted is not None else []
        values |= dict(zip(more, read[len(STATS) :], strict=True))
        values["updates/skipped"] = skipped
        values["progress/epoch"] = mark.images_seen / self._num_samples
        if self._stall is not None:
            values["checkpoint/stall_seconds"], self._stall = self._stall, None
        if self._players["generator"].parameters[0].is_cuda:
            values["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if (busy := self._gpu_utilization()) is not None:
                values["throughput/gpu_utilization"] = busy
        return mark.images_seen, values

    def _gpu_utilization(self) -> float | None:
        """Returns the share of the last sample period, up to a second, in which this rank's GPU ran a kernel, 0 to 1.

        Asks the driver, and not the device. None where the driver does not tell: of a MIG slice, without NVML.
        """
        if self._driver_tells:
            try:
                return torch.cuda.utilization() / 100
            except Exception:  # whatever NVML's bindings or AMD's raise; the figure is no part of training
                self._driver_tells = False
        return None


@dataclass(frozen=True)
class _Mark:
    """Where a run stood at a moment: the end of an interval, and the beginning of the next."""

    time: float
    step: int
    images_seen: int
    wait_seconds: float
    rates: Mapping[str, float] = field(default_factory=dict)
    """The learning rates of that step, by tag."""


def update_ratio(optimizer: torch.optim.Adam) -> Tensor:
    """Returns the norm of Adam's newest update over the norm of the weights, a float32 scalar on their device.

    Computed from Adam's moments (Kingma and Ba 2015, algorithm 1), so nothing need be kept from before the step,
    however that was executed. 0 before the first step. About 1e-3 is healthy; 1e-1 tears the network up.
    """
    updates: list[Tensor] = []
    weights: list[Tensor] = []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        beta2 = getattr(optimizer, "beta2", beta2)  # one that moves is a tensor
        moved = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
        if not moved:
            continue
        states = [optimizer.state[parameter] for parameter in moved]
        # They were all updated together: the first one's count is everyone's.
        step = torch.as_tensor(states[0]["step"], dtype=torch.float32, device=moved[0].device).clamp(min=1)
        bias1, bias2 = ((1 - beta**step).to(moved[0].dtype) for beta in (beta1, beta2))
        roots = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_div_(roots, bias2.sqrt())
        torch._foreach_add_(roots, group["eps"])
        quotients = torch._foreach_div([state["exp_avg"] for state in states], roots)
        updates.append(torch.stack(torch._foreach_norm(quotients)) * (group["lr"] / bias1))
        weights += torch._foreach_norm([parameter.detach() for parameter in moved])
    if not updates:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(each) for each in (torch.cat(updates), torch.stack(weights))]
    ratio: Tensor = norms[0] / norms[1].clamp(min=1e-12)
    return ratio.float()
