"""The order: every epoch a permutation, every world the same sequence, every resume the same continuation."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gan_dist.data.order import Order, check_ranks, rank_slice
from gan_dist.utils.errors import UserError

shards = st.lists(st.integers(1, 20), min_size=1, max_size=8)
seeds = st.integers(0, 2**63)


@given(shards, seeds, st.integers(0, 9), st.integers(0, 5))
def test_every_epoch_visits_each_sample_once(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = Order(sizes, seed, window)
    visited = order.indices(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    assert sorted(visited.tolist()) == list(range(sum(sizes)))


@given(shards, seeds, st.integers(0, 9), st.integers(0, 300), st.integers(0, 200))
def test_a_range_is_its_positions_one_by_one(sizes: list[int], seed: int, window: int, start: int, count: int) -> None:
    order = Order(sizes, seed, window)
    one_by_one = [Order(sizes, seed, window).index(position) for position in range(start, start + count)]
    assert order.indices(start, start + count).tolist() == one_by_one


@given(
    shards,
    seeds,
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_worlds_and_batches_may_change_and_the_sequence_does_not(
    sizes: list[int], seed: int, window: int, stages: list[tuple[int, int, int]]
) -> None:
    position, seen = 0, []
    for batch, world, steps in stages:
        for _ in range(steps):
            for rank in range(world):
                lo, hi = rank_slice(batch, rank, world)
                seen += Order(sizes, seed, window).indices(position + lo, position + hi).tolist()
            position += batch
    assert seen == Order(sizes, seed, window).indices(0, position).tolist()


@given(st.integers(1, 500), st.integers(1, 32))
def test_slices_cover_the_batch_in_rank_order_and_differ_by_one(batch: int, world: int) -> None:
    slices = [rank_slice(batch, rank, world) for rank in range(world)]
    assert slices[0][0] == 0 and slices[-1][1] == batch
    assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
    assert max(hi - lo for lo, hi in slices) - min(hi - lo for lo, hi in slices) <= 1


@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), seeds, st.integers(1, 5), st.integers(0, 3))
def test_a_window_uses_only_its_shards(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = Order(sizes, seed, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    position = epoch * order.num_samples
    windows = order.windows(epoch)
    assert sorted(shard for shards in windows for shard in shards) == list(range(len(sizes)))
    for used in windows:
        count = sum(sizes[shard] for shard in used)
        assert len(used) <= window
        assert set(shard_of[order.indices(position, position + count)].tolist()) == set(used)
        position += count


def test_epochs_and_seeds_differ() -> None:
    order = Order([50, 50], seed=1)
    assert order.indices(0, 100).tolist() != order.indices(100, 200).tolist()
    assert order.indices(0, 100).tolist() != Order([50, 50], seed=2).indices(0, 100).tolist()
    assert Order([50, 50], 1, 1).indices(0, 100).tolist() != order.indices(0, 100).tolist()


def test_the_order_is_what_it_was_when_runs_were_made() -> None:
    """A change here would silently reshuffle every run in the world: these numbers are part of the format."""
    assert Order([7, 5], seed=3).indices(0, 14).tolist() == FIRST
    assert Order([4, 4, 4], seed=3, window_shards=2).indices(0, 12).tolist() == WINDOWED


FIRST = [6, 1, 11, 8, 5, 2, 7, 10, 9, 4, 3, 0, 9, 7]
WINDOWED = [6, 11, 8, 5, 7, 10, 9, 4, 1, 2, 3, 0]


@given(st.integers(1, 3000), seeds, st.integers(0, 3), st.integers(0, 64))
def test_the_quick_sort_finds_the_order_of_the_noise(count: int, seed: int, epoch: int, shift: int) -> None:
    """With 64 bits of noise two are hardly ever equal; with few, nearly all are."""
    order = Order([count], seed)
    noise = order._noise(epoch, 0, count) >> np.uint64(min(shift, 63))
    order._noise = lambda *_: noise  # type: ignore[method-assign]
    assert order.indices(epoch * count, (epoch + 1) * count).tolist() == np.argsort(noise, kind="stable").tolist()


def test_a_hundred_thousand_samples_permute_quickly() -> None:
    """In as many calls as a hundred samples: numpy does the work, not a loop of ours."""

    def calls(samples: int) -> int:
        events: list[str] = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            Order([samples // 25] * 25, seed=0).index(0)
        finally:
            sys.setprofile(None)
        return len(events)

    assert calls(100) > 0
    assert calls(102_400) < 2 * calls(100)


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order([], seed=0)


def test_more_ranks_than_images_in_a_batch_are_refused() -> None:
    check_ranks(2, 2)
    with pytest.raises(UserError, match=r"^3 ranks, but train.global_batch is 2: each rank needs an image"):
        check_ranks(3, 2)
