"""Does it copy? Each sample beside the real image nearest to it, and how near real images are to one another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gan_dist.data.shards import Dataset
from gan_dist.watch.pictures import grid, save_png

REFERENCES = 64
"""Real images, spread over the set, whose own nearest neighbours give the distance to hold a sample's against."""
CHUNK = 2048


@dataclass(frozen=True)
class Neighbours:
    """What stands nearest to each of N samples.

    images: uint8 [N, 3, S, S], the nearest real images; indices: their places in the dataset; sources: where they came
    from; distances: root mean square differences in grey levels (0 to 255); usual: the median distance from a real
    image to the nearest other one, or None in a set of one.
    """

    images: Tensor
    indices: list[int]
    sources: list[str]
    distances: list[float]
    usual: float | None

    @property
    def copies(self) -> int:
        """Samples nearer to a real image than a third of the usual distance: look at these."""
        return 0 if self.usual is None else sum(distance < self.usual / 3 for distance in self.distances)

    def lines(self) -> list[str]:
        """Returns what a person should know, in words."""
        middle = sorted(self.distances)[len(self.distances) // 2]
        usual = "unknown" if self.usual is None else f"{self.usual:.1f}"
        verdict = f"{self.copies} may be copies" if self.copies else "none looks like a copy"
        told = f"distance to the nearest real image: {middle:.1f} grey levels (median)"
        return [f"{told}; between real images: {usual}; {verdict}"]


def find_neighbours(samples: Tensor, dataset: Dataset) -> Neighbours:
    """Returns the nearest real image of each of `samples`, uint8 [N, 3, S, S], over the whole dataset.

    Raises ValueError when their size is not the dataset's.
    """
    size = dataset.resolution
    if tuple(samples.shape[1:]) != (3, size, size):
        raise ValueError(f"samples of shape {tuple(samples.shape)}, but the dataset's images are 3x{size}x{size}")
    count = min(REFERENCES, dataset.num_samples) if dataset.num_samples > 1 else 0
    own = torch.arange(count) * dataset.num_samples // max(1, count)
    queries = torch.cat([samples, _take(dataset, own)]).flatten(1).float()
    best = torch.full((len(queries),), torch.inf)
    where = torch.zeros(len(queries), dtype=torch.int64)
    start = 0
    for shard in range(len(dataset.shard_sizes)):
        for part in torch.split(dataset.shard_view(shard), CHUNK):
            real = part.flatten(1).float()
            # |a|^2 - 2ab + |b|^2 is a matrix product; what float32 loses in it is made good below, for the nearest.
            squares = queries.square().sum(1)[:, None] - 2 * queries @ real.T + real.square().sum(1)
            inside = (own >= start) & (own < start + len(real))
            squares[len(samples) + inside.nonzero().flatten(), own[inside] - start] = torch.inf
            nearest, index = squares.min(1)
            better = nearest < best
            best = torch.where(better, nearest, best)
            where = torch.where(better, index + start, where)
            start += len(real)
    found = _take(dataset, where)
    distances = (queries - found.flatten(1).float()).square().mean(1).sqrt()
    mine = slice(0, len(samples))
    return Neighbours(
        images=found[mine],
        indices=where[mine].tolist(),
        sources=_sources(dataset, where[mine].tolist()),
        distances=distances[mine].tolist(),
        usual=distances[len(samples) :].median().item() if count else None,
    )


def draw_neighbours(samples: Tensor, dataset: Dataset, out: Path) -> Neighbours:
    """Returns the neighbours of `samples`, uint8 [N, 3, S, S], after writing pairs to the PNG `out`: sample, nearest
    real image."""
    found = find_neighbours(samples, dataset)
    gap = samples.new_full((*samples.shape[:3], 2), 255)
    save_png(grid(torch.cat([samples, gap, found.images], dim=3), columns=4, padding=8), out)
    return found


def _locate(dataset: Dataset, index: int) -> tuple[int, int]:
    """Returns (shard, place in it) of a sample."""
    for shard, size in enumerate(dataset.shard_sizes):
        if index < size:
            return shard, index
        index -= size
    raise IndexError(index)


def _take(dataset: Dataset, indices: Tensor) -> Tensor:
    places = [_locate(dataset, int(index)) for index in indices]
    size = dataset.resolution
    taken = [dataset.shard_view(shard)[place] for shard, place in places]
    return torch.stack(taken) if taken else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _sources(dataset: Dataset, indices: list[int]) -> list[str]:
    """Returns `source/path` of samples, as the sidecars have them; empty where there is no sidecar."""
    told = []
    for shard, place in (_locate(dataset, index) for index in indices):
        try:
            record = dataset.records(shard)[place]
        except (OSError, ValueError, IndexError):
            record = {}
        told.append("/".join(str(record[key]) for key in ("source", "path") if record.get(key)))
    return told
