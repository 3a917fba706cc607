"""Windows: the same order, with no more than two windows of shards on the disk and in memory at any moment."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan_dist.data.classes import Classes, Labels
from gan_dist.data.dataset import Dataset, open_dataset, open_remote
from gan_dist.data.order import Order
from gan_dist.data.placement import choose_placement, stage
from gan_dist.data.remote.fetch import RetryPolicy
from gan_dist.data.shards import MANIFEST
from gan_dist.data.stream import RING, Resident, Stream
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.datasets import write_dataset
from tests.helpers.ranks import run_ranks
from tests.helpers.server import Server

CPU = torch.device("cpu")
SIZES = (6, 9, 5, 8, 7, 9, 4, 8, 6, 5)
LABELS = [(0, None, 1, 2, 2)[i % 5] if i else 2 for i in range(sum(SIZES))]
CLASSES = Classes(("b", "a"))
CLASS_OF = torch.tensor([{None: 0, 0: 0, 1: 2, 2: 1}[label] for label in LABELS])
"""Labels are matched by name, and `rare` is no class."""
HASTY = RetryPolicy(tries=2, backoff_s=0.02, stall_s=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "set"
    write_dataset(folder, SIZES, labels=LABELS, classes=("rare", "a", "b"))
    return folder


@pytest.fixture(scope="module")
def pixels(source: Path) -> torch.Tensor:
    with open_dataset(source) as dataset:
        return torch.cat([dataset.shard_view(i).clone() for i in range(len(SIZES))])


@contextmanager
def streaming(dataset: Dataset, order: Order, **kwargs: int) -> Iterator[Stream]:
    settings: dict[str, Any] = {"position": 0, "global_batch": 4, **kwargs}
    with Stream(dataset, order, device=CPU, placement="windowed", **settings) as stream:
        yield stream


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    remote=st.booleans(),
    labelled=st.booleans(),
    window=st.integers(1, 12),
    batch=st.integers(1, 40),
    world=st.integers(1, 3),
    position=st.integers(0, 300),
    seed=st.integers(0, 2**40),
    steps=st.integers(1, 12),
)
def test_windows_keep_the_order_from_any_position(
    source: Path,
    pixels: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
    remote: bool,
    labelled: bool,
    window: int,
    batch: int,
    world: int,
    position: int,
    seed: int,
    steps: int,
) -> None:
    world = min(world, batch)
    order = Order(SIZES, seed, window)
    cache = tmp_path_factory.mktemp("cache")
    datasets = [
        open_remote(source.as_uri(), cache, window_shards=window) if remote else open_dataset(source)
        for _ in range(world)
    ]
    streams = [
        Stream(datasets[rank], order, position=position, global_batch=batch, rank=rank, size=world, device=CPU,
               placement="windowed", labels=Labels(datasets[rank], CLASSES) if labelled else None)
        for rank in range(world)
    ]  # fmt: skip
    try:
        for step in range(steps):
            begin = position + step * batch
            assert torch.equal(torch.cat([s.next() for s in streams]), pixels[order.indices(begin, begin + batch)])
            classes = [s.classes for s in streams if s.classes is not None]
            assert len(classes) == labelled * world
            assert not classes or torch.equal(torch.cat(classes), CLASS_OF[order.indices(begin, begin + batch)])
    finally:
        for stream, dataset in zip(streams, datasets, strict=True):
            stream.close()
            dataset.close()


def mapped_shards(root: Path) -> int:
    """Returns how many of a folder's shards this process has mapped into its memory."""
    return len(set(re.findall(rf"{re.escape(str(root))}/shard-\d+\.tar", Path("/proc/self/maps").read_text())))


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("remote", [True, False])
def test_disk_and_memory_stay_within_two_windows(
    source: Path, pixels: torch.Tensor, tmp_path: Path, remote: bool, window: int
) -> None:
    order, cache = Order(SIZES, 7, window), tmp_path / "cache"
    if remote:
        dataset = open_remote(source.as_uri(), cache, window_shards=window)
    else:  # a copy, of which no earlier test has anything mapped
        dataset = open_dataset(shutil.copytree(source, tmp_path / "own"))
    most_mapped, most_there, seen = 0, 0, []
    with dataset, streaming(dataset, order, global_batch=3) as stream:
        for step in range(2 * sum(SIZES) // 3 + RING):
            seen.append(stream.next().clone())
            most_mapped = max(most_mapped, mapped_shards(dataset.root))
            there = [path for path in cache.rglob("shard-*") if path.suffix in (".tar", ".tmp")]
            most_there = max(most_there, len({path.name.split(".")[0] for path in there}))
            if step % 5 == 0:
                time.sleep(0.01)  # let what is ahead get ahead
    assert torch.equal(torch.cat(seen), pixels[order.indices(0, 3 * len(seen))])
    assert 0 < most_mapped <= 2 * window
    assert most_there <= 2 * window and (most_there > 0) == remote


def test_ranks_of_a_machine_share_windows_and_fetch_once_an_epoch(
    source: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    """Two ranks in lockstep hold at most three windows between them, and together fetch each shard once an epoch."""
    order, window = Order(SIZES, 7, 2), 2
    with Server(source) as server:
        datasets = [open_remote(server.address, tmp_path, window_shards=window) for _ in range(2)]
        with (
            streaming(datasets[0], order, rank=0, size=2) as first,
            streaming(datasets[1], order, rank=1, size=2) as second,
        ):
            for step in range(sum(SIZES) // 4):
                together = torch.cat([first.next(), second.next()])
                assert torch.equal(together, pixels[order.indices(4 * step, 4 * step + 4)])
                assert len(list(tmp_path.rglob("shard-*.tar"))) <= 3 * window
            # Once for all ranks; a second time only where the next epoch, of which two windows may be here, wants it.
            assert sum(server.requests[f"shard-{i:05d}.tar"] for i in range(10)) <= 10 + 2 * window
        for dataset in datasets:
            dataset.close()


def test_training_starts_when_the_first_window_is_there(source: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    order = Order(SIZES, 3, 2)
    first = {f"shard-{i:05d}.tar" for i in order.windows(0)[0]}
    count = sum(SIZES[i] for i in order.windows(0)[0])
    with (
        Server(source, lambda name, nth: None if name in first | {MANIFEST} else "stall") as server,
        open_remote(server.address, tmp_path, window_shards=2, retry=RetryPolicy(1, 0, 3600)) as dataset,
    ):
        with streaming(dataset, order, global_batch=1) as stream:
            stream.await_first()
            for position in range(count):
                assert torch.equal(stream.next(), pixels[order.indices(position, position + 1)])
        # Closing has waited for no server: nobody would have lived to see it.
        assert set(server.requests) > first


def test_a_shard_that_cannot_be_had_ends_the_stream_with_its_name(source: Path, tmp_path: Path) -> None:
    order = Order(SIZES, 3, 1)
    lost = f"shard-{order.windows(0)[4][0]:05d}.tar"
    with (
        Server(source, lambda name, nth: "corrupt" if name == lost else None) as server,
        open_remote(server.address, tmp_path, window_shards=1, retry=HASTY) as dataset,
        streaming(dataset, order) as stream,
        pytest.raises(UserError, match=f"{lost} differs from its sha256"),
    ):
        for _ in range(sum(SIZES)):
            stream.next()


def test_what_a_killed_job_left_is_taken_away(source: Path, tmp_path: Path) -> None:
    order = Order(SIZES, 3, 1)
    with open_remote(source.as_uri(), tmp_path, window_shards=1) as dataset:
        for i in range(10):
            dataset.shard_view(i)
        assert len(list(tmp_path.rglob("shard-*.tar"))) == 10
    with open_remote(source.as_uri(), tmp_path, window_shards=1) as dataset, streaming(dataset, order) as stream:
        stream.next()
        while len(list(tmp_path.rglob("shard-*.tar"))) > 2:
            time.sleep(0.02)


def test_placements_are_chosen_by_where_the_set_is_and_what_fits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dataset(source) as dataset:
        assert choose_placement("auto", dataset, CPU, 0) == choose_placement("auto", dataset, CPU, 3) == "memory"
        assert choose_placement("windowed", dataset, CPU, 3) == "windowed"
        with pytest.raises(UserError, match=r"needs data\.window_shards"):
            choose_placement("windowed", dataset, CPU, 0)
        monkeypatch.setattr("gan_dist.data.placement.available_memory", lambda: 100_000)
        assert choose_placement("auto", dataset, CPU, 3) == "windowed"
        assert choose_placement("auto", dataset, CPU, 0) == "memory"
    with open_remote(source.as_uri(), tmp_path, window_shards=2) as dataset:
        assert choose_placement("auto", dataset, CPU, 2) == "windowed"
    with open_remote(source.as_uri(), tmp_path) as dataset:
        assert choose_placement("memory", dataset, CPU, 2) == "memory"


def test_the_resident_set_gives_the_same_batches(source: Path, pixels: torch.Tensor) -> None:
    order = Order(SIZES, 5, 2)
    with open_dataset(source) as dataset:
        resident, labelled = Resident(dataset, order, CPU), Resident(dataset, order, CPU, Labels(dataset, CLASSES))
    for start, stop in [(start, start + 11) for start in range(0, 300, 11)] + [(3, 400)]:
        places = order.indices(start, stop)
        images, classes = resident.batch(start, stop)
        assert torch.equal(images, pixels[places]) and classes is None
        images, classes = labelled.batch(start, stop)
        assert torch.equal(images, pixels[places]) and classes is not None and torch.equal(classes, CLASS_OF[places])


def test_a_damaged_header_is_found_before_training(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening looks at the first and last header of a shard; reading it from end to end, at all."""
    import shutil

    shutil.copytree(source, tmp_path / "set")
    path = tmp_path / "set/shard-00004.tar"
    stride = open_dataset(source).manifest.shards[4].stride
    for offset in (3, 124, 150, 257, 512 + 8, 512 + 60):
        content = bytearray((source / path.name).read_bytes())
        content[2 * stride + offset] ^= 4
        path.write_bytes(content)
        with open_dataset(tmp_path / "set") as dataset, pytest.raises(UserError, match=r"00004\.tar .* at sample 2"):
            stage(dataset, "memory")
    calls: list[tuple[str, int, int]] = []
    with open_dataset(source) as dataset:
        assert stage(dataset, "memory", progress=lambda *words: calls.append(words)) is None
        assert calls[-1][0] == "reading" and calls[-1][1] == calls[-1][2] > 0
        monkeypatch.setattr("gan_dist.data.placement.available_memory", lambda: 100_000)
        warning = stage(dataset, "memory")
        assert warning is not None and "data.window_shards" in warning


def _train_on_rank(rank: int, size: int, address: str, cache: str, expected: str, window: int) -> None:
    placement = "windowed" if window else "memory"
    with (
        open_remote(address, cache, window_shards=window, retry=RetryPolicy(6, 0.05, 1)) as dataset,
        open_dataset(expected) as here,
    ):
        stage(dataset, placement)
        order = Order(dataset.shard_sizes, 11, window)
        place: dict[str, Any] = {"position": 5, "global_batch": 8}
        with (
            Stream(dataset, order, **place, rank=rank, size=size, device=CPU, placement=placement) as far,
            Stream(here, order, **place, rank=rank, size=size, device=CPU, placement="memory") as near,
        ):
            for _ in range(25):
                assert torch.equal(far.next(), near.next())


@pytest.mark.chaos
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_see_the_local_order_through_a_server_that_fails(
    source: Path, tmp_path: Path, size: int, window: int
) -> None:
    faults = ("cut", "stall", "500", "short", "corrupt", "cut_chunked", "drip")
    plan = {f"shard-{i:05d}.tar": faults[(i + size) % len(faults)] for i in range(10)}
    with Server(source, lambda name, nth: plan.get(name) if nth == 0 else None) as server:
        run_ranks(size, _train_on_rank, size, server.address, str(tmp_path), str(source), window)
        if not window:
            assert {server.requests[name] for name in plan} == {2}, "once for the fault, once for all ranks"


def test_abandoned_reads_do_not_leave_threads(source: Path, tmp_path: Path) -> None:
    def threads() -> set[str]:
        """Returns those of this process but the server's, which may still answer."""
        return {thread.name for thread in threading.enumerate() if "process_request_thread" not in thread.name}

    before = threads()
    with (
        Server(source) as server,
        open_remote(server.address, tmp_path, window_shards=1, retry=HASTY) as dataset,
        pytest.raises(GanDistError),
    ):
        server.fault = lambda name, nth: "500"
        dataset.warm(0)
    assert threads() <= before
