"""How a step's ranks exchange tensors: batch norm's small ones, and the networks' gradients.

Without a word it is the group's own collectives (NCCL's or gloo's), and one all-reduce for a network's gradients. Two
environment variables try what has not been measured on a GPU yet; all ranks must have the same:

GAN_DIST_GRADIENT_BUCKETS=2 (or more) sums a network's gradients in so many parts, each as soon as the way back has
made it, while the rest is computed. GAN_DIST_SMALL_COLLECTIVES=one_shot exchanges what is small by torch's one-shot
all-reduce: one kernel reads the other GPUs' memory, where NCCL takes several hops. Both give the same numbers on all
ranks; sums over more than two ranks may round otherwise than NCCL's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gan_dist.distributed.world import World
from gan_dist.utils.errors import UserError, first_line

BUCKETS, SMALL = "GAN_DIST_GRADIENT_BUCKETS", "GAN_DIST_SMALL_COLLECTIVES"
MOST_BUCKETS = 8
ROOM = 1 << 18
"""Numbers that the symmetric buffer has room for: the layers of a network at 64x64 need a tenth of it on 8 ranks."""
ALIGNMENT = 4
"""Numbers: kernels read 16 bytes at a time."""


class OneShot:
    """Small exchanges through a buffer that every rank of the node can read.

    Every rank must ask for the same exchanges in the same order. The sum is made in rank order, so its bits are the
    same on all ranks; a gather is a sum of parts of which all but one are zero.
    """

    def __init__(self, buffer: Tensor, rank: int, size: int, total: Callable[[Tensor], Tensor]) -> None:
        """buffer: zeros, one-dimensional; total: returns a part of the buffer summed over the ranks, in new memory,
        when all ranks have read it."""
        self._buffer, self._rank, self._size, self._total = buffer, rank, size, total
        self._parts: dict[tuple[str, int], Tensor | None] = {}
        self._end = 0

    def _part(self, kind: str, count: int) -> Tensor | None:
        """Returns so many numbers of the buffer, always the same; None where no room is left, on all ranks alike."""
        if (kind, count) not in self._parts:
            begin, end = self._end, self._end + count
            fits = end <= self._buffer.numel()
            self._parts[kind, count] = self._buffer[begin:end] if fits else None
            self._end = -(-end // ALIGNMENT) * ALIGNMENT if fits else begin
        return self._parts[kind, count]

    def gather(self, tensor: Tensor) -> Tensor | None:
        """Returns every rank's `tensor`, in rank order, [size, *shape]; None where it cannot be done this way."""
        part = self._part("gather", self._size * tensor.numel()) if tensor.dtype == self._buffer.dtype else None
        if part is None:
            return None
        # The other ranks' places stay zero for good.
        part.view(self._size, *tensor.shape)[self._rank].copy_(tensor)
        return self._total(part).view(self._size, *tensor.shape)

    def sum(self, tensor: Tensor) -> Tensor | None:
        """Returns `tensor` summed over the ranks, in new memory; None where it cannot be done this way."""
        part = self._part("sum", tensor.numel()) if tensor.dtype == self._buffer.dtype else None
        if part is None:
            return None
        part.view(tensor.shape).copy_(tensor)
        return self._total(part).view(tensor.shape)


def gathered(tensor: Tensor, group: dist.ProcessGroup, one_shot: OneShot | None = None) -> Tensor:
    """Returns every rank's `tensor` [n, ...], in rank order, [size, n, ...]."""
    if one_shot is not None and (small := one_shot.gather(tensor)) is not None:
        return small
    size = dist.get_world_size(group)
    out = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor, group=group)
    return out.view(size, *tensor.shape)


def summed(tensor: Tensor, group: dist.ProcessGroup, one_shot: OneShot | None = None) -> Tensor:
    """Returns `tensor` summed over the ranks, perhaps in its own memory."""
    if one_shot is not None and (small := one_shot.sum(tensor)) is not None:
        return small
    dist.all_reduce(tensor, group=group)
    return tensor


