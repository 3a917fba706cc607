"""The minimax game and its relatives, on logits (Goodfellow et al. 2014, eq. 1; other sources at their names below).

With D(x) = sigmoid(logit): log D = logsigmoid(logit) and log(1 - D) = logsigmoid(-logit), exact where a probability
would have rounded to 0 or 1. Losses are *sums* over the local batch; `discriminator_terms` and `generator_terms`, all
that a pass takes of its logits, divide them by the global batch, so that ranks with unequal shares add up to the same
mean. On a GPU losses_triton.py makes these two in one kernel. The penalty on D's slopes (penalty.py) is added in
training/update.py's `discriminator_pass`.

A new loss is a name in config/schema.py's LossName, perhaps in WITH_GENERATOR_TARGET, WITH_REAL_TARGET and WITH_SIGN
there, and in the words of LossConfig; here a branch in `discriminator_loss` and in `generator_loss`, perhaps a place in
SHIFT_INVARIANT and PAIRED; in losses_triton.py a row in each table of KINDS (a new kind: a branch in `_term`, and what
it takes in `_constants`); its formula in tests/model/test_losses.py; its name in docs/training.md.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gan_dist.config.schema import WITH_GENERATOR_TARGET, LossName
from gan_dist.model.custom_ops import exact
from gan_dist.utils.errors import UserError

SHIFT_INVARIANT: frozenset[LossName] = frozenset({"wasserstein", "relativistic"})
"""The losses that compare logits with one another alone: a constant added to all of them changes nothing."""
PAIRED: frozenset[LossName] = frozenset({"relativistic"})
"""The losses whose generator sees the logits of real images too."""


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Returns -sum(target log D + (1 - target) log(1 - D)), a scalar, for `logits` [B] and a target in [0, 1]."""
    if target == 1:
        return -F.logsigmoid(logits).sum()
    if target == 0:
        return -F.logsigmoid(-logits).sum()
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum()


def discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    name: LossName = "non_saturating",
    real_target: float = 1.0,
    value: Tensor | None = None,
) -> Tensor:
    """Returns the summed loss that D minimises, for r = `real_logits` and f = `fake_logits`, [B] each.

    minimax and non_saturating: cross entropy of r against `real_target` (below 1 is one-sided label smoothing) and of f
    against 0; that is (1 - real_target) r - `value`, which is their minimax_value, made here if the caller has none.
    least_squares: (r - real_target)^2 / 2 + f^2 / 2 (Mao et al. 2017, eq. 9). hinge: max(0, 1 - r) + max(0, 1 + f) (Lim
    and Ye 2017). wasserstein: f - r (Arjovsky et al. 2017, eq. 2). relativistic: -log sigmoid(r - f), real and fake
    paired by place in the batch (Jolicoeur-Martineau 2018, section 4.1).
    """
    if name in ("minimax", "non_saturating"):
        value = minimax_value(real_logits, fake_logits) if value is None else value
        return -value if real_target == 1 else (1 - real_target) * real_logits.sum() - value
    if name == "least_squares":
        return ((real_logits - real_target).square().sum() + fake_logits.square().sum()) / 2
    if name == "hinge":
        return F.relu(1 - real_logits).sum() + F.relu(1 + fake_logits).sum()
    if name == "wasserstein":
        return fake_logits.sum() - real_logits.sum()
    if name == "relativistic":
        return cross_entropy(real_logits - fake_logits, 1.0)
    raise _unknown(name)


def generator_loss(
    fake_logits: Tensor, name: LossName, target: float | None = None, real_logits: Tensor | None = None
) -> Tensor:
    """Returns the summed loss that G minimises, for f = `fake_logits`; sources as in `discriminator_loss`.

    minimax: log(1 - sigmoid(f)), the game as written, which saturates where D wins. non_saturating: cross entropy of f
    against `target` (1 when None). least_squares: (f - target)^2 / 2. hinge and wasserstein: -f. relativistic:
    -log sigmoid(f - r), which alone needs r = `real_logits`. Raises UserError for another name, and for a target
    where the loss has none.
    """
    if target is not None and name not in WITH_GENERATOR_TARGET:
        raise UserError(f"{name} takes no generator target, found {target}; leave it out, or choose non_saturating")
    aim = 1.0 if target is None else target
    if name == "minimax":
        return F.logsigmoid(-fake_logits).sum()
    if name == "non_saturating":
        return cross_entropy(fake_logits, aim)
    if name == "least_squares":
        return (fake_logits - aim).square().sum() / 2
    if name in ("hinge", "wasserstein"):
        return -fake_logits.sum()
    if name == "relativistic":
        assert real_logits is not None, "pairs need the real images' logits"
        return cross_entropy(fake_logits - real_logits, 1.0)
    raise _unknown(name)


def discriminator_terms(
    logits: Tensor, images: int, name: LossName, real_target: float = 1.0, signs: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns D's loss, a scalar, and [loss, D(x), D(G(z)), V(D, G)], of which no gradient is taken, and with `signs`
    behind them the sign of real logits: sums over `logits` [2 b], of real images and then of fakes, over `images`.
    """
    logits = logits.to(exact(logits))
    real_logits, fake_logits = logits.chunk(2)
    value = minimax_value(real_logits, fake_logits)
    loss = discriminator_loss(real_logits, fake_logits, name, real_target, value)
    with torch.no_grad():
        sums = [loss[None], logits.sigmoid().view(2, -1).sum(1), value[None]]
        if signs:
            sums.append(real_logits.sign().sum()[None])
        extras = torch.cat(sums).div_(images)
    return loss / images, extras


def generator_terms(logits: Tensor, images: int, name: LossName, target: float | None = None) -> tuple[Tensor, Tensor]:
    """Returns G's loss, a scalar, and [loss, D(G(z))], of which no gradient is taken: sums over fakes' `logits` [b]
    (where the loss is PAIRED, [2 b], those of real images first), over `images`."""
    logits = logits.to(exact(logits))
    real_logits, fake_logits = logits.chunk(2) if name in PAIRED else (None, logits)
    loss = generator_loss(fake_logits, name, target, real_logits)
    with torch.no_grad():
        extras = torch.stack([loss, fake_logits.sigmoid().sum()])
    return loss / images, extras.div_(images)


def _unknown(name: str) -> UserError:
    return UserError(f"loss.name: expected one of {', '.join(get_args(LossName))}, found {name!r}")


def minimax_value(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Returns the sum of log D(x) and log(1 - D(G(z))): over the batch, the value V(D, G) that both play for."""
    return F.logsigmoid(torch.cat([real_logits, -fake_logits])).sum()
