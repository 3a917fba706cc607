"""The collectives that are tried by an environment variable: the same game, the same bits on all ranks, agreement."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gan_dist.distributed import exchange
from gan_dist.distributed.exchange import BUCKETS, PLAIN, SMALL, Collectives, OneShot, resolve_collectives
from gan_dist.distributed.world import World
from gan_dist.training.gradients import _buckets
from gan_dist.training.runner import Compiled
from gan_dist.utils.errors import UserError
from tests.helpers.games import CPU, batches, game, tensors, worst
from tests.helpers.ranks import run_ranks

WORLDS = (2, 3)
STEPS = 3
CHOICES = ("two buckets", "three buckets", "one shot", "both")
GAME: dict[str, Any] = {"global_batch": 7, "d_steps": 2}


def _one_shot(world: World, off: float = 0) -> OneShot:
    """Returns what symmetric memory does, by gloo: all ranks' buffers are read, and summed in rank order."""

    def total(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(world.size)]
        dist.all_gather(parts, part, group=world.group)
        return torch.stack(parts).sum(0) + off

    return OneShot(torch.zeros(exchange.ROOM, dtype=torch.float64), world.rank, world.size, total)


def _collectives(world: World, choice: str) -> Collectives:
    return {
        "two buckets": Collectives(2),
        "three buckets": Collectives(3),
        "one shot": Collectives(1, _one_shot(world)),
        "both": Collectives(2, _one_shot(world)),
    }[choice]


def _play(world: World, collectives: Collectives, compiled: bool = False) -> dict[str, Any]:
    """Returns first-step gradients, third-step state, and which collectives a step called, in order."""
    update = game(world, collectives=collectives, **GAME)
    if compiled:
        Compiled(update, "", backend="aot_eager")
    calls: list[tuple[str, int]] = []
    honest = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor", "all_gather")}
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        if step == STEPS - 1 and not compiled:
            for name, function in honest.items():

                def noted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
                    calls.append((_name, args[0][0].numel() if _name == "all_gather" else args[0].numel()))
                    return _function(*args, **kwargs)

                setattr(dist, name, noted)
        stats = update.step(*batches(update, step))
        if step == 0:
            gradients = {"d": update.d.gradients.values.clone(), "g": update.g.gradients.values.clone()}
    for name, function in honest.items():
        setattr(dist, name, function)
    sums = 2 * len(update.d.gradients.buckets) + len(update.g.gradients.buckets)  # of gradients, in a step
    return {"gradients": gradients, "state": tensors(update), "stats": stats, "calls": calls, "sums": sums}


