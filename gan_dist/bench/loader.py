"""How fast this machine can feed training: `gan-dist bench loader`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from operator import truediv
from time import perf_counter
from typing import Any

import torch

from gan_dist.data.dataset import Dataset
from gan_dist.data.order import Order
from gan_dist.data.placement import choose_placement
from gan_dist.data.stream import RING, Stream
from gan_dist.utils.files import read_through

SOURCE_BYTES = 2**28
"""Bytes that memcpy copies from: far more than the caches hold."""


def bench_loader(
    dataset: Dataset,
    *,
    batch: int = 128,
    window_shards: int = 4,
    seconds: float = 1.0,
    rounds: int = 3,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Returns images/s of a dataset in random order, by placement, beside this machine's limits.

    `images_per_second`: of the placement that `auto` takes, warm. `placements`: each in warm memory, after an epoch has
    touched every page, except windowed, which reads every shard again. `memcpy`: whole batches copied from memory into
    as many reused buffers; `share_of_memcpy`: of the memory placement. `page_cache_read`: shards read from end to end
    from the page cache. `cold`: the same from the disk (`sequential_read`), and an epoch of the memory placement that
    starts with that read (`memory`); None where the page cache cannot be emptied. Medians of interleaved rounds of
    `seconds` each.
    """
    device = device or torch.device("cpu")
    placements = ["memory", "windowed", *(["device"] if device.type == "cuda" else [])]
    window = min(window_shards, len(dataset.shard_sizes))
    cold_read = _cold_read(dataset, seconds)
    for i in range(len(dataset.shard_sizes)):
        dataset.warm(i)
    rounds_of: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in placements:
            if name == "windowed":
                with Stream(
                    dataset, _order(dataset, window), position=0, global_batch=batch, device=device, placement=name
                ) as stream:
                    rounds_of.setdefault(name, []).append(_rate(stream, batch, seconds))
                for i in range(len(dataset.shard_sizes)):
                    dataset.warm(i)  # the windows have dropped them
                continue
            with Stream(
                dataset, _order(dataset), position=0, global_batch=batch, device=device, placement=name
            ) as stream:
                for _ in range(-(-dataset.num_samples // batch)):
                    stream.next()  # maps every page once
                rounds_of.setdefault(name, []).append(_rate(stream, batch, seconds))
        rounds_of.setdefault("memcpy", []).append(memcpy_rate(dataset.resolution, batch, seconds))
        rounds_of.setdefault("page_cache_read", []).append(_read_rate(dataset, seconds))
    rates = {name: round(statistics.median(values)) for name, values in rounds_of.items()}
    chosen = choose_placement("auto", dataset, device)
    return {
        "images_per_second": rates[chosen],
        "placement": chosen,
        "placements": {name: rates[name] for name in placements},
        "memcpy": rates["memcpy"],
        "page_cache_read": rates["page_cache_read"],
        "share_of_memcpy": round(statistics.median(map(truediv, rounds_of["memory"], rounds_of["memcpy"])), 3),
        "cold": {
            "sequential_read": cold_read and round(cold_read),
            "memory": cold_read and round(1 / (1 / cold_read + 1 / rates["memory"])),
        },
        "batch": batch,
        "window_shards": window,
        "resolution": dataset.resolution,
        "images": dataset.num_samples,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _order(dataset: Dataset, window_shards: int = 0) -> Order:
    return Order(dataset.shard_sizes, 0, window_shards)


def _timed(
    work: Callable[[], int],
    seconds: float,
    device: torch.device | None = None,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Returns items a second of `work`, which returns the number of items of each call."""
    done, began = 0, clock()
    while (now := clock() - began) < seconds:
        done += work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        now = clock() - began
    return done / now


def _rate(stream: Stream, batch: int, seconds: float) -> float:
    for _ in range(16 * RING):
        last = stream.next()  # batches gathered before the clock starts do not count
    return _timed(lambda: len(stream.next()), seconds, last.device)


def memcpy_rate(resolution: int, batch: int, seconds: float, clock: Callable[[], float] = perf_counter) -> float:
    """Returns images/s of plain copies: consecutive batches, from memory into as many buffers as a stream has."""
    pixels = 3 * resolution**2
    count = max(1, SOURCE_BYTES // (batch * pixels))
    source = torch.ones(count, batch, pixels, dtype=torch.uint8)
    ring = torch.empty(RING, batch, pixels, dtype=torch.uint8)
    turn = 0

    def copy() -> int:
        nonlocal turn
        ring[turn % RING].copy_(source[turn % count])
        turn += 1
        return batch

    return _timed(copy, seconds, clock=clock)


def _read_rate(dataset: Dataset, seconds: float) -> float:
    """Returns images/s of reading shards from end to end, one after another, for about `seconds`."""
    turn = 0

    def read() -> int:
        nonlocal turn
        shard = dataset.manifest.shards[turn % len(dataset.manifest.shards)]
        turn += 1
        read_through(dataset.root / shard.file)
        return shard.samples

    return _timed(read, seconds)


def _cold_read(dataset: Dataset, seconds: float) -> float | None:
    """Returns images/s of reading shards from the disk, each once, or None where the page cache cannot be emptied."""
    if not hasattr(os, "posix_fadvise"):
        return None
    for i in range(len(dataset.shard_sizes)):
        dataset.drop(i)
    began, done = perf_counter(), 0
    for shard in dataset.manifest.shards:
        read_through(dataset.root / shard.file)
        done += shard.samples
        if perf_counter() - began > seconds:
            break
    return done / (perf_counter() - began)
