"""Manifest + order -> batches on the device: one thread prefetches into reused buffers. Ships uint8, never floats."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gan_dist.data.order import Order, rank_slice
from gan_dist.data.shards import Dataset
from gan_dist.errors import UserError

RING = 4
"""Batches in flight: one in use, the rest ahead. Fewer stalls on uneven disks, more only costs memory."""
DEVICE_SHARE = 0.25
"""Share of a GPU's free memory that the dataset may take; the rest is the networks' and the caching allocator's."""


class Gather:
    """Copies samples by number out of the mapped shards into one batch, in the order asked for."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._starts = np.concatenate([[0], np.cumsum(dataset.shard_sizes)])
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def into(self, out: torch.Tensor, samples: NDArray[np.int64]) -> torch.Tensor:
        """Returns `out` (uint8 [n, 3, S, S]), filled with `samples` (int64 [n]) in their order."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        within = samples - self._starts[shards]
        if shards.min() == shards.max():
            return torch.index_select(self._dataset.shard_view(int(shards[0])), 0, torch.from_numpy(within), out=out)
        # One gather a shard, then one more that puts the batch into order: far cheaper than a copy a sample.
        by_shard = np.argsort(shards, kind="stable")
        if self._scratch.shape != out.shape:
            self._scratch = torch.empty_like(out)
        rows, done = torch.from_numpy(within[by_shard]), 0
        for shard, count in zip(*np.unique(shards, return_counts=True), strict=True):
            part = slice(done, done + int(count))
            torch.index_select(self._dataset.shard_view(int(shard)), 0, rows[part], out=self._scratch[part])
            done = part.stop
        back = np.empty_like(by_shard)
        back[by_shard] = np.arange(len(back))
        return torch.index_select(self._scratch, 0, torch.from_numpy(back), out=out)


def gather(dataset: Dataset, samples: NDArray[np.int64]) -> torch.Tensor:
    """Returns the samples of those numbers (int64 [n]) as uint8 [n, 3, S, S] on the host."""
    out = torch.empty(len(samples), 3, dataset.resolution, dataset.resolution, dtype=torch.uint8)
    return Gather(dataset).into(out, samples) if len(samples) else out


def choose_placement(wanted: str, dataset: Dataset, device: torch.device) -> str:
    """Returns where samples wait: `device` when the set fits into its share of a GPU's memory, else `memory`.

    Raises UserError when `device` is asked for and cannot be had.
    """
    if device.type != "cuda":
        if wanted == "device":
            raise UserError("data.placement=device keeps the set in GPU memory, but training is on the CPU; use memory")
        return "memory"
    size = dataset.num_samples * 3 * dataset.resolution**2
    room = DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    if wanted == "device" and size > room:
        raise UserError(
            f"data.placement=device needs {size / 2**30:.1f} GiB of GPU memory, a quarter of what is free is "
            f"{room / 2**30:.1f} GiB; use data.placement=memory"
        )
    return "device" if wanted == "device" or (wanted == "auto" and size <= room) else "memory"


@dataclass
class _Slot:
    """One batch of the ring: where it is gathered, where the device sees it, and when each side is through with it."""

    host: torch.Tensor
    device: torch.Tensor
    ready: Any = None
    used: Any = None


class Stream:
    """This rank's slice of each global batch in turn, from a position on. A context that leaves no thread behind."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        position: int,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        device: torch.device,
        placement: str = "auto",
    ) -> None:
        """`position` is that of the first batch; each rank gets its slice of every `global_batch` positions."""
        self.position = position
        self.wait_seconds = 0.0
        """Seconds that `next` had to wait for data, in all."""
        self.placement = choose_placement(placement, dataset, device)
        self._dataset, self._order, self._batch, self._device = dataset, order, global_batch, device
        self._lo, self._hi = rank_slice(global_batch, rank, size)
        self._in_use: _Slot | None = None
        self._thread: threading.Thread | None = None
        if self.placement == "device":
            self._all = gather(dataset, np.arange(dataset.num_samples)).to(device)
            return
        pinned = device.type == "cuda"
        shape = (self._hi - self._lo, 3, dataset.resolution, dataset.resolution)
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        for _ in range(RING):
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
            self._free.put(_Slot(host, torch.empty(shape, dtype=torch.uint8, device=device) if pinned else host))
        self._thread = threading.Thread(target=self._prefetch, args=(position,), name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> torch.Tensor:
        """Returns the slice at `position`, uint8 [hi - lo, 3, S, S] on the device, and moves on by a global batch.

        It is valid until the following call. Raises what stopped the prefetching thread, if something did.
        """
        begin = self.position
        self.position += self._batch
        if self.placement == "device":
            samples = torch.from_numpy(self._order.indices(begin + self._lo, begin + self._hi))
            return torch.index_select(self._all, 0, samples.to(self._device, non_blocking=True))
        self._give_back()
        started = time.perf_counter()
        slot = self._full.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(slot, BaseException):
            self._full.put(slot)
            raise slot
        self._in_use = slot
        if slot.ready is not None:
            torch.cuda.current_stream().wait_event(slot.ready)
        return slot.device

    def _give_back(self) -> None:
        """Frees the batch of the last call for reuse, once the device is through with it."""
        if self._in_use is not None:
            if self._device.type == "cuda":
                self._in_use.used = torch.cuda.current_stream().record_event()
            self._free.put(self._in_use)
            self._in_use = None

    def _prefetch(self, position: int) -> None:
        try:
            collect = Gather(self._dataset)
            side: Any = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
            while (slot := self._free.get()) is not None:
                if slot.ready is not None:
                    slot.ready.synchronize()  # the last copy out of this host buffer
                collect.into(slot.host, self._order.indices(position + self._lo, position + self._hi))
                if side is not None:
                    with torch.cuda.stream(side):
                        if slot.used is not None:
                            side.wait_event(slot.used)
                        slot.device.copy_(slot.host, non_blocking=True)
                        slot.ready = side.record_event()
                self._full.put(slot)
                position += self._batch
        except BaseException as error:  # handed over: the training thread raises it
            self._full.put(error)

    def close(self) -> None:
        """Ends the prefetching thread. Batches already returned stay readable."""
        if self._thread is not None:
            self._free.put(None)
            while self._thread.is_alive():
                self._thread.join(timeout=0.1)
                self._free.put(None)
            self._thread = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
