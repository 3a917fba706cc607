"""Evaluation while a run trains: it takes time and nothing else. The game goes on with the bits it would have had."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gan_dist.config.schema import Config
from gan_dist.data.dataset import Dataset, open_dataset
from gan_dist.distributed.world import World
from gan_dist.evaluation.protocol import Evaluation, accuracy, warnings
from gan_dist.model.networks import Discriminator
from gan_dist.runs.checkpoint import read_best
from gan_dist.runs.metrics_file import PROTOCOL
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.utils.errors import UserError

JUDGED = 1000
"""Real images of each kind on which the discriminator is tried."""


class Examiner:
    """Says when an evaluation is due, makes it, tells of it, and knows which step was the best. One a rank.

    `generator` is the network that draws (the averaged one where there is one), `discriminator` the living one. Raises
    UserError for what the configuration cannot have.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        dataset: Dataset,
        generator: nn.Module,
        discriminator: nn.Module,
        checkpoints: Path,
    ) -> None:
        self._every, self._latent_dim = config.evaluate.every_steps, config.model.latent_dim
        self._images_a_step = config.optim.d_steps * config.train.global_batch
        self._averaged = config.train.ema_half_life_images > 0
        self._world, self._dataset = world, dataset
        self._generator, self._discriminator = generator, discriminator
        self._began, self._spent = time.monotonic(), 0.0
        self._best: dict[str, Any] | None = None
        self._most_diverse = 0.0  # of this start's evaluations
        self._judging: Discriminator | None = None
        self._told: dict[str, Any] = {}  # the protocol that the run's history has already
        if not self._every:
            return
        if config.data.placement == "windowed" or (dataset.cache is not None and dataset.cache.windowed):
            raise UserError(
                "evaluate.every_steps: a windowed placement keeps only a part of the dataset here; "
                "set evaluate.every_steps=0, and `gan-dist evaluate RUN --all-checkpoints` afterwards"
            )
        self._evaluation = Evaluation(world, dataset, config.evaluate.samples)
        held_out = config.evaluate.held_out
        self._held_out = world.together(lambda: open_dataset(held_out, config.data.cache_dir) if held_out else None)
        if self._held_out is not None:
            if self._held_out.resolution != dataset.resolution:
                side = self._held_out.resolution
                raise UserError(
                    f"evaluate.held_out: {held_out} holds {side}x{side} images, the run learns from "
                    f"{dataset.resolution}x{dataset.resolution} ones; prepare it alike"
                )
            if self._held_out.identity == dataset.identity:
                raise UserError(
                    f"evaluate.held_out: {held_out} is what the run learns from; name a set that it never sees"
                )
            model, living = config.model, next(discriminator.parameters())
            self._judging = Discriminator(model.resolution, model.d_channels, model.leaky_slope).to(living)
        self._best = world.from_first(lambda: read_best(checkpoints))

    def is_due(self, step: int, end: int) -> bool:
        """Returns whether `step` is evaluated; alike on every rank."""
        return self._every > 0 and (step % self._every == 0 or step == end)

    def best(self, step: int) -> dict[str, Any] | None:
        """Returns what a checkpoint of `step` is marked with when it is the best so far, else None."""
        return self._best if self._best is not None and self._best["step"] == step else None

    def examine(self, step: int, telemetry: Telemetry, stopped: Callable[[], bool]) -> dict[str, float]:
        """Returns {evaluate/...: figure} of `step`, told on the console; only how long it took when some rank's
        `stopped` called it off. A collective."""
        began = time.monotonic()
        found = self._evaluation(self._generator, self._latent_dim, averaged=self._averaged, stopped=stopped)
        if found is not None and self._held_out is not None:
            found |= self._world.from_first(self._judge)
        seconds = time.monotonic() - began
        self._spent += seconds
        if found is None:
            telemetry.say(f"the evaluation of step {step} was left off; `gan-dist evaluate` takes what is saved next")
            return {"evaluate/seconds": seconds}
        protocol = found.pop("protocol")
        if protocol != self._told:
            telemetry.event(PROTOCOL, step, **protocol)
            self._told = protocol
        key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
        leads = self._best is None or self._best["protocol"] != key or found["swd"] < self._best["swd"]
        if leads:
            self._best = {"step": step, "swd": found["swd"], "protocol": key}
        share = self._spent / max(time.monotonic() - self._began, 1e-9)
        telemetry.say(
            f"evaluated step {step}: swd {found['swd']:.4g}{' (the best so far)' if leads else ''}, "
            f"diversity {found['diversity']:.2f}{_judgement(found)}; {seconds:.1f} s, {share:.1%} of the time so far"
        )
        for line in warnings({**found, "images_seen": step * self._images_a_step}, self._most_diverse):
            telemetry.warn(line, step)
        self._most_diverse = max(self._most_diverse, found["diversity"])
        return {f"evaluate/{name}": float(value) for name, value in found.items()} | {
            "evaluate/seconds": seconds,
            "evaluate/share_of_time": share,
        }

    def _judge(self) -> dict[str, float]:
        """Returns how well the discriminator, as it stands, knows its training images, and others."""
        assert self._held_out is not None and self._judging is not None
        self._judging.load_state_dict(self._discriminator.state_dict())
        return {
            "accuracy_training": accuracy(self._judging, self._dataset, JUDGED),
            "accuracy_held_out": accuracy(self._judging, self._held_out, JUDGED),
        }


def _judgement(found: dict[str, Any]) -> str:
    if "accuracy_held_out" not in found:
        return ""
    training, others = found["accuracy_training"], found["accuracy_held_out"]
    return f", D takes {training:.0%} of its images and {others:.0%} of held-out ones for real"
