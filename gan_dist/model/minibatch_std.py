"""How much the images of a batch differ, as one more map for D (Karras et al. 2018, arXiv:1710.10196, section 3).

A generator that paints one picture again and again gives batches that vary less than real ones: with this number D can
see it. As batch norm's, the statistics are of the global batch, one group of images (real, fake) at a time, gathered
over the ranks by one collective each way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPS = 1e-8
"""Under the root: its slope is finite where nothing varies."""


class MinibatchStd(nn.Module):
    """Appends a map; `prepare` of batchnorm.py sets up the ranks that share a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.process_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        """Returns `x` [groups * n, C, H, W] with one map more, which is constant in a group: the deviation over the
        group's images, on all ranks, averaged over channels and pixels. n is this rank's share; shares may differ."""
        deviations: Tensor = _Deviation.apply(x, groups, self.process_group)
        count, height = x.shape[0] // groups, x.shape[2]
        maps = deviations.to(x.dtype).repeat_interleave(count)[:, None, None, None]
        return torch.cat([x, maps.expand(-1, 1, height, x.shape[3])], 1)


class _Deviation(torch.autograd.Function):
    """[groups] deviations of all ranks' shares, and the gradient with respect to this rank's.

    Forward merges (count, mean, M2) of every rank (Chan et al. 1979). Each rank's loss depends on every other's images,
    so backward sums the gradients of the deviations over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, group: dist.ProcessGroup | None) -> Tensor:
        parts = x.reshape(groups, -1, x[0].numel())
        parts = parts if x.dtype == torch.float64 else parts.float()
        var, mean = torch.var_mean(parts, dim=1, correction=0)  # [groups, C * H * W]
        count = parts.shape[1]
        local = torch.cat([mean, var * count, torch.full_like(mean[:, :1], count)], dim=1)
        if group is not None:
            gathered = local.new_empty((dist.get_world_size(group) * groups, local.shape[1]))
            dist.all_gather_into_tensor(gathered, local, group=group)
        ranks = (local if group is None else gathered).view(-1, groups, local.shape[1])
        size = mean.shape[1]
        means, m2s, counts = ranks[..., :size], ranks[..., size:-1], ranks[..., -1:]
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        m2 = (m2s + counts * (means - mean).square()).sum(0)
        deviations = (m2 / total + EPS).sqrt()
        ctx.save_for_backward(x, mean, deviations, total)
        ctx.groups, ctx.group = groups, group
        return deviations.mean(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, deviations, total = ctx.saved_tensors
        summed = grads[0].to(mean.dtype, copy=True)
        if ctx.group is not None:
            dist.all_reduce(summed, group=ctx.group)
        parts = x.reshape(ctx.groups, -1, mean.shape[1]).to(mean.dtype)
        scale = summed[:, None] / (total * deviations * mean.shape[1])  # [groups, C * H * W]
        dx = (parts - mean[:, None]) * scale[:, None]
        return dx.reshape(x.shape).to(x.dtype), None, None
