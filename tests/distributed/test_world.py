"""The world of ranks: alone, joined, and failing together."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gan_dist.distributed.world import World, join
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.ranks import run_ranks


def test_alone_every_collective_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(device="cpu") as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        tensor = torch.arange(3.0)
        assert torch.equal(world.all_reduce(tensor), torch.arange(3.0))
        assert torch.equal(world.all_gather_into(torch.zeros(1, 3), tensor)[0], tensor)
        assert world.any(True) and not world.any(False)
        assert world.gather_objects("x") == ["x"] and world.from_first(lambda: 7) == 7


def test_an_environment_that_is_half_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 but RANK is not set"), join(device="cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_worlds_of_one_are_refused_unless_they_are_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    with join("cpu") as world:
        assert world.size == 1
    monkeypatch.setenv(name, "4")
    with (
        pytest.raises(UserError, match=r"started 4 processes, but without WORLD_SIZE .* train with `python -m launch"),
        join("cpu"),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join("cpu") as world:
        assert world.size == 1


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.device=cuda, but torch sees no CUDA device"), join(device="cuda"):
        pass


def meet(rank: int, out: str) -> None:
    with join(device="cpu", timeout_s=30, init_timeout_s=60) as world:
        ones = torch.full((2,), float(rank + 1))
        assert world.all_reduce(ones.clone()).tolist() == [6.0, 6.0]
        gathered = world.all_gather_into(torch.empty(3, 1, 2), ones[None])
        assert gathered[:, 0, 0].tolist() == [1.0, 2.0, 3.0]
        assert world.broadcast(ones.clone()).tolist() == [1.0, 1.0]
        assert world.any(rank == 2) and not world.any(False)
        assert world.gather_objects({"rank": rank}) == [{"rank": r} for r in range(3)]
        assert world.from_first(lambda: rank + 40) == 40
        for call, failing in ((world.from_first, 0), (world.together, 1)):
            with pytest.raises(GanDistError, match=f"rank {failing} says no") as caught:
                call(lambda failing=failing: _refuse_on(rank, failing))  # type: ignore[misc]
            assert caught.value.reported_elsewhere == (rank != failing)
    Path(out, f"left-{rank}").touch()


def _refuse_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise UserError(f"rank {rank} says no")


def test_three_ranks_meet_agree_and_leave(tmp_path: Path) -> None:
    run_ranks(3, meet, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left-0", "left-1", "left-2"]


def test_world_is_plain_data() -> None:
    assert World() == World(rank=0, size=1)


def _join_twice(rank: int) -> None:
    with join(device="cpu") as first:
        assert first.gather_objects(rank) == [0, 1]
    if rank == 0:
        time.sleep(1.5)  # as in making a report: the first world's store is still there, and rank 1 comes back to it
    del first
    with join(device="cpu") as second:
        assert second.gather_objects(rank) == [0, 1]


def test_a_rank_that_comes_back_early_waits_for_the_next_world() -> None:
    run_ranks(2, _join_twice)
