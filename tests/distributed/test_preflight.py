"""What a run refuses to start with, and whom it names."""

from __future__ import annotations

import time

import pytest
import torch

from gan_dist.distributed.preflight import preflight
from gan_dist.distributed.world import World, join
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.ranks import run_ranks

TASK = {"train.global_batch": 8, "--max-steps": None}


def alone_it_agrees_with_itself() -> None:
    assert preflight(World(), "d" * 64, TASK) == []


def disagree(rank: int) -> None:
    """Three ranks, of which the last is another one in every respect."""
    odd = rank == 2
    with join("cpu") as world:
        assert preflight(world, "d" * 64, TASK) == []
        with pytest.raises(
            UserError, match=r"dataset \(hash of its manifest\) is not the same.*: rank 2 on .* has e{12}"
        ):
            preflight(world, ("e" if odd else "d") * 64, TASK)
        with pytest.raises(UserError, match=r"train\.global_batch is not the same on all ranks: rank 2 on \S+ has 9"):
            preflight(world, "d" * 64, {"train.global_batch": 9 if odd else 8})
        version = torch.__version__
        setattr(torch, "__version__", "2.0.0" if odd else version)  # noqa: B010
        with pytest.raises(
            UserError, match=r"torch is not the same on all ranks: rank 2 on \S+ has 2\.0\.0; the others"
        ):
            preflight(world, "d" * 64, TASK)
        setattr(torch, "__version__", version)  # noqa: B010
        clock = time.time
        if odd:
            time.time = lambda: clock() - 3600
            object.__setattr__(world, "__class__", Elsewhere)
        (line,) = preflight(world, "d" * 64, TASK)
        assert line.startswith("the clock of elsewhere is -3600 s from the others'")


class Elsewhere(World):
    host = "elsewhere"


def test_ranks_that_differ_are_named() -> None:
    alone_it_agrees_with_itself()
    run_ranks(3, disagree)


def wrong_sum(rank: int) -> None:
    with join("cpu") as world:
        World.all_reduce = lambda self, tensor: tensor  # type: ignore[method-assign]
        with pytest.raises(GanDistError, match=rf"rank {rank} on .* gave {rank + 1}, expected 3"):
            preflight(world, "d" * 64, TASK)


def test_a_reduction_that_does_not_reduce_is_found() -> None:
    run_ranks(2, wrong_sum)
