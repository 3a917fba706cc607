"""The shards that an order uses now and next: fetched ahead of need, and dropped afterwards."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gan_dist.data.classes import Labels
from gan_dist.data.dataset import Dataset
from gan_dist.data.order import Order
from gan_dist.data.remote.cache import FETCHERS, in_parallel

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
