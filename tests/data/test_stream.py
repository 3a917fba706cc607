"""The stream: exactly the order's samples, at any world size and position, from reused buffers, without a hang."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan_dist.data.dataset import Dataset, Gather, gather, open_dataset
from gan_dist.data.order import Order
from gan_dist.data.placement import choose_placement
from gan_dist.data.stream import RING, Stream
from gan_dist.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(dataset: Path) -> Dataset:
    return open_dataset(dataset)


@pytest.fixture(scope="module")
def pixels(opened: Dataset) -> torch.Tensor:
    """Every sample by number, read the slow way: shard by shard, sample by sample."""
    views = [opened.shard_view(i) for i in range(len(opened.shard_sizes))]
    return torch.stack([sample.clone() for view in views for sample in view])


def test_gather_returns_the_samples_in_the_order_asked_for(opened: Dataset, pixels: torch.Tensor) -> None:
    wanted = np.random.default_rng(0).permutation(opened.num_samples)
    assert torch.equal(gather(opened, wanted), pixels[wanted])
    assert torch.equal(gather(opened, wanted[:1]), pixels[wanted[:1]])
    assert len(gather(opened, wanted[:0])) == 0
    assert len({tuple(sample.flatten().tolist()) for sample in pixels}) == opened.num_samples, "samples must differ"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 90),
    world=st.integers(1, 4),
    position=st.integers(0, 500),
    seed=st.integers(0, 2**40),
    window=st.integers(0, 6),
    steps=st.integers(1, RING + 3),
)
def test_ranks_together_see_the_order_from_any_position(
    opened: Dataset, pixels: torch.Tensor, batch: int, world: int, position: int, seed: int, window: int, steps: int
) -> None:
    world = min(world, batch)
    order = Order(opened.shard_sizes, seed, window)
    streams = [
        Stream(opened, order, position=position, global_batch=batch, rank=rank, size=world, device=CPU)
        for rank in range(world)
    ]
    try:
        for step in range(steps):
            begin = position + step * batch
            assert all(stream.position == begin for stream in streams)
            together = torch.cat([stream.next() for stream in streams])
            assert torch.equal(together, pixels[order.indices(begin, begin + batch)])
    finally:
        for stream in streams:
            stream.close()


def test_a_batch_stays_as_it_is_until_the_next_call(opened: Dataset) -> None:
    with Stream(opened, Order(opened.shard_sizes, 1), position=0, global_batch=8, device=CPU) as stream:
        for _ in range(3 * RING):
            batch = stream.next()
            before = batch.clone()
            threading.Event().wait(0.005)  # long enough for the prefetching thread to run ahead as far as it can
            assert torch.equal(batch, before)


def test_closing_leaves_no_thread_whether_or_not_anything_was_read(opened: Dataset) -> None:
    before = threading.active_count()
    for reads in (0, 1, RING + 2):
        stream = Stream(opened, Order(opened.shard_sizes, 1), position=0, global_batch=4, device=CPU)
        for _ in range(reads):
            stream.next()
        stream.close()
        stream.close()
    assert threading.active_count() == before


def test_what_stops_the_thread_is_raised_where_data_is_asked_for(
    opened: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(i: int) -> torch.Tensor:
        raise OSError(5, "Input/output error", f"shard {i}")

    broken = open_dataset(opened.root)
    monkeypatch.setattr(broken, "shard_view", lost)
    with Stream(broken, Order(broken.shard_sizes, 1), position=0, global_batch=4, device=CPU) as stream:
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                stream.next()


def test_waiting_is_counted(opened: Dataset) -> None:
    with Stream(opened, Order(opened.shard_sizes, 1), position=0, global_batch=4, device=CPU) as stream:
        stream.next()
        assert stream.wait_seconds >= 0
        assert stream.placement == "memory"


def test_the_thread_takes_its_ranks_gpu_first(opened: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set_device {device}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: calls.append("Stream"))
    stream = Stream.__new__(Stream)  # a whole one needs pinned memory
    stream.placement, stream._device, stream._dataset = "memory", torch.device("cuda", 1), opened
    stream._free, stream._closing = queue.SimpleQueue(), threading.Event()
    stream._free.put(None)
    stream._prefetch(0)
    assert calls == ["set_device cuda:1", "Stream"]


def test_device_placement_needs_a_device(opened: Dataset) -> None:
    with pytest.raises(UserError, match="keeps the set in GPU memory"):
        choose_placement("device", opened, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["memory", "device"])
def test_on_a_gpu_the_order_is_the_same(opened: Dataset, pixels: torch.Tensor, placement: str) -> None:
    order = Order(opened.shard_sizes, 5)
    device = torch.device("cuda", 0)
    with Stream(opened, order, position=3, global_batch=8, device=device, placement=placement) as stream:
        for step in range(4 * RING):
            begin = 3 + 8 * step
            assert torch.equal(stream.next().cpu(), pixels[order.indices(begin, begin + 8)])


def test_waiting_is_what_the_reader_waited_and_no_more(opened: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only this test moves: a second for each step, and one for each batch that is waited for."""
    now, readings, asked_for, into = 0.0, itertools.count(), threading.Semaphore(0), Gather.into

    def clock() -> float:
        reading = now
        if next(readings) % 2 == 0:  # of the two readings around a wait the first
            asked_for.release()
        return reading

    def slowly(self: Gather, out: torch.Tensor, samples: np.ndarray) -> torch.Tensor:
        nonlocal now
        asked_for.acquire()
        now += 1
        return into(self, out, samples)

    def wait_of_ten_steps(stream: Stream) -> float:
        nonlocal now
        for _ in range(10):
            stream.next()
            now += 1
        return stream.wait_seconds

    monkeypatch.setattr("gan_dist.data.stream.time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr("gan_dist.data.stream.BLOCK_BYTES", 1)
    order = Order(opened.shard_sizes, 1)
    with Stream(opened, order, position=0, global_batch=4, device=CPU) as stream:
        assert wait_of_ten_steps(stream) == 0
    asked_for = threading.Semaphore(0)
    monkeypatch.setattr(Gather, "into", slowly)
    with Stream(opened, order, position=0, global_batch=4, device=CPU) as stream:
        try:
            assert wait_of_ten_steps(stream) == 10
        finally:
            asked_for.release(RING)  # whoever gathers ahead may go home


@pytest.mark.gpu
def test_a_gpu_that_is_busy_does_not_wait_though_the_host_does(
    opened: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = Gather.into

    def slowly(self: Gather, out: torch.Tensor, samples: np.ndarray) -> torch.Tensor:
        time.sleep(0.03)
        return into(self, out, samples)

    monkeypatch.setattr("gan_dist.data.stream.BLOCK_BYTES", 1)
    monkeypatch.setattr(Gather, "into", slowly)
    order, device = Order(opened.shard_sizes, 1), torch.device("cuda", 0)
    waited = {}
    for busy in (True, False):
        with Stream(opened, order, position=0, global_batch=4, device=device, placement="memory") as stream:
            stream.await_first()
            for _ in range(10):
                stream.next()
                if busy:
                    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # clock cycles: some 0.1 s
            torch.cuda.synchronize()
            waited[busy] = stream.wait_seconds
    assert waited[True] < 0.5 * waited[False], waited
