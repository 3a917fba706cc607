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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from gan_dist.data.classes import Labels
from gan_dist.data.dataset import Dataset, Gather
from gan_dist.data.order import Order, rank_slice
from gan_dist.data.remote.cache import FETCHERS, in_parallel
from gan_dist.utils.errors import UserError
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled
from gan_dist.utils.system import available_memory

RING = 2
"""Blocks in flight: one in use, one being filled. Three are 15 % slower on one core: they no longer fit its caches."""
WAIT_S = 1.0
BLOCK_BYTES = 2**22
"""Small batches are gathered several at once, up to this size: handing a batch from thread to thread costs as much as
copying 20 images (measured at 64x64). A block larger than the processor's caches would be slower again."""
DEVICE_SHARE = 0.25
"""Share of a GPU's free memory that the dataset may take; the networks and the caching allocator need the rest."""
HOST_SHARE = 0.5
"""Share of the available memory that a dataset may fill as page cache before `auto` prefers windows."""


def choose_placement(placement: str, dataset: Dataset, device: torch.device, window_shards: int = 0) -> str:
    """Returns the placement that `placement` (data.placement) means here.

    `auto` is `device` when the set fits into its share of a GPU's memory, else `windowed` when there are windows and
    the set is remote or larger than memory, else `memory`.

    Raises:
        UserError: the placement is impossible here.
    """
    size = dataset.num_samples * 3 * dataset.resolution**2
    if placement == "windowed" and not window_shards:
        raise UserError("data.placement=windowed needs data.window_shards of 1 or more, which is part of a run's order")
    if placement == "device" and device.type != "cuda":
        raise UserError("data.placement=device keeps the set in GPU memory, but training is on the CPU; use memory")
    if placement == "windowed" or (dataset.cache is not None and dataset.cache.windowed):
        return "windowed"
    if placement in ("device", "auto") and device.type == "cuda":
        room = DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        if size <= room:
            return "device"
        if placement == "device":
            raise UserError(
                f"data.placement=device needs {size / 2**30:.1f} GiB of GPU memory, a quarter of what is free is "
                f"{room / 2**30:.1f} GiB; use data.placement=memory"
            )
    if placement == "auto" and window_shards and size > HOST_SHARE * available_memory():
        return "windowed"
    return "memory"


def stage(
    dataset: Dataset,
    placement: str,
    *,
    first: bool = True,
    progress: Callable[[str, int, int], None] = lambda verb, done, total: None,
    cancelled: Callable[[], bool] = never_cancelled,
) -> str | None:
    """Returns a warning when the dataset is larger than memory, else None, having made it ready for random access.

    A remote one is fetched to this machine. Then the `first` rank of each machine reads it once from end to end, unless
    that is cancelled. With windows nothing is done: each is made ready in its turn. `progress` is called with what is
    done (staging or reading), the bytes done and the bytes in all.

    Raises:
        UserError: a shard is damaged.
    """
    if placement == "windowed":
        return None
    if dataset.cache is not None:
        dataset.cache.fetch_all(lambda done, total: progress("staging", done, total), cancelled)
    total = sum(shard.bytes for shard in dataset.manifest.shards)
    done = 0
    if total > (memory := available_memory()):  # its end would displace its beginning: nothing would be warm
        return (
            f"the samples take {total / 2**30:.1f} GiB, and {memory / 2**30:.1f} GiB of memory are available: reads "
            "will wait for the disk; a new run with data.window_shards reads ahead instead"
        )
    for i, shard in enumerate(dataset.manifest.shards if first else ()):
        if cancelled():
            break
        dataset.warm(i, cancelled)
        done += shard.bytes
        progress("reading", done, total)
    return None


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


Ready = Callable[[int, Callable[[], bool]], None]
"""Makes a shard ready for random access, unless that is cancelled."""


@dataclass
class _Window:
    """The positions [begin, end) and their shards, which a thread makes ready."""

    begin: int
    end: int
    shards: list[int]
    failure: list[BaseException] = field(default_factory=list)
    thread: threading.Thread | None = None

    def fetch(self, ready: Ready, cancelled: Callable[[], bool]) -> None:
        """Starts to make the shards ready."""

        def work() -> None:
            try:
                in_parallel(ready, self.shards, FETCHERS, cancelled)
            except BaseException as error:  # raised by wait()
                self.failure.append(error)

        self.thread = threading.Thread(target=work, name="window", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Returns when the shards are ready. Raises the error that prevented it."""
        assert self.thread is not None
        self.thread.join()
        if self.failure:
            raise self.failure.pop()  # a stored error would keep alive its frames and their maps


class Windows:
    """Makes the windows of an order ready one after another, from `position` on.

    At most two windows are present at a time, 2 K shards (a batch larger than a window needs all that it spans). Ranks
    of one machine share the files and are a few batches apart, so that for moments there are 3 K.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        position: int,
        *,
        cancelled: Callable[[], bool],
        leave: Callable[[int], None],
        labels: Labels | None = None,
    ) -> None:
        """`leave(shard)` is called before a shard is dropped, which may not be read afterwards. `labels` are loaded
        ahead of need, too."""
        self._dataset, self._cancelled, self._leave, self._labels = dataset, cancelled, leave, labels
        self._to_come = _windows_from(order, position)
        self._present: deque[_Window] = deque()

    def reach(self, start: int, stop: int) -> None:
        """Returns when all samples at positions [start, stop) are ready; from call to call both only grow."""
        first = not self._present
        while self._present and self._present[0].end <= start:
            self._drop(self._present.popleft())
        while not self._present or self._present[-1].end < stop:
            self._begin(next(self._to_come))
        for window in self._present:
            if window.begin < stop:
                window.wait()
        if len(self._present) == 1:
            ahead = next(self._to_come)
            if first and self._dataset.cache is not None:
                self._dataset.cache.tidy(ahead.shards)
            self._begin(ahead)

    def close(self) -> None:
        """Returns when no thread fetches any more; cancel the work first. The files stay for the next process."""
        for window in self._present:
            if window.thread is not None:
                window.thread.join()

    def _ready(self, shard: int, cancelled: Callable[[], bool]) -> None:
        self._dataset.warm(shard, cancelled)
        if self._labels is not None:
            self._labels.load(shard)

    def _begin(self, window: _Window) -> None:
        window.fetch(self._ready, self._cancelled)
        self._present.append(window)

    def _drop(self, window: _Window) -> None:
        still_used = {shard for other in self._present for shard in other.shards}
        for shard in window.shards:
            if shard not in still_used:
                self._leave(shard)
                self._dataset.drop(shard)


def _windows_from(order: Order, position: int) -> Iterator[_Window]:
    """Yields the windows of this epoch and all that follow, from the one that contains `position` on."""
    epoch = position // order.num_samples
    end = epoch * order.num_samples
    while True:
        for shards in order.windows(epoch):
            begin, end = end, end + sum(order.shard_sizes[shard] for shard in shards)
            if end > position:
                yield _Window(begin, end, shards)
        epoch += 1


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
