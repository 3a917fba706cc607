"""The minimax game and its relatives, on logits (Goodfellow et al. 2014, eq. 1).

With D(x) = sigmoid(logit): log D = logsigmoid(logit) and log(1 - D) = logsigmoid(-logit), exact where a probability
would have rounded to 0 or 1. Every function returns a *sum* over the local batch: the caller divides by the global
batch, so that ranks with unequal shares add up to the same mean.

A new loss is a name in config/schema.py's LossName and a branch in `generator_loss` here. One that changes D's loss as
well gives `discriminator_loss` a parameter `name`, which `discriminator_pass` in training/update.py passes on.
"""

from __future__ import annotations

from typing import get_args

import torch.nn.functional as F
from torch import Tensor

from gan_dist.config.schema import LossName
from gan_dist.utils.errors import UserError


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Returns -sum(target log D + (1 - target) log(1 - D)), a scalar, for `logits` [B] and a target in [0, 1]."""
    if target == 1:
        return -F.logsigmoid(logits).sum()
    if target == 0:
        return -F.logsigmoid(-logits).sum()
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, real_target: float = 1.0) -> Tensor:
    """Returns the summed loss that D minimises; `real_target` below 1 is one-sided label smoothing."""
    return cross_entropy(real_logits, real_target) + cross_entropy(fake_logits, 0.0)


def generator_loss(fake_logits: Tensor, name: LossName, target: float | None = None) -> Tensor:
    """Returns the summed loss that G minimises.

    minimax: sum log(1 - D(G(z))), the game as written, which saturates where D wins. non_saturating: cross entropy of
    D(G(z)) against `target` (1 when None). Raises UserError for another name and for minimax with a target.
    """
    if name == "minimax" and target is None:
        return F.logsigmoid(-fake_logits).sum()
    if name == "non_saturating":
        return cross_entropy(fake_logits, 1.0 if target is None else target)
    if name == "minimax":
        raise UserError(f"minimax takes no generator target, found {target}; leave it out, or choose non_saturating")
    raise UserError(f"loss.name: expected one of {', '.join(get_args(LossName))}, found {name!r}")


def minimax_value(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Returns the sums of log D(x) and log(1 - D(G(z))): over the batch, the value V(D, G) that both play for."""
    return F.logsigmoid(real_logits).sum() + F.logsigmoid(-fake_logits).sum()
