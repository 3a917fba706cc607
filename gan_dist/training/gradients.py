"""All gradients of a network in one buffer, summed over the ranks at once, or in parts while others are being made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gan_dist.distributed.world import World


class FlatGradients:
    """All gradients of a network and a few scalars behind them in one buffer, so that one all-reduce takes them all.

    With `num_buckets` above 1 it takes as many: the last layers' first, with the scalars, since the way back begins
    there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_extras: int, num_buckets: int = 1) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        self.flat = parameters[0].new_zeros(count + num_extras)
        self.values = self.flat[:count]
        self.extras = self.flat[count:]
        self.views: list[Tensor] = []
        offset = 0
        for parameter in parameters:  # each view is strided like its parameter, as fused kernels want it
            self.views.append(torch.as_strided(self.flat, parameter.shape, parameter.stride(), offset))
            offset += parameter.numel()
        self.buckets = _buckets([parameter.numel() for parameter in parameters], num_buckets)
        """Which parameters each bucket holds, in the order in which buckets are summed."""

    def take(
        self, loss: Tensor, leaves: Sequence[Tensor], seed: Tensor, extras: Sequence[Tensor], world: World
    ) -> None:
        """Overwrites everything with the gradients of `loss` (times `seed`) and `extras`, summed over the ranks."""
        if world.size == 1 or len(self.buckets) == 1:
            self.fill(torch.autograd.grad(loss, leaves, seed), extras)
            world.all_reduce(self.flat)
            return
        torch.cat(list(extras), out=self.extras)
        with self._summing(leaves, world):
            torch.autograd.grad(loss, leaves, seed)

    def fill(self, gradients: Sequence[Tensor], extras: Sequence[Tensor]) -> None:
        """Overwrites everything with this rank's."""
        self._copy(self.views, gradients)
        torch.cat(list(extras), out=self.extras)

    def _copy(self, views: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Copies gradients to their views, in one launch for each dtype that they have."""
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            pairs = [pair for pair in zip(views, gradients, strict=True) if pair[1].dtype == dtype]
            torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])

    @contextmanager
    def _summing(self, leaves: Sequence[Tensor], world: World) -> Iterator[None]:
        """Within it a way back starts the sum of each bucket that it has completed; at its end all sums are there."""
        ready: dict[int, Tensor] = {}
        works: list[Any] = []

        def note(index: int, gradient: Tensor) -> None:
            ready[index] = gradient
            # In order, whatever is ready first: ranks must not differ in what they sum with each other.
            while len(works) < len(self.buckets) and all(i in ready for i in self.buckets[len(works)]):
                bucket = self.buckets[len(works)]
                self._copy([self.views[i] for i in bucket], [ready[i] for i in bucket])
                begin = self.views[bucket[0]].storage_offset()
                last = self.views[bucket[-1]]
                end = last.storage_offset() + last.numel() if works else self.flat.numel()
                works.append(world.all_reduce_aside(self.flat[begin:end]))

        hooks: list[Any] = []
        for index, leaf in enumerate(leaves):
            hooks.append(leaf.register_hook(partial(note, index)))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for work in works:
            work.wait()


def _buckets(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Returns the places of `sizes` in at most `count` lists of about one size, the last places first."""
    buckets: list[list[int]] = [[]]
    left, taken = sum(sizes), 0
    for place in reversed(range(len(sizes))):
        buckets[-1].insert(0, place)
        taken += sizes[place]
        more = count - len(buckets)
        if more and place and taken * (more + 1) >= left:
            left, taken = left - taken, 0
            buckets.append([])
    return buckets
