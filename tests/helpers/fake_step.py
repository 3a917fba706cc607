"""A whole step on GPUs that do not exist, alone in its process.

python -m tests.helpers.fake_step WORLD KERNELS [FAULT [GAME [RANK]]]

Prints, as JSON, what a step launches, reduces and moves at two batch sizes.
"""

from __future__ import annotations

import json
import sys
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


GAMES: dict[str, list[str]] = {
    "thesis": [],
    "penalty": ["model.d_norm=none", "loss.gradient_penalty.weight=1", "loss.gradient_penalty.on=both"],
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


def play(size: int, kernels: Any, fault: str, batch: int, game: str, rank: int = 0) -> Log:
    """Returns the log of a rank's second step of a game at full width in bf16, `batch` images a rank."""
    patch = pytest.MonkeyPatch()
    patch.setattr("gan_dist.training.draws._draws", lambda *words: None)  # a generator asks for a real device
    with fake_gpus(size, patch, rank) as world:
        config = load_config(
            {"data": {"shards": "/tmp/none"}}, [f"train.global_batch={batch * size}", *GAMES.get(game, [])]
        )
        buffer = torch.zeros(ROOM, device="cuda")
        collectives = {
            "buckets": Collectives(3),
            "one_shot": Collectives(1, OneShot(buffer, rank, size, torch.clone)),  # the true one asks for a device
        }.get(game, PLAIN)
        update = build_update(
            config, world, "bf16", kernels, collectives, STYLES if config.model.classes == "dataset" else NO_CLASSES
        )
        real = torch.empty(batch, 3, 64, 64, dtype=torch.uint8, device="cuda")
        latents, requests = torch.empty(batch, 100, device="cuda"), torch.zeros(2, device="cuda")
        honest = update.generator_pass

        def faulty(fake: torch.Tensor, real: torch.Tensor, *draws: torch.Tensor) -> Any:
            loss, extras = honest(fake, real, *draws)
            if fault == "waits":
                loss.item()
            if fault == "mixes devices":
                loss = loss * torch.ones(1)
            if fault == "copies":
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


def main(size: str, kernels: str, fault: str = "", game: str = "thesis", rank: str = "0") -> None:
    small, large = (play(int(size), kernels, fault, batch, game, int(rank)) for batch in BATCHES)
    (launches, few), (same, many) = small.total, large.total
    assert launches == same, "the number of launches depends on the batch"
    an_image = (many - few) / (BATCHES[1] - BATCHES[0])
    found = {
        "launches": launches,
        "collectives": dict(large.collectives),
        "order": large.order,
        "reduced": large.reduced,
        "an_image": an_image,
        "a_step": many - BATCHES[1] * an_image,
        "elsewhere": large.elsewhere,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
