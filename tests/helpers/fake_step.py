"""Whole steps on GPUs that do not exist, in a process of their own.

python -m tests.helpers.fake_step STEP...

A STEP is a Step's fields in JSON. Prints a line of JSON for each: what it launches, reduces and moves, or its error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gan_dist.config.schema import load_config
from gan_dist.data.classes import NO_CLASSES
from gan_dist.distributed.exchange import PLAIN, ROOM, Collectives, OneShot
from gan_dist.training.setup import build_update
from tests.helpers.dispatch import Log, fake_gpus
from tests.helpers.games import STYLES

BATCHES = (64, 128)
"""Images a rank. Two of them tell what an image costs from what a step does."""


@dataclass(frozen=True)
class Step:
    """The step of one rank. `weighed` plays it at both batch sizes, otherwise at the larger one."""

    size: int
    kernels: str
    game: str = "thesis"
    rank: int = 0
    fault: str = ""
    weighed: bool = False


GAMES: dict[str, list[str]] = {
    "thesis": [],
    "penalty": ["model.d_norm=none", "loss.gradient_penalty.weight=1", "loss.gradient_penalty.on=both"],
    "modern": [  # paintings64-modern
        *("model.upsample=nearest", "model.d_norm=none", "model.init=he", "loss.name=relativistic"),
        *("loss.gradient_penalty.weight=0.05", "loss.gradient_penalty.on=both", "loss.gradient_penalty.share=0.25"),
        *("loss.real_target=1", "loss.generator_target=null", "optim.betas=[0.0,0.99]"),
        *("optim.decay=linear", "optim.decay_images=100000", "optim.decay_to=0"),
        *("data.augment.colour=true", "data.augment.translation=true"),
    ],
    "classes": [
        "model.classes=dataset",
        "model.d_norm=spectral",
        "loss.gradient_penalty.weight=1",
        "loss.gradient_penalty.share=0.25",
    ],
    "augment": [f"data.augment.{key}" for key in ("colour=true", "translation=true", "cutout=true", "target=0.6")]
    + ["model.minibatch_std=true", "model.blocks=residual", "optim.beta2_to=0.99", "optim.beta2_images=1000"],
}
"""What is set besides the defaults."""
EXCHANGES = ("buckets", "one_shot")
"""Games of the thesis with other collectives."""


def play(step: Step, batch: int) -> Log:
    """Returns the log of a rank's second step of a game at full width in bf16, `batch` images a rank."""
    kernels: Any = step.kernels
    with pytest.MonkeyPatch.context() as patch, fake_gpus(step.size, patch, step.rank) as world:
        patch.setattr("gan_dist.training.draws._draws", lambda *words: None)  # a generator asks for a real device
        words = [f"train.global_batch={batch * step.size}", *GAMES.get(step.game, [])]
        config = load_config({"data": {"shards": "/tmp/none"}}, words)
        buffer = torch.zeros(ROOM, device="cuda")
        collectives = {
            "buckets": Collectives(3),
            # the true one asks for a device
            "one_shot": Collectives(1, OneShot(buffer, step.rank, step.size, torch.clone)),
        }.get(step.game, PLAIN)
        classes = STYLES if config.model.classes == "dataset" else NO_CLASSES
        update = build_update(config, world, "bf16", kernels, collectives, classes)
        real = torch.empty(batch, 3, 64, 64, dtype=torch.uint8, device="cuda")
        latents, requests = torch.empty(batch, 100, device="cuda"), torch.zeros(2, device="cuda")
        honest = update.generator_pass

        def faulty(fake: torch.Tensor, real: torch.Tensor, *draws: torch.Tensor) -> Any:
            loss, extras = honest(fake, real, *draws)
            if step.fault == "waits":
                loss.item()
            if step.fault == "mixes devices":
                loss = loss * torch.ones(1)
            if step.fault == "copies":
                loss, extras = honest(fake.clone(), real, *draws)
            return loss, extras

        update.generator_pass = faulty  # type: ignore[method-assign]
        draws = update.draw(0, 0, torch.empty(batch, dtype=torch.int64, device="cuda"))
        update.begin(0)
        update.step([real], [latents], requests, draws)
        log: Any = Log()
        with log:
            update.step([real], [latents], requests, draws)
        second: Log = log
        return second


def found(step: Step) -> dict[str, Any]:
    """Returns what a step comes to."""
    log = play(step, BATCHES[1])
    launches, many = log.total
    told = {
        "launches": launches,
        "collectives": dict(log.collectives),
        "order": log.order,
        "reduced": log.reduced,
        "elsewhere": log.elsewhere,
    }
    if step.weighed:
        same, few = play(step, BATCHES[0]).total
        assert launches == same, "the number of launches depends on the batch"
        an_image = (many - few) / (BATCHES[1] - BATCHES[0])
        told |= {"an_image": an_image, "a_step": many - BATCHES[1] * an_image}
    return told


def let_adam_take_its_rate_from_a_tensor() -> torch.library.Library:
    """Returns what must be kept while fake steps are played: torch has fakes of fused Adam for rates that are numbers
    only. It changes its arguments where they are, and returns nothing."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_fused_adam_.tensor_lr", lambda *args, **kwargs: None, "Meta")  # type: ignore[no-untyped-call]
    return library


def main(*steps: str) -> None:
    kept = let_adam_take_its_rate_from_a_tensor()
    for step in steps:
        try:
            told = found(Step(**json.loads(step)))
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
