"""Which sample is at which position of the training stream: a pure function of (dataset, seed, position).

World size, batch size, placement, prefetching and restarts do not enter. Epoch e is one permutation of all N samples.
Epochs follow one another without a gap, so batches may cross them and none is ever short. A batch is the next
`global_batch` positions, of which each rank takes its `rank_slice`; stream.py reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gan_dist.utils.errors import UserError


def check_ranks(ranks: int, global_batch: int) -> None:
    """Raises UserError unless a global batch has an image for each of `ranks`."""
    if ranks > global_batch:
        raise UserError(
            f"{ranks} ranks, but train.global_batch is {global_batch}: each rank needs an image; "
            "start fewer ranks or raise train.global_batch"
        )


def rank_slice(global_batch: int, rank: int, size: int) -> tuple[int, int]:
    """Returns [lo, hi), the slice of the global batch for `rank`; slices cover it and differ in size by at most one."""
    return rank * global_batch // size, (rank + 1) * global_batch // size


class Order:
    """The order of all samples of a dataset, numbered through its shards in manifest order.

    With `window_shards` K > 0, shards are permuted, and samples within each window of K consecutive shards: only one
    window of shards is in use at a time, and the next one is known. 0 permutes the whole set.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int = 0) -> None:
        self.shard_sizes = tuple(shard_sizes)
        self.num_samples = sum(self.shard_sizes)
        self.seed = seed
        self.window_shards = window_shards
        if self.num_samples < 1:
            raise ValueError("an order needs at least one sample")
        # A batch may cross into the next epoch: at most two permutations are needed at once.
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def index(self, position: int) -> int:
        """Returns the sample at `position` >= 0."""
        epoch, place = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[place])

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the samples at positions [start, stop), int64 [stop - start], across as many epochs as it takes."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.num_samples)
            end = min(stop - start + place, self.num_samples)
            parts.append(self._permutation(epoch)[place:end])
            start += end - place
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def windows(self, epoch: int) -> list[list[int]]:
        """Returns the shards of each window of `epoch`, in the order in which they are used."""
        shards = self._shard_order(epoch)
        width = self.window_shards or len(shards)
        return [shards[i : i + width].tolist() for i in range(0, len(shards), width)]

    def _shard_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.window_shards:
            return np.arange(len(self.shard_sizes))
        return np.argsort(self._noise(epoch, 1, len(self.shard_sizes)), kind="stable")

    def _noise(self, epoch: int, purpose: int, count: int) -> NDArray[np.uint64]:
        """Returns uint64 [count] noise keyed by (seed, epoch, purpose).

        numpy guarantees the raw stream of a bit generator, but not what Generator.permutation makes of it.
        """
        key = np.array([self.seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
        noise: NDArray[np.uint64] = np.random.Philox(key=key, counter=[0, 0, 0, purpose]).random_raw(count)
        return noise

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        noise = self._noise(epoch, 0, self.num_samples)
        if self.window_shards:
            window_of_shard = np.empty(len(self.shard_sizes), np.uint64)
            window_of_shard[self._shard_order(epoch)] = np.arange(len(self.shard_sizes)) // self.window_shards
            # The window in the high bits, 40 bits of noise below: one sort, twice as fast as a sort by two keys.
            noise = np.repeat(window_of_shard << np.uint64(40), self.shard_sizes) | noise >> np.uint64(24)
        # Sorting numbers is several times faster than argsort. Each carries its own index in its lowest bits, which
        # matters only when two are equal in all higher bits: then argsort decides.
        bits = np.uint64((self.num_samples - 1).bit_length())
        low = (np.uint64(1) << bits) - np.uint64(1)
        keys = np.sort(noise & ~low | np.arange(self.num_samples, dtype=np.uint64))
        if (np.diff(keys >> bits) == 0).any():
            return np.argsort(noise, kind="stable")
        return (keys & low).astype(np.int64)
