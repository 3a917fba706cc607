"""Dataset and order -> uint8 batches on the device, gathered ahead by one thread into reused buffers; where they are
asked for, the classes of their images as well.

Samples wait in one of three placements: `device`, the whole set in GPU memory; `memory`, the mapped shards; `windowed`,
only the shards that the order uses now and next, fetched ahead of need and dropped afterwards.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from gan_dist.data.classes import Labels
from gan_dist.data.dataset import Dataset, Gather
from gan_dist.data.order import Order, rank_slice
from gan_dist.data.windows import Windows
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled

RING = 2
"""Blocks in flight: one in use, one being filled. Three are 15 % slower on one core: they no longer fit its caches."""
WAIT_S = 1.0
BLOCK_BYTES = 2**22
"""Small batches are gathered several at once, up to this size: handing a batch from thread to thread costs as much as
copying 20 images (measured at 64x64). A block larger than the processor's caches would be slower again."""


class Resident:
    """The whole set and each epoch's permutation in device memory: a batch is one gather there."""

    def __init__(self, dataset: Dataset, order: Order, device: torch.device, labels: Labels | None = None) -> None:
        self._order, self._device, size = order, device, dataset.resolution
        self._samples = torch.empty(dataset.num_samples, 3, size, size, dtype=torch.uint8, device=device)
        done = 0
        for i, count in enumerate(dataset.shard_sizes):
            self._samples[done : done + count].copy_(dataset.shard_view(i))
            done += count
        self._classes: torch.Tensor | None = None
        if labels is not None:
            self._classes = torch.from_numpy(labels.of(np.arange(dataset.num_samples))).to(device)
        self._permutation = lru_cache(maxsize=2)(self._upload)

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the samples at positions [start, stop), uint8 [stop - start, 3, S, S], and (if asked) classes."""
        parts, num = [], self._order.num_samples
        while start < stop:
            epoch, place = divmod(start, num)
            end = min(stop - start + place, num)
            parts.append(self._permutation(epoch)[place:end])
            start += end - place
        places = torch.cat(parts) if len(parts) > 1 else parts[0]
        classes = None if self._classes is None else torch.index_select(self._classes, 0, places)
        return torch.index_select(self._samples, 0, places), classes

    def _upload(self, epoch: int) -> torch.Tensor:
        num = self._order.num_samples
        # The next epoch's is computed beside training: some 10 ms that training would else wait for at the epoch's end.
        threading.Thread(target=self._order.index, args=((epoch + 1) * num,), name="order", daemon=True).start()
        permutation = torch.from_numpy(self._order.indices(epoch * num, (epoch + 1) * num))
        if self._device.type == "cuda":
            permutation = permutation.pin_memory()  # the step does not wait for the copy
        return permutation.to(self._device, non_blocking=True)


@dataclass
class _Slot:
    """A block of batches: its buffers on host and device, of images and, where they are asked for, of their classes;
    and events: copied to the device, no longer in use there."""

    host: list[torch.Tensor]
    device: list[torch.Tensor]
    ready: Any = None
    used: Any = None

    def __post_init__(self) -> None:
        self.batches: list[tuple[torch.Tensor, ...]] = list(zip(*(each.unbind() for each in self.device), strict=True))


class Stream:
    """This rank's slice of each global batch in turn, from a position on. A context, which ends its thread."""

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
        placement: str = "memory",
        labels: Labels | None = None,
    ) -> None:
        """`position`: of the first batch; of every `global_batch` positions from there on, each rank gets its slice.

        `placement` is one that `choose_placement` has returned. With `labels`, `classes` are delivered, too.
        """
        self.position = position
        self.placement = placement
        self.while_waiting: Callable[[], None] = lambda: None
        """Called every second of a wait for samples. It may raise: where the device hangs, they never come."""
        self.classes: torch.Tensor | None = None
        """Those of the images that `next` returned last, int64 [hi - lo] on the device, valid as long as they are."""
        self._labels = labels
        self._dataset, self._order, self._batch, self._device = dataset, order, global_batch, device
        self._lo, self._hi = rank_slice(global_batch, rank, size)
        self._in_use: _Slot | None = None
        self._taken = 0
        self._waited = 0.0
        self._waits: deque[tuple[Any, Any]] = deque()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if self.placement == "device":
            self._resident = Resident(dataset, order, device, labels)
            return
        pinned = device.type == "cuda"
        images = self._hi - self._lo
        shape = (self._depth(images), images, 3, dataset.resolution, dataset.resolution)
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        buffers = [(shape, torch.uint8), *([] if labels is None else [(shape[:2], torch.int64)])]
        for _ in range(RING):
            host = [torch.empty(size, dtype=dtype, pin_memory=pinned) for size, dtype in buffers]
            self._free.put(_Slot(host, [torch.empty_like(one, device=device) for one in host] if pinned else host))
        self._began, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._prefetch, args=(position,), name="prefetch", daemon=True)
        self._thread.start()

    def _depth(self, images: int) -> int:
        """Returns the batches of a block; one with windows, where a block should not span many."""
        size = 3 * self._dataset.resolution**2 * images
        return 1 if self.placement == "windowed" else max(1, BLOCK_BYTES // size)

    def next(self) -> torch.Tensor:
        """Returns the slice at `position`, uint8 [hi - lo, 3, S, S] on the device, and moves on by a global batch.

        It is valid until the following call. Raises the error that stopped the prefetching thread, if one did.
        """
        begin = self.position
        self.position += self._batch
        if self.placement == "device":
            images, self.classes = self._resident.batch(begin + self._lo, begin + self._hi)
            return images
        if self._in_use is None or self._taken == len(self._in_use.batches):
            self._in_use, self._taken = self._next_block(), 0
        images, *classes = self._in_use.batches[self._taken]
        self.classes = classes[0] if classes else None
        self._taken += 1
        return images

    def _next_block(self) -> _Slot:
        """Returns the next block of batches, having released the last one."""
        self._release()
        asked = self._event() if self._device.type == "cuda" else None
        started = time.perf_counter()
        slot = self._await_block()
        if isinstance(slot, BaseException):
            self._full.put(slot)
            raise slot
        if asked is None:
            self._waited += time.perf_counter() - started
        else:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)
            self._waits.append((asked, self._event()))
            self._settle()
        return slot

    def _await_block(self) -> _Slot | BaseException:
        while True:
            try:
                return self._full.get(timeout=WAIT_S)
            except queue.Empty:
                self.while_waiting()

    @property
    def wait_seconds(self) -> float:
        """Seconds that the device has waited for data, in all.

        A GPU runs behind the host. So its wait is measured on its own clock: from the end of the work that was queued
        when the batch was asked for, to the batch's arrival. That the host waited says nothing.
        """
        self._settle()
        return self._waited

    def _event(self) -> Any:
        timed: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return torch.cuda.current_stream(self._device).record_event(timed)

    def _settle(self) -> None:
        while self._waits and self._waits[0][1].query():
            asked, arrived = self._waits.popleft()
            self._waited += asked.elapsed_time(arrived) / 1000

    def await_first(self, cancelled: Callable[[], bool] = never_cancelled) -> None:
        """Returns when the first batch is ready, however long its window takes. Raises the error that prevents it."""
        while self._thread is not None and not self._began.wait(0.05):
            raise_if_cancelled(cancelled)
        if self._failure is not None:
            raise self._failure

    def _release(self) -> None:
        """Returns the block in use to the prefetching thread, which waits until the device has read it."""
        if self._in_use is not None:
            if self._device.type == "cuda":
                self._in_use.used = torch.cuda.current_stream(self._device).record_event()
            self._free.put(self._in_use)
            self._in_use = None

    def _prefetch(self, position: int) -> None:
        windows = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread's is GPU 0, where it would open a context
            collect = Gather(self._dataset)
            if self.placement == "windowed":
                windows = Windows(
                    self._dataset,
                    self._order,
                    position,
                    cancelled=self._closing.is_set,
                    leave=collect.forget,
                    labels=self._labels,
                )
            side: Any = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
            while (slot := self._free.get()) is not None:
                # a free block whose host buffer is not being copied any more
                if slot.ready is not None:
                    slot.ready.synchronize()  # until the last copy out of this host buffer is done
                end = position + len(slot.batches) * self._batch
                if windows is not None:
                    windows.reach(position, end)
                # this rank's samples of the next batches, into host memory
                samples = self._order.indices(position, end).reshape(-1, self._batch)[:, self._lo : self._hi].ravel()
                collect.into(slot.host[0].flatten(0, 1), samples)
                if self._labels is not None:
                    slot.host[1].view(-1).numpy()[:] = self._labels.of(samples)
                # and to the device, beside its work
                if side is not None:
                    with torch.cuda.stream(side):
                        if slot.used is not None:
                            side.wait_event(slot.used)
                        for there, here in zip(slot.device, slot.host, strict=True):
                            there.copy_(here, non_blocking=True)
                        slot.ready = side.record_event()
                self._full.put(slot)
                self._began.set()
                position = end
        except BaseException as error:  # raised in the training thread
            if not self._closing.is_set():  # else it only marks the end, and would keep the maps alive
                self._failure = error
                self._full.put(error)
                self._began.set()
        finally:
            if windows is not None:
                self._closing.set()
                windows.close()

    def close(self) -> None:
        """Ends the prefetching thread. Batches already returned stay valid."""
        if self._thread is not None:
            self._closing.set()
            self._free.put(None)
            while self._thread.is_alive():
                self._thread.join(timeout=0.1)
                self._free.put(None)
            self._thread = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
