"""A pass's losses and statistics as one operation for GPUs: a Triton kernel beside losses.py, which is its oracle.

From logits to losses, sums and the gradient of the loss is some fifteen small kernels in torch, which take a GPU longer
to start than to run. Here one program reads the logits once, in the maps' dtype, and writes all of it. Sums are made in
a fixed order, in float32, or in float64 where logits are that.

Every loss of losses.py is a sum of terms of one kind: of a real logit against a target and of a fake one against
another, or of the difference of a pair. A new kind is a branch in `_term`. With TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gan_dist.config.schema import LossName
from gan_dist.model import losses
from gan_dist.model.custom_ops import define, exact, require_close

BLOCK = 512
"""Logits of each kind that the program has in hand at a time."""
TERMS = 18
"""Of the series below, up to float64's last digit."""
NUM_SUMS = {"discriminator": 5, "generator": 2}
KINDS: dict[str, dict[LossName, tuple[str, float, float]]] = {
    "discriminator": {
        "minimax": ("cross_entropy", 1.0, 0.0),
        "non_saturating": ("cross_entropy", 1.0, 0.0),
        "least_squares": ("squares", 1.0, 0.0),
        "hinge": ("hinge", 1.0, -1.0),
        "wasserstein": ("linear", 1.0, -1.0),
        "relativistic": ("pairs", 1.0, 1.0),
    },
    "generator": {
        "minimax": ("saturating", 0.0, 0.0),
        "non_saturating": ("cross_entropy", 0.0, 1.0),
        "least_squares": ("squares", 0.0, 1.0),
        "hinge": ("linear", 0.0, 1.0),
        "wasserstein": ("linear", 0.0, 1.0),
        "relativistic": ("pairs", 1.0, 1.0),
    },
}
"""Each player's kind of term, and its targets for real logits and for fake ones where nothing else is asked."""


@triton.jit
def _sigmoids(x, TERMS: tl.constexpr):
    """Returns sigmoid(x), sigmoid(-x), log sigmoid(x) and log sigmoid(-x), none of them by a difference."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) is 2 artanh(e / (2 + e)): hardware's logarithm has few right digits near 1.
    s = e / (2.0 + e)
    series = tl.zeros_like(s)
    for k in tl.static_range(TERMS):
        series = series * (s * s) + 1.0 / (2 * (TERMS - k) - 1)
    log1p = 2.0 * s * series
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    up, down = tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)
    return up, down, tl.where(x >= 0, 0.0, x) - log1p, tl.where(x >= 0, -x, 0.0) - log1p


@triton.jit
def _term(x, up, down, log_up, log_down, KIND: tl.constexpr, TARGET: tl.constexpr):
    """Returns the term that a logit x, with what _sigmoids says of it, adds to a loss, and the term's derivative."""
    if KIND == "squares":
        cost, slope = (x - TARGET) * (x - TARGET) * 0.5, x - TARGET
    elif KIND == "hinge":
        margin = 1.0 - x * TARGET
        cost = tl.where(margin <= 0, 0.0, margin)  # NaN stays
        slope = tl.where(margin <= 0, 0.0, tl.zeros_like(x) - TARGET)
    elif KIND == "linear":
        cost, slope = -x * TARGET, tl.zeros_like(x) - TARGET
    elif KIND == "saturating":
        cost, slope = log_down, -up
    else:  # cross entropy, of pairs too
        cost = -(log_up * TARGET + log_down * (1.0 - TARGET))
        slope = up * (1.0 - TARGET) - down * TARGET
    return cost, slope


