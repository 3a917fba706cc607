"""A whole step on GPUs that do not exist, alone in its process: python -m tests.helpers.fake_step WORLD KERNELS FAULT

Prints, as JSON, what a step launches, reduces and moves at two batch sizes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from gan_dist.model.networks import Discriminator, Generator
from gan_dist.training.update import Update
from tests.helpers.dispatch import Log, fake_gpus

BATCHES = (64, 128)
"""Images a rank. Two of them tell what an image costs from what a step does."""


def play(size: int, kernels: Any, fault: str, batch: int) -> Log:
    """Returns the log of rank 0's second step of full width in bf16, `batch` images a rank."""
    with fake_gpus(size, pytest.MonkeyPatch()) as world:
        settings: dict[str, Any] = {"precision": "bf16", "batchnorm_kernels": kernels}
        update = Update(Generator(), Discriminator(), world=world, global_batch=batch * size, **settings)
        real = torch.empty(batch, 3, 64, 64, dtype=torch.uint8, device="cuda")
        latents, requests = torch.empty(batch, 100, device="cuda"), torch.zeros(2, device="cuda")
        honest = update.generator_pass

        def faulty(fake: torch.Tensor, *others: torch.Tensor) -> Any:
            loss, extras = honest(fake, *others)
            if fault == "waits":
                loss.item()
            if fault == "mixes devices":
                loss = loss * torch.ones(1)
            if fault == "copies":
                loss, extras = honest(fake.clone(), *others)
            return loss, extras

        update.generator_pass = faulty  # type: ignore[method-assign]
        update.step([real], [latents], requests)
        log: Any = Log()
        with log:
            update.step([real], [latents], requests)
        second: Log = log
        return second


def main(size: str, kernels: str, fault: str = "") -> None:
    small, large = (play(int(size), kernels, fault, batch) for batch in BATCHES)
    (launches, few), (same, many) = small.total, large.total
    assert launches == same, "the number of launches depends on the batch"
    an_image = (many - few) / (BATCHES[1] - BATCHES[0])
    found = {
        "launches": launches,
        "collectives": dict(large.collectives),
        "reduced": large.reduced,
        "an_image": an_image,
        "a_step": many - BATCHES[1] * an_image,
        "elsewhere": large.elsewhere,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
