"""What is asked of a conditional generator: classes and latents, arranged into the images of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gan_dist.model.networks import Generator
from gan_dist.sampling.generate import draw_latents, slerp
from gan_dist.utils.errors import UserError

MAX_STRENGTH = 1000.0
"""Far beyond what changes a picture, and far below what float32 cannot hold."""


@dataclass(frozen=True)
class Asked:
    """Classes to draw, by number; none: all of them, as frequent as in the dataset. `strength` as in vectors_of."""

    labels: tuple[int, ...] = ()
    strength: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The N images of a grid: M latents [M, Z]; where there are classes, the vectors of theirs [N, CLASS_DIM]; where
    images share latents, which of these each has, int64 [N]; and the columns (None: about square)."""

    latents: Tensor
    vectors: Tensor | None = None
    which: Tensor | None = None
    columns: int | None = None

    def __len__(self) -> int:
        return len(self.latents if self.which is None else self.which)

    def inputs(self, latents: Tensor | None = None) -> Tensor:
        """Returns what a generator makes these images of; with other `latents`, others of the same classes."""
        chosen = self.latents if latents is None else latents
        chosen = chosen if self.which is None else chosen[self.which]
        return chosen if self.vectors is None else torch.cat([chosen.to(self.vectors), self.vectors], 1)


def ask(generator: Generator, name: str, one: str | None, several: str | None, strength: float) -> Asked:
    """Returns what the options --class, --classes and --strength ask of the `generator` called `name`.

    Raises UserError where they contradict one another, or ask for what it does not have.
    """
    given = [option for option, value in (("--class", one), ("--classes", several)) if value is not None]
    if len(given) == 2:
        raise UserError("--class and --classes say different things; give one of them")
    if not 0 <= strength <= MAX_STRENGTH:
        raise UserError(f"--strength: expected a number from 0 to {MAX_STRENGTH:g}, found {strength:g}")
    given += ["--strength"] if strength != 1 else []
    if given and not generator.num_classes:
        raise UserError(f"{given[0]}: {name} knows no classes; a run with model.classes=dataset learns them")
    labels = [generator.classes.find(one)] if one is not None else []
    labels += generator.classes.parse(several) if several is not None else []
    return Asked(tuple(labels), strength)


def arrange(
    generator: Generator, asked: Asked, count: int, seed: int, walk: bool = False, truncation: float = 1.0
) -> Plan:
    """Returns the plan of `count` images, or a few less where rows are to be full, keyed by `seed`.

    Several classes have a row each, of the same latents; in a `walk` each row is one latent, which goes through these
    classes. Any other walk goes from latent to latent, each row in one class. Latents are scaled by `truncation`.
    """
    size, side = generator.latent_dim, math.ceil(math.sqrt(count))
    several = len(asked.labels) > 1
    if several and walk:
        side = max(side, len(asked.labels))  # none is left out
        rows = math.ceil(count / side)
        latents = draw_latents(size, rows, seed, truncation=truncation)
        way = _through(generator.vectors_of(torch.tensor(asked.labels), asked.strength), side)
        return Plan(latents, way.repeat(rows, 1)[:count], torch.arange(count) // side, side)
    if several:
        columns = max(1, count // len(asked.labels))
        latents = draw_latents(size, columns, seed, truncation=truncation)
        labels = torch.tensor(asked.labels).repeat_interleave(columns)
        which = torch.arange(columns).repeat(len(asked.labels))
        return Plan(latents, generator.vectors_of(labels, asked.strength), which, columns)
    latents = draw_latents(size, count, seed, walk, truncation)
    if not generator.num_classes:
        return Plan(latents)
    if asked.labels:
        labels = torch.full((count,), asked.labels[0])
    elif walk:
        labels = generator.classes.draw(math.ceil(count / side), seed).repeat_interleave(side)[:count]
    else:
        labels = generator.classes.draw(count, seed)
    return Plan(latents, generator.vectors_of(labels, asked.strength))


def _through(points: Tensor, steps: int) -> Tensor:
    """Returns [steps, E]: a way through all of `points` [n, E], on great circles from each to the next."""
    places = torch.linspace(0, len(points) - 1, steps, dtype=torch.float64)
    first = places.floor().clamp(max=len(points) - 2).long()
    return slerp(points[first], points[first + 1], (places - first)[:, None].to(points.dtype))