@triton.jit
def _losses_kernel(
    logits, loss, sums, gradient, size,
    KIND: tl.constexpr, GENERATOR: tl.constexpr, REALS: tl.constexpr, REAL_TARGET: tl.constexpr,
    FAKE_TARGET: tl.constexpr, IMAGES: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the loss, its sums and its gradient, of `size` fake logits behind as many real ones (if REALS)."""
    dtype = loss.dtype.element_ty
    total = tl.zeros([BLOCK], dtype)
    of_real = tl.zeros([BLOCK], dtype)
    of_fake = tl.zeros([BLOCK], dtype)
    value = tl.zeros([BLOCK], dtype)
    signs = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < size
        at_fake = place + size if REALS else place
        fake = tl.load(logits + at_fake, mask=there, other=0.0).to(dtype)
        up, down, log_up, log_down = _sigmoids(fake, TERMS)
        of_fake += tl.where(there, up, 0.0)
        real = fake
        if REALS:
            real = tl.load(logits + place, mask=there, other=0.0).to(dtype)
            up_r, down_r, log_up_r, log_down_r = _sigmoids(real, TERMS)
            of_real += tl.where(there, up_r, 0.0)
            value += tl.where(there, log_up_r + log_down, 0.0)
            signs += tl.where(there, tl.where(real > 0, 1.0, 0.0) - tl.where(real < 0, 1.0, 0.0), 0.0)
        if KIND == "pairs":
            apart = fake - real if GENERATOR else real - fake
            up, down, log_up, log_down = _sigmoids(apart, TERMS)
            cost, slope = _term(apart, up, down, log_up, log_down, KIND, 1.0)
            slope = slope if GENERATOR else -slope
            tl.store(gradient + place, -slope / IMAGES, mask=there)
        else:
            cost, slope = _term(fake, up, down, log_up, log_down, KIND, FAKE_TARGET)
            if REALS:
                more, other = _term(real, up_r, down_r, log_up_r, log_down_r, KIND, REAL_TARGET)
                cost += more
                tl.store(gradient + place, other / IMAGES, mask=there)
        tl.store(gradient + at_fake, slope / IMAGES, mask=there)
        total += tl.where(there, cost, 0.0)
    mean = tl.sum(total, 0) / IMAGES
    tl.store(loss, mean)
    tl.store(sums, mean)
    if GENERATOR:
        tl.store(sums + 1, tl.sum(of_fake, 0) / IMAGES)
    else:
        tl.store(sums + 1, tl.sum(of_real, 0) / IMAGES)
        tl.store(sums + 2, tl.sum(of_fake, 0) / IMAGES)
        tl.store(sums + 3, tl.sum(value, 0) / IMAGES)
        tl.store(sums + 4, tl.sum(signs, 0) / IMAGES)


def _constants(player: str, name: LossName, target: float | None, images: int) -> dict[str, Any]:
    """Returns what the kernel is compiled for."""
    kind, of_real, of_fake = KINDS[player][name]
    generates = player == "generator"
    if target is not None and kind in ("cross_entropy", "squares"):
        of_real, of_fake = (of_real, target) if generates else (target, of_fake)
    reals = not generates or kind == "pairs"
    return {
        "KIND": kind, "GENERATOR": generates, "REALS": reals, "REAL_TARGET": of_real, "FAKE_TARGET": of_fake,
        "IMAGES": images, "TERMS": TERMS, "BLOCK": BLOCK,
    }  # fmt: skip


def _results(logits: Tensor, player: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = exact(logits)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(NUM_SUMS[player], dtype=dtype),
        logits.new_empty(logits.shape),
    )


@define(
    "loss_terms(Tensor logits, str player, str name, float? target, int images) -> (Tensor, Tensor, Tensor)",
    lambda logits, player, *_: _results(logits, player),
)
def _loss_terms(
    logits: Tensor, player: str, name: LossName, target: float | None, images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, its sums, and its gradient with respect to `logits`, in their dtype."""
    logits, (loss, sums, gradient) = logits.contiguous(), _results(logits, player)
    constants = _constants(player, name, target, images)
    with torch.cuda.device_of(logits):
        _losses_kernel[(1,)](logits, loss, sums, gradient, len(logits) // (1 + constants["REALS"]), **constants)
    return loss, sums, gradient


class _LossTerms(torch.autograd.Function):
    """The operation above, whose gradient is at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        loss, sums, gradient = torch.ops.gan_dist.loss_terms(logits, *how)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        if not torch.compiler.is_compiling():  # which knows nothing of it, and leaves unused zeros out by itself
            ctx.set_materialize_grads(False)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


def discriminator_terms(
    logits: Tensor, images: int, name: LossName, real_target: float = 1.0, signs: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns what losses.discriminator_terms does."""
    loss, sums = _LossTerms.apply(logits, "discriminator", name, real_target, images)
    return loss, sums[: 4 + signs]


def generator_terms(logits: Tensor, images: int, name: LossName, target: float | None = None) -> tuple[Tensor, Tensor]:
    """Returns what losses.generator_terms does."""
    loss, sums = _LossTerms.apply(logits, "generator", name, target, images)
    return loss, sums


def check(device: torch.device, dtype: torch.dtype, name: LossName) -> None:
    """Raises unless the kernel can be built for `device`, and does there, for this loss, what torch does in float64.

    Raises ArithmeticError where results differ, and whatever Triton raises where it cannot build it.
    """
    source, half = torch.Generator().manual_seed(0), BLOCK + 3
    logits = torch.randn(2 * half, generator=source) * 3 + torch.tensor([2.0, -1.0]).repeat_interleave(half)
    logits = logits.to(device, dtype)
    players = ((discriminator_terms, losses.discriminator_terms), (generator_terms, losses.generator_terms))
    for ours, torchs in players:
        found, expected = _played(ours, logits, name), _played(torchs, logits.double(), name)
        names = (f"the {what} of {ours.__name__}" for what in ("loss", "sums", "gradient"))
        require_close(dict(zip(names, zip(found, expected, strict=True), strict=True)), dtype)


def _played(terms: Any, logits: Tensor, name: LossName) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss, sums = terms(logits, 7, name)
    return loss.detach(), sums, torch.autograd.grad(loss, logits)[0]
