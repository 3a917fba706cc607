"""What moves while a run goes on: the learning rates' share, and Adam's second decay rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """The share of the learning rates that holds at a position: a rise over `warmup_images`, times a fall until
    `decay_images`, linear or cosine (Loshchilov and Hutter 2017, eq. 5), to `decay_to`."""

    warmup_images: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_images: int = 0
    decay_to: float = 0.0

    def __call__(self, images_seen: int) -> float:
        """Returns the share, in [0, 1], for a step that begins when D has seen so many images.

        The warm-up counts from the next image on, so that no step has a rate of 0.
        """
        share = min(1.0, (images_seen + 1) / self.warmup_images) if self.warmup_images else 1.0
        if self.decay == "none":
            return share
        way = min(1.0, images_seen / self.decay_images)
        fallen = 1 - way if self.decay == "linear" else (1 + math.cos(math.pi * way)) / 2
        return share * (self.decay_to + (1 - self.decay_to) * fallen)

    @property
    def constant(self) -> bool:
        """Whether the rates never move."""
        return self.warmup_images == 0 and self.decay == "none"


CONSTANT = Schedule()


@dataclass(frozen=True)
class Beta2Ramp:
    """How Adam's second decay rate moves, linearly, to `to` over the first `images` (Huang et al. 2024,
    arXiv:2501.05441): early gradients, of a game that changes fast, are forgotten sooner. 0 images: it stays."""

    to: float = 0.999
    images: int = 0

    def __call__(self, start: float, images_seen: int) -> float:
        """Returns the rate for a step that begins when D has seen so many images, `start` being that of the first."""
        return start + (self.to - start) * min(1.0, images_seen / self.images) if self.images else start


STILL = Beta2Ramp()
