"""Copies: each sample beside the real image nearest to it, and how near real images are to one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gan_dist.data.dataset import Dataset, Gather, gather
from gan_dist.data.order import rank_slice
from gan_dist.distributed.world import World
from gan_dist.utils.pictures import grid, save_png

REFERENCES = 64
"""Real images, spread over the dataset, whose own nearest neighbours give the usual distance."""
CHUNK = 128
"""Real images in float32 at a time: with 512 and more, the memory they take costs a CPU more than the products do."""
CHECK_EVERY = 16 * CHUNK
"""Real images between two checks for a stop request."""
ALONE = World()


@dataclass(frozen=True)
class Neighbours:
    """The real image nearest to each of N samples.

    images: uint8 [N, 3, S, S], the nearest real images; indices: their places in the dataset; sources: where they came
    from; distances: root mean square differences in grey levels (0 to 255); usual: the median distance from a real
    image to the nearest other one, or None in a set of one; copies: samples that are nearly real ones.
    """

    images: Tensor
    indices: list[int]
    sources: list[str]
    distances: list[float]
    usual: float | None
    copies: int

    def lines(self) -> list[str]:
        """Returns the result as lines for a person."""
        middle = sorted(self.distances)[len(self.distances) // 2]
        usual = "unknown" if self.usual is None else f"{self.usual:.1f}"
        verdict = f"{self.copies} may be copies" if self.copies else "none looks like a copy"
        line = f"distance to the nearest real image: {middle:.1f} grey levels (median)"
        return [f"{line}; between real images: {usual}; {verdict}"]


def find_neighbours(samples: Tensor, dataset: Dataset) -> Neighbours:
    """Returns the nearest real image of each of `samples`, uint8 [N, 3, S, S], over the whole dataset.

    Raises ValueError when their size is not the dataset's.
    """
    where, distances, usual = nearest(samples, dataset)
    indices = where.tolist()
    images, sources = gather(dataset, where.numpy()), _sources(dataset, indices)
    return Neighbours(images, indices, sources, distances.tolist(), usual, copies(samples, distances, usual))


def copies(samples: Tensor, distances: Tensor, usual: float | None) -> int:
    """Returns how many of `samples`, uint8 [N, 3, S, S], nearly equal a real image; `distances` and `usual` as from
    `nearest`.

    Those are nearer to a real image than a third of the usual distance, and than half of their own contrast: an almost
    empty picture is near every other empty one and is no copy. Copies that are shifted or rotated are not recognised:
    pixels are compared in place, as they are and mirrored.
    """
    contrast = samples.flatten(1).float().std(1)
    return int(((distances < (usual or 0) / 3) & (distances < contrast / 2)).sum())


def nearest(
    samples: Tensor, dataset: Dataset, world: World = ALONE, check: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor, float | None]:
    """Returns indices, int64 [N], distances, float32 [N], and `usual`, as in Neighbours, of `samples`, uint8
    [N, 3, S, S], or of their mirror images where those are nearer: with data.x_flip a copy may be one.

    A collective: the ranks, which give the same samples, share the real images. `check` is called now and then, equally
    often on every rank, and may raise. Raises ValueError when the samples' size is not the dataset's.
    """
    size = dataset.resolution
    if tuple(samples.shape[1:]) != (3, size, size):
        raise ValueError(f"samples of shape {tuple(samples.shape)}, but the dataset's images are 3x{size}x{size}")
    count = min(REFERENCES, dataset.num_samples) if dataset.num_samples > 1 else 0
    own = torch.arange(count) * dataset.num_samples // max(1, count)
    queries = torch.cat([samples, samples.flip(-1), gather(dataset, own.numpy())]).flatten(1).float()
    where = _nearest(queries, own, dataset, world, check)
    distances = (queries - gather(dataset, where.numpy()).flatten(1).float()).square().mean(1).sqrt()
    parts = [len(samples), 2 * len(samples)]
    plain, mirrored, theirs = distances.tensor_split(parts)
    as_it_is, as_mirrored, _ = where.tensor_split(parts)
    indices = torch.where(mirrored < plain, as_mirrored, as_it_is)
    return indices, torch.minimum(plain, mirrored), theirs.median().item() if count else None


def _nearest(queries: Tensor, own: Tensor, dataset: Dataset, world: World, check: Callable[[], None]) -> Tensor:
    """Returns the place in the dataset, int64 [Q], of the real image nearest to each of `queries`, float32 [Q, P].

    The last queries are themselves the real images at `own`, which count for none of their own.
    """
    read, on_device = Gather(dataset), queries.to(world.device)
    norms = on_device.square().sum(1)[:, None]
    rows = torch.arange(len(queries) - len(own), len(queries))
    best, where = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.int64)
    lo, hi = rank_slice(dataset.num_samples, world.rank, world.size)
    for turn in range(0, -(-dataset.num_samples // world.size), CHECK_EVERY):  # as many on every rank
        check()
        for start in range(lo + turn, min(hi, lo + turn + CHECK_EVERY), CHUNK):
            places = np.arange(start, min(hi, start + CHUNK))
            pixels = torch.empty(len(places), 3, dataset.resolution, dataset.resolution, dtype=torch.uint8)
            real = read.into(pixels, places).to(world.device).flatten(1).float()
            # |a|^2 - 2ab + |b|^2 is a matrix product; what float32 loses in it is made good later, for the nearest.
            squares = (norms - 2 * on_device @ real.T + real.square().sum(1)).cpu()
            inside = (own >= start) & (own < start + len(real))
            squares[rows[inside], own[inside] - start] = torch.inf
            nearest, index = squares.min(1)
            where = torch.where(nearest < best, index + start, where)
            best = torch.minimum(nearest, best)
    gathered = world.gather_objects((best, where))
    winner = torch.stack([distances for distances, _ in gathered]).argmin(0, keepdim=True)
    return torch.stack([places for _, places in gathered]).gather(0, winner)[0]


def draw_neighbours(samples: Tensor, dataset: Dataset, out: Path) -> Neighbours:
    """Returns the neighbours of `samples`, uint8 [N, 3, S, S], and writes the pairs to the PNG `out`."""
    neighbours = find_neighbours(samples, dataset)
    gap = samples.new_full((*samples.shape[:3], 2), 255)
    save_png(grid(torch.cat([samples, gap, neighbours.images], dim=3), columns=4, padding=8), out)
    return neighbours


def _locate(dataset: Dataset, index: int) -> tuple[int, int]:
    """Returns (shard, place in it) of a sample."""
    for shard, size in enumerate(dataset.shard_sizes):
        if index < size:
            return shard, index
        index -= size
    raise IndexError(index)


def _sources(dataset: Dataset, indices: list[int]) -> list[str]:
    """Returns `source/path` of samples, as the sidecars have them; empty where there is no sidecar."""
    sources = []
    for shard, place in (_locate(dataset, index) for index in indices):
        try:
            record = dataset.records(shard)[place]
        except (OSError, ValueError, IndexError):
            record = {}
        sources.append("/".join(str(record[key]) for key in ("source", "path") if record.get(key)))
    return sources