def _resolved(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns what this rank is told, by case."""
    told: dict[str, Any] = {"unset": resolve_collectives(world) is PLAIN}
    monkeypatch.setenv(SMALL, "one_shot")
    told["on a CPU"] = resolve_collectives(world)
    # Ranks whose machine offers it all, but for one.
    stages: dict[str, Any] = {
        "_allocate": lambda world: torch.zeros(exchange.ROOM, dtype=torch.float64),
        "_connect": lambda world, buffer: _one_shot(world),
        "_try_out": exchange._try_out,
    }
    for failing in (None, *stages):
        for name, stage in stages.items():

            def fails(*args: Any, _stage: Any = stage) -> Any:
                _stage(*args)  # it is the others' too
                raise RuntimeError("no peer access")

            monkeypatch.setattr(exchange, name, fails if name == failing and world.rank == 1 else stage)
        found = resolve_collectives(world)
        told[str(failing)] = (found.one_shot is not None, found.reason)
    for name, stage in stages.items():
        monkeypatch.setattr(exchange, name, stage)
    if world.rank == 1:  # whose memory holds something else
        monkeypatch.setattr(exchange, "_connect", lambda world, buffer: _one_shot(world, off=1))
    told["wrong"] = resolve_collectives(world).reason
    monkeypatch.setenv(BUCKETS, str(2 + world.rank))
    try:
        resolve_collectives(world)
    except UserError as error:
        told["differ"] = str(error)
    return told


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    worlds: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in WORLDS}
    control: Any = dist.new_group([0, 1])
    results: dict[str, Any] = {}
    for size, group in worlds.items():
        if rank < size:
            world = World(rank=rank, size=size, device=CPU, group=group)
            results |= {f"{size} {choice}": _play(world, _collectives(world, choice)) for choice in CHOICES}
            if size == 2:
                results["compiled"] = _play(world, _collectives(world, "both"), compiled=True)
                with pytest.MonkeyPatch.context() as monkeypatch:
                    together = World(rank=rank, size=2, device=CPU, group=group, control=control)
                    results["resolved"] = _resolved(together, monkeypatch)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(max(WORLDS), _rank, folder)
        yield [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(max(WORLDS))]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return _play(World(), PLAIN)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_game_is_the_same(ranks: list[dict[str, Any]], alone: dict[str, Any], size: int, choice: str) -> None:
    first = ranks[0][f"{size} {choice}"]
    assert worst(first["gradients"], alone["gradients"]) < 1e-12
    assert worst(first["state"], alone["state"]) < 1e-12
    torch.testing.assert_close(first["stats"], alone["stats"], rtol=1e-11, atol=0)
    for other in (ranks[rank][f"{size} {choice}"] for rank in range(1, size)):
        assert other["calls"] == first["calls"]
        assert torch.equal(other["stats"], first["stats"])
        for name, value in first["state"].items():
            assert torch.equal(other["state"][name], value), name


def test_a_compiled_game_is_the_same(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert worst(ranks[0]["compiled"]["gradients"], alone["gradients"]) < 1e-12
    assert worst(ranks[0]["compiled"]["state"], alone["state"]) < 1e-12


@pytest.mark.parametrize("size", WORLDS)
def test_a_choice_calls_what_it_says(ranks: list[dict[str, Any]], size: int) -> None:
    # Layers with batch norm: 3 in G, 2 in D. G plays twice, with one way back; D twice on two groups, and once.
    forth, back = 2 * 3 + 2 * 2 + 2, 3 + 2 * 2 + 2
    for choice, least in (("two buckets", 6), ("three buckets", 8), ("one shot", 3), ("both", 6)):
        played = ranks[0][f"{size} {choice}"]
        names, sums = [name for name, _ in played["calls"]], played["sums"]
        assert least <= sums <= 9  # a layer is not divided
        if choice in ("one shot", "both"):
            assert names.count("all_gather") == forth + back
            assert names.count("all_reduce") == sums
            assert "all_gather_into_tensor" not in names
        else:
            assert names.count("all_gather_into_tensor") == forth
            assert names.count("all_reduce") == back + sums
            # A sum of gradients starts before the way back has ended: small sums of batch norm follow it.
            first = next(i for i, (name, count) in enumerate(played["calls"]) if name == "all_reduce" and count > 300)
            assert played["calls"][first + 1][0] == "all_reduce" and played["calls"][first + 1][1] < 300


def test_one_rank_that_cannot_means_that_none_does(ranks: list[dict[str, Any]]) -> None:
    first, second = (ranks[rank]["resolved"] for rank in (0, 1))
    assert first["unset"] and second["unset"]
    assert first["on a CPU"] == second["on a CPU"]
    assert first["on a CPU"].one_shot is None and "it is for GPUs" in first["on a CPU"].reason
    assert first["None"] == second["None"] == (True, "gradients in 1 part(s); small ones by one-shot all-reduce")
    for failing in ("_allocate", "_connect", "_try_out"):
        assert first[failing] == second[failing]
        assert first[failing][0] is False
        assert "fails on rank 1 (RuntimeError: no peer access)" in first[failing][1]
    assert "fails on rank 1 (ArithmeticError: gathered differs from the group's)" in first["wrong"]
    assert first["wrong"] == second["wrong"]
    assert first["differ"] == second["differ"]
    assert "('2', 'one_shot') on rank 0 and ('3', 'one_shot') on rank 1" in first["differ"]


@pytest.mark.parametrize(("name", "value"), [(BUCKETS, "0"), (BUCKETS, "two"), (BUCKETS, "99"), (SMALL, "nccl")])
def test_a_value_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}: expected .* found '{value}'; unset it"):
        resolve_collectives(World())


def test_ranks_of_several_machines_use_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather_objects", lambda self, value: ["a", "b"] if isinstance(value, str) else [value])
    monkeypatch.setenv(SMALL, "one_shot")
    found = resolve_collectives(World(size=2))
    assert found.one_shot is None and "on one machine" in found.reason


def test_what_does_not_fit_goes_by_the_group() -> None:
    one_shot = OneShot(torch.zeros(100, dtype=torch.float64), 1, 2, torch.clone)
    small, large = torch.ones(3, 5, dtype=torch.float64), torch.ones(60, dtype=torch.float64)
    assert one_shot.gather(large) is None and one_shot.gather(small.float()) is None
    gathered = one_shot.gather(small)
    assert gathered is not None and gathered.shape == (2, 3, 5)
    assert torch.equal(gathered[1], small) and not gathered[0].any()
    summed = one_shot.sum(large)
    assert summed is not None and torch.equal(summed, large)
    assert one_shot.sum(torch.ones(30, dtype=torch.float64)) is None  # no room is left
    for _ in range(9):  # what was there before stays there
        assert one_shot.gather(small) is not None


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_buckets_hold_each_gradient_once_the_last_first(sizes: list[int], count: int) -> None:
    buckets = _buckets(sizes, count)
    assert 1 <= len(buckets) <= count
    assert all(buckets)
    assert [place for bucket in reversed(buckets) for place in bucket] == list(range(len(sizes)))
    if len(sizes) >= count and len(set(sizes)) == 1:
        assert len(buckets) == count
