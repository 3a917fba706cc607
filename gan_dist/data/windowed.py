"""Only the shards of the current window and of the next one at hand: fetched ahead of need, let go behind it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gan_dist.data.dataset import Dataset
from gan_dist.data.order import Order
from gan_dist.data.remote.cache import FETCHERS, in_parallel


@dataclass
class _Window:
    """The positions [begin, end) and the shards they lie in, on their way here."""

    begin: int
    end: int
    shards: list[int]
    failure: list[BaseException] = field(default_factory=list)
    thread: threading.Thread | None = None

    def fetch(self, dataset: Dataset, cancelled: Callable[[], bool]) -> None:
        """Starts to bring the shards here."""

        def work() -> None:
            try:
                in_parallel(dataset.warm, self.shards, FETCHERS, cancelled)
            except BaseException as error:  # handed over: raised where the shards are needed
                self.failure.append(error)

        self.thread = threading.Thread(target=work, name="window", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Returns when the shards are here. Raises what kept one of them away."""
        assert self.thread is not None
        self.thread.join()
        if self.failure:
            raise self.failure.pop()  # kept here, it would keep the frames that it went through, and their maps


class Windows:
    """Walks through an order's windows from `position` on.

    At most two windows are here at once, however long it runs: 2 K shards (a batch larger than a window needs those
    that it spans). Ranks of one machine share the files and are a few batches apart, so for moments it is 3 K.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        position: int,
        *,
        cancelled: Callable[[], bool],
        leave: Callable[[int], None],
    ) -> None:
        """`leave(shard)` is called when a shard is about to go: nobody may look at it any more."""
        self._dataset, self._cancelled, self._leave = dataset, cancelled, leave
        self._to_come = _windows_from(order, position)
        self._here: deque[_Window] = deque()

    def reach(self, start: int, stop: int) -> None:
        """Returns when all samples at positions [start, stop) are here; positions only ever grow."""
        first = not self._here
        while self._here and self._here[0].end <= start:
            self._let_go(self._here.popleft())
        while not self._here or self._here[-1].end < stop:
            self._begin(next(self._to_come))
        for window in self._here:
            if window.begin < stop:
                window.wait()
        if len(self._here) == 1:
            ahead = next(self._to_come)
            if first and self._dataset.cache is not None:
                self._dataset.cache.tidy(ahead.shards)
            self._begin(ahead)

    def close(self) -> None:
        """Returns when nothing is fetched any more; call the work off first. Files stay for whoever comes next."""
        for window in self._here:
            if window.thread is not None:
                window.thread.join()

    def _begin(self, window: _Window) -> None:
        window.fetch(self._dataset, self._cancelled)
        self._here.append(window)

    def _let_go(self, window: _Window) -> None:
        still = {shard for other in self._here for shard in other.shards}
        for shard in window.shards:
            if shard not in still:
                self._leave(shard)
                self._dataset.drop(shard)


def _windows_from(order: Order, position: int) -> Iterator[_Window]:
    """Yields the windows from the one that holds `position` on, through all epochs to come."""
    epoch = position // order.num_samples
    end = epoch * order.num_samples
    while True:
        for shards in order.windows(epoch):
            begin, end = end, end + sum(order.shard_sizes[shard] for shard in shards)
            if end > position:
                yield _Window(begin, end, shards)
        epoch += 1