@dataclass(frozen=True)
class Collectives:
    """What a step's ranks use."""

    gradient_buckets: int = 1
    one_shot: OneShot | None = None
    reason: str = ""
    """For the console, in one clause; empty where nothing was asked for."""


PLAIN = Collectives()


def resolve_collectives(world: World) -> Collectives:
    """Returns what the environment asks for, as far as all ranks can do it. A collective: every rank calls it.

    Raises UserError, on every rank, for values that are none or that differ between ranks.
    """
    wanted = (os.environ.get(BUCKETS, ""), os.environ.get(SMALL, ""))
    everyones = world.gather_objects(wanted)
    for rank, other in enumerate(everyones):
        if other != everyones[0]:
            raise UserError(
                f"{BUCKETS} and {SMALL}: expected the same on all ranks, found {everyones[0]} on rank 0 and {other} on "
                f"rank {rank}; export them on all machines, or on none"
            )
    buckets, small = wanted
    if buckets and not (buckets.isdecimal() and 1 <= int(buckets) <= MOST_BUCKETS):
        raise UserError(f"{BUCKETS}: expected a whole number from 1 to {MOST_BUCKETS}, found {buckets!r}; unset it")
    if small not in ("", "group", "one_shot"):
        raise UserError(f"{SMALL}: expected group or one_shot, found {small!r}; unset it")
    if world.size == 1 or not any(wanted):
        return PLAIN
    count, one_shot, why = int(buckets or 1), None, "as NCCL or gloo does them"
    if small == "one_shot":
        one_shot, why = _one_shot(world)
    return Collectives(count, one_shot, f"gradients in {count} part(s); small ones {why}")


def _one_shot(world: World) -> tuple[OneShot | None, str]:
    """Returns the exchange over symmetric memory, or None where some rank cannot have it, and why in one clause."""
    hosts = world.gather_objects(world.host)
    if len(set(hosts)) > 1:
        return None, "by the group: one-shot all-reduce needs the ranks on one machine"
    made: list[Any] = []
    # Each stage is one that all ranks enter or none: a rank alone in a rendezvous would wait for the others.
    for stage in (_allocate, _connect, _try_out):
        failure = ""
        try:
            made.append(stage(world, *made))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no such device, an old driver, no peer access: all mean one thing
            failure = f"{type(error).__name__}: {first_line(error)}"
        failures = {rank: text for rank, text in enumerate(world.gather_objects(failure)) if text}
        if failures:
            rank, text = next(iter(failures.items()))
            return None, f"by the group: one-shot all-reduce fails on rank {rank} ({text})"
    return made[1], "by one-shot all-reduce"


def _allocate(world: World) -> Tensor:
    """Returns this rank's part of the symmetric buffer."""
    from torch.distributed import _symmetric_memory

    if world.device.type != "cuda":
        raise RuntimeError(f"it is for GPUs, and this rank drives {world.device.type}")
    empty: Any = _symmetric_memory.empty
    buffer: Tensor = empty(ROOM, dtype=torch.float32, device=world.device)
    return buffer.zero_()


def _connect(world: World, buffer: Tensor) -> OneShot:
    from torch.distributed import _symmetric_memory

    group: Any = world.group
    rendezvous: Any = _symmetric_memory.rendezvous
    rendezvous(buffer, group.group_name)
    operation: Any = torch.ops.symm_mem.one_shot_all_reduce
    return OneShot(buffer, world.rank, world.size, lambda part: operation(part, "sum", group.group_name))


def _try_out(world: World, buffer: Tensor, one_shot: OneShot) -> None:
    """Raises ArithmeticError unless both exchanges give what they should."""
    group: Any = world.group
    mine = torch.arange(1000, dtype=buffer.dtype, device=world.device).view(2, 500) + 1000 * world.rank
    found = {each.__name__: (each(mine, group, one_shot), each(mine.clone(), group)) for each in (gathered, summed)}
    for name, (ours, expected) in found.items():  # only now: a rank that left early would leave the others waiting
        if not torch.equal(ours, expected):
            raise ArithmeticError(f"{name} differs from the group's")
