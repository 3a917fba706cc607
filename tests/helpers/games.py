"""Small games that several tests play: networks, batches and latents that depend on nothing but their seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gan_dist.config.schema import Blocks, DNorm, Init, Upsample
from gan_dist.data.classes import NO_CLASSES, Classes
from gan_dist.distributed.world import World
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Discriminator, Generator
from gan_dist.training.draws import draw_latents
from gan_dist.training.update import NO_REQUESTS, Requests, Update

RESOLUTION, LATENT_DIM, CHANNELS = 32, 8, 4
CPU = torch.device("cpu")
STYLES = Classes(("baroque", "cubism"), (1, 1, 1))


def networks(
    seed: int = 0,
    std: float = 0.1,
    *,
    upsample: Upsample = "transposed",
    d_norm: DNorm = "batch",
    init: Init = "dcgan",
    blocks: Blocks = "plain",
    minibatch_std: bool = False,
    classes: Classes = NO_CLASSES,
) -> tuple[Generator, Discriminator]:
    """Returns small networks; a wide initialisation keeps gradients well away from zero."""
    stream = torch.Generator().manual_seed(seed)
    generator = Generator(RESOLUTION, LATENT_DIM, CHANNELS, upsample, blocks, classes=classes)
    discriminator = Discriminator(
        RESOLUTION, CHANNELS, 0.2, d_norm, blocks, minibatch_std, num_classes=len(classes.names)
    )
    initialise(generator, std, stream, init)
    initialise(discriminator, std, stream, init)
    return generator, discriminator


def game(world: World | None = None, model: dict[str, Any] | None = None, **settings: Any) -> Update:
    """Returns an Update in float64, of networks as `model` describes them, unless told otherwise."""
    settings = {"global_batch": 6, "precision": "fp64", "g_lr": 1e-3, "d_lr": 1e-3, **settings}
    return Update(*networks(**(model or {})), world=world or World(), **settings)


def batches(update: Update, step: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns this rank's reals and latents of a step, each d_steps long, on the update's device."""
    world, size = update.world, update.global_batch
    lo, hi = world.rank * size // world.size, (world.rank + 1) * size // world.size
    reals, latents = [], []
    for k in range(update.d_steps):
        position = (step * update.d_steps + k) * size
        stream = torch.Generator().manual_seed(1000 + position)
        pixels = torch.randint(0, 256, (size, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8, generator=stream)
        reals.append(pixels[lo:hi].to(world.device))
        latents.append(draw_latents(7, position, size, LATENT_DIM, lo, hi, CPU, torch.float64).to(world.device))
    return reals, latents


def labels(update: Update, step: int) -> list[Tensor | None]:
    """Returns this rank's classes of a step, one for each of its D updates, where the game has classes."""
    found: list[Tensor | None] = []
    for k in range(update.d_steps):
        stream = torch.Generator().manual_seed(2000 + step * update.d_steps + k)
        whole = torch.randint(0, 1 + update.num_classes, (update.global_batch,), generator=stream)
        found.append(whole[update.lo : update.hi].to(update.world.device) if update.num_classes else None)
    return found


def moves(
    update: Update, step: int, requests: Requests = NO_REQUESTS
) -> tuple[list[Tensor], list[Tensor], Requests, list[Tensor]]:
    """Returns all that a step takes: reals, latents, requests, and what the game draws beside."""
    positions = [(step * update.d_steps + k) * update.global_batch for k in range(update.d_steps)]
    given = zip(positions, labels(update, step), strict=True)
    return *batches(update, step), requests, [drawn for at, classes in given for drawn in update.draw(7, at, classes)]


def tensors(update: Update) -> dict[str, Tensor]:
    """Returns every tensor of the state by name."""
    state = update.state_dict()
    named = {f"{part}.{name}": value for part in ("generator", "discriminator") for name, value in state[part].items()}
    for part in ("optimizer_g", "optimizer_d"):
        for index, moments in state[part]["state"].items():
            named |= {f"{part}.{index}.{name}": value for name, value in moments.items()}
    named |= {f"augment.{name}": value for name, value in state.get("augment", {}).items()}
    return named


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Returns the largest difference of any tensor, relative to that tensor's largest value on the right."""
    assert left.keys() == right.keys()
    return max(
        ((left[name].double() - right[name].double()).abs().max() / right[name].abs().max().clamp_min(1e-30)).item()
        for name in left
    )
