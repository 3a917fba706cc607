"""Evaluation while a run trains. It costs time only: training continues with the bits it would have had without."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gan_dist.data.dataset import Dataset, open_dataset
from gan_dist.distributed.world import World
from gan_dist.evaluation.evaluate import choose_encoder
from gan_dist.evaluation.protocol import Evaluation, accuracy, warnings
from gan_dist.runs.checkpoint import read_best
from gan_dist.runs.metrics_file import PROTOCOL
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.utils.errors import UserError

ACCURACY_SAMPLES = 1000
"""Real images of each kind on which the discriminator is tried."""


class Evaluator:
    """Evaluates when it is due, logs the figures, and knows which step was the best. One a rank.

    generator: the network that draws (the averaged one where there is one); discriminator: the one that learns; judge:
    a network like it, alone in its world, since rank 0 judges for all and running statistics change as it does;
    encoder: as evaluate.choose_encoder takes it;
    checkpoints: the folder that may hold an earlier best; held_out: address of a dataset that is not trained on;
    complete: whether all of `dataset` is at hand. Raises UserError for options that exclude each other.
    """

    def __init__(
        self,
        world: World,
        dataset: Dataset,
        generator: nn.Module,
        discriminator: nn.Module,
        judge: nn.Module,
        checkpoints: Path,
        *,
        every_steps: int,
        samples: int,
        images_per_step: int,
        latent_dim: int,
        averaged: bool,
        complete: bool,
        encoder: str,
        held_out: str | None,
        cache_dir: str | None,
        log: Callable[[str], None],
    ) -> None:
        self._every, self._images_per_step = every_steps, images_per_step
        self._latent_dim, self._averaged = latent_dim, averaged
        self._world, self._dataset = world, dataset
        self._generator, self._discriminator, self._judge = generator, discriminator, judge
        self._began, self._seconds = time.monotonic(), 0.0
        self._best: dict[str, Any] | None = None
        self._most_diverse = 0.0  # of the evaluations since this start
        self._held_out: Dataset | None = None
        self._protocol: dict[str, Any] = {}  # the newest one in the run's history
        if not every_steps:
            return
        if not complete:
            raise UserError(
                "evaluate.every_steps: a windowed placement keeps only a part of the dataset here; "
                "set evaluate.every_steps=0, and `gan-dist evaluate RUN --all-checkpoints` afterwards"
            )
        chosen = choose_encoder(world, encoder, "evaluate.encoder", dataset, samples, log)
        self._evaluation = Evaluation(world, dataset, samples, encoder=chosen)
        if held_out:
            self._held_out = world.together(lambda: open_dataset(held_out, cache_dir))
            _check_held_out(self._held_out, dataset, held_out)
        self._best = world.from_first(lambda: read_best(checkpoints))

    def is_due(self, step: int, end: int) -> bool:
        """Returns whether `step` is to be evaluated; alike on every rank."""
        return self._every > 0 and (step % self._every == 0 or step == end)

    def best(self, step: int) -> dict[str, Any] | None:
        """Returns the mark of the best checkpoint so far if that is `step`'s, else None."""
        return self._best if self._best is not None and self._best["step"] == step else None

    def evaluate(self, step: int, telemetry: Telemetry, stopped: Callable[[], bool]) -> dict[str, float]:
        """Returns {evaluate/...: figure} of `step`; the seconds it took alone when `stopped` ended it on some rank.

        A collective. Figures are logged on the console, signs of trouble as warnings.
        """
        began = time.monotonic()
        figures = self._evaluation(self._generator, self._latent_dim, averaged=self._averaged, stopped=stopped)
        if figures is not None and self._held_out is not None:
            figures |= self._world.from_first(self._accuracies)
        seconds = time.monotonic() - began
        self._seconds += seconds
        if figures is None:
            telemetry.log(f"the evaluation of step {step} was cut short; `gan-dist evaluate` can make up for it")
            return {"evaluate/seconds": seconds}
        protocol = figures.pop("protocol")
        if protocol != self._protocol:
            telemetry.event(PROTOCOL, step, **protocol)
            self._protocol = protocol
        swd_depends_on = {name: value for name, value in protocol.items() if name != "encoder"}
        key = hashlib.sha256(json.dumps(swd_depends_on, sort_keys=True).encode()).hexdigest()[:16]
        leads = self._best is None or self._best["protocol"] != key or figures["swd"] < self._best["swd"]
        if leads:
            self._best = {"step": step, "swd": figures["swd"], "protocol": key}
        share = self._seconds / max(time.monotonic() - self._began, 1e-9)
        telemetry.log(
            f"evaluated step {step}: swd {figures['swd']:.4g}{' (the best so far)' if leads else ''}, diversity "
            f"{figures['diversity']:.2f}{_accuracy_words(figures)}; {seconds:.1f} s, {share:.1%} of the time so far"
        )
        for line in warnings({**figures, "images_seen": step * self._images_per_step}, self._most_diverse):
            telemetry.warn(line, step)
        self._most_diverse = max(self._most_diverse, figures["diversity"])
        return {f"evaluate/{name}": float(value) for name, value in figures.items()} | {
            "evaluate/seconds": seconds,
            "evaluate/share_of_time": share,
        }

    def _accuracies(self) -> dict[str, float]:
        """Returns the discriminator's accuracy, as it is now, on its training images and on held-out ones."""
        assert self._held_out is not None
        self._judge.load_state_dict(self._discriminator.state_dict())
        return {
            "accuracy_training": accuracy(self._judge, self._dataset, ACCURACY_SAMPLES),
            "accuracy_held_out": accuracy(self._judge, self._held_out, ACCURACY_SAMPLES),
        }


def _check_held_out(held_out: Dataset, dataset: Dataset, address: str) -> None:
    """Raises UserError unless `held_out` has images of the training set's size, and others."""
    if held_out.resolution != dataset.resolution:
        raise UserError(
            f"evaluate.held_out: {address} holds {held_out.resolution}x{held_out.resolution} images, the run learns "
            f"from {dataset.resolution}x{dataset.resolution} ones; prepare it with --resolution {dataset.resolution}"
        )
    if held_out.identity == dataset.identity:
        raise UserError(
            f"evaluate.held_out: {address} is what the run learns from; name a dataset that it is not trained on"
        )


def _accuracy_words(figures: dict[str, Any]) -> str:
    if "accuracy_held_out" not in figures:
        return ""
    training, held_out = figures["accuracy_training"], figures["accuracy_held_out"]
    return f", D takes {training:.0%} of its images and {held_out:.0%} of held-out ones for real"
