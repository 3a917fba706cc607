"""How the update is run: eagerly, one kernel after another. Compiled and captured runners take their place here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gan_dist.errors import UserError
from gan_dist.train.update import Update


class Runner:
    """Runs an update's steps; `name` says how."""

    name = "eager"

    def __init__(self, update: Update) -> None:
        self._update = update

    def step(self, reals: Sequence[Tensor], latents: Sequence[Tensor], stop: float) -> Tensor:
        """Returns the step's STATS, as Update.step does."""
        return self._update.step(reals, latents, stop)


def make_runner(name: str, update: Update) -> Runner:
    """Returns the runner called `name`; auto takes the fastest there is.

    Raises UserError for one that this version does not have.
    """
    if name not in ("auto", "eager"):
        raise UserError(f"train.runner={name} is not available on {update.world.device.type} yet; use auto or eager")
    return Runner(update)
