"""Batch norm over the global batch: grouped, synchronised on any backend by one collective each way per layer.

A *group* is a part of the batch that is normalised by its own statistics (Ioffe and Szegedy 2015, algorithm 1). D sees
the real and the fake half in one pass as two groups, which equals two passes: concatenated without groups they would
share statistics, which is another algorithm.

On a CPU all of it is torch's operations. On a GPU it is batchnorm_triton.py's kernels, which take the activation along.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gan_dist.distributed.exchange import OneShot, gathered, summed
from gan_dist.distributed.world import World
from gan_dist.model.kernels import Kernels
from gan_dist.model.minibatch_std import MinibatchStd


class BatchNorm(nn.Module):
    """nn.BatchNorm2d with groups and an activation; set up by `prepare`, with statistics merged over the ranks.

    State names, momentum and eps are nn.BatchNorm2d's, so states load both ways. Statistics are kept in the parameters'
    dtype (float32 under autocast). In eval mode it is torch's operations always.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.process_group: dist.ProcessGroup | None = None
        self.one_shot: OneShot | None = None
        self.fused: Any = None
        """batchnorm_triton.norm_and_activation, where that is to be used."""
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, groups: int = 1, slope: float = 1.0) -> Tensor:
        """Returns `x` [groups * n, C, H, W] normalised and put through leaky ReLU, in its dtype.

        slope: leaky ReLU's below zero; 0 is ReLU, and 1 no activation. In train mode each group is normalised by its
        own statistics, and the running ones are updated once per group, in order. n is this rank's share; shares may
        differ.
        """
        if self.training and self.fused is not None:
            fused: Tensor = self.fused(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                groups=groups,
                momentum=self.momentum,
                eps=self.eps,
                slope=slope,
                group=self.process_group,
                one_shot=self._one_shot(),
            )
            return fused
        y = self._normalise(x, groups)
        if slope == 1:
            return y
        return torch.relu_(y) if slope == 0 else F.leaky_relu_(y, slope)

    def _normalise(self, x: Tensor, groups: int) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps
            )
        self.num_batches_tracked.add_(groups)
        if self.process_group is None:
            parts = [
                F.batch_norm(
                    part, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
                )
                # a chunk of the whole would cost a copy of its gradient
                for part in (x.chunk(groups) if groups > 1 else (x,))
            ]
            return torch.cat(parts) if groups > 1 else parts[0]
        y, mean, var_unbiased = _SynchronisedNorm.apply(
            x, self.weight, self.bias, groups, self.eps, self.process_group, self._one_shot()
        )
        with torch.no_grad():
            for g in range(groups):
                self.running_mean.lerp_(mean[g], self.momentum)
                self.running_var.lerp_(var_unbiased[g], self.momentum)
        out: Tensor = y.to(x.dtype)
        return out

    def _one_shot(self) -> OneShot | None:
        return None if torch.compiler.is_compiling() else self.one_shot  # a compiled pass has the group's collectives


class _SynchronisedNorm(torch.autograd.Function):
    """Normalisation by the statistics of all ranks' shares, and its gradient with respect to this rank's.

    Forward gathers (count, mean, M2) of every rank and merges them (Chan et al. 1979); backward sums sum(dy) and
    sum(dy xhat) over the ranks. The gradients of weight and bias stay local: the flat buffer sums them like all others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        group: dist.ProcessGroup,
        one_shot: OneShot | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = _by_group(x.to(weight.dtype), groups)
        channels = x.shape[1]
        var, mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0)
        count = parts.numel() // (groups * channels)
        local = torch.cat([mean, var * count, torch.full_like(mean[:, :1], count)], dim=1)
        ranks = gathered(local, group, one_shot)
        means, m2s, counts = ranks[..., :channels], ranks[..., channels:-1], ranks[..., -1:]
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        m2 = (m2s + counts * (means - mean).square()).sum(0)
        invstd = torch.rsqrt(m2 / total + eps)
        var_unbiased = m2 / (total - 1)
        ctx.save_for_backward(x, weight, mean, invstd, total)
        ctx.groups, ctx.group, ctx.one_shot = groups, group, one_shot
        ctx.mark_non_differentiable(mean, var_unbiased)
        if not torch.compiler.is_compiling():  # which knows nothing of it, and leaves unused zeros out by itself
            ctx.set_materialize_grads(False)  # else zeros for those two, at each layer
        scale = invstd * weight
        # In the weight's dtype, and the caller casts: where x has that dtype already, a closing `.to(x.dtype)` changes
        # nothing, and torch 2.11 compiles a Function that ends so to wrong gradients, silently.
        return torch.addcmul(_spread(bias - mean * scale, x), x.to(weight.dtype), _spread(scale, x)), mean, var_unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, total = ctx.saved_tensors
        dy = grads[0]
        xhat = (x.to(weight.dtype) - _spread(mean, x)) * _spread(invstd, x)
        sums = [_by_group(values, ctx.groups).sum((1, 3, 4)) for values in (dy, dy * xhat)]
        local = torch.stack(sums)
        total_dy, total_dy_xhat = summed(local.clone(), ctx.group, ctx.one_shot)
        mean_dy, mean_dy_xhat = total_dy / total, total_dy_xhat / total
        dx = (dy - _spread(mean_dy, x) - xhat * _spread(mean_dy_xhat, x)) * _spread(invstd * weight, x)
        return dx.to(x.dtype), local[1].sum(0), local[0].sum(0), None, None, None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Returns [groups * n, C, H, W] as [groups, n, C, H, W]."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Returns [groups, C] values as [groups * n, C, 1, 1], to meet `x` [groups * n, C, H, W]."""
    return values.repeat_interleave(x.shape[0] // values.shape[0], 0)[:, :, None, None]


def prepare(module: nn.Module, world: World, kernels: Kernels = "torch", one_shot: OneShot | None = None) -> None:
    """Makes what has statistics of the batch in `module` share them among the ranks of `world`; BatchNorm by these
    kernels and exchanges."""
    fused = import_module("gan_dist.model.batchnorm_triton").norm_and_activation if kernels == "triton" else None
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.process_group, part.fused = world.group, fused
            part.one_shot = None if world.group is None else one_shot
        elif isinstance(part, MinibatchStd):
            part.process_group = world.group
