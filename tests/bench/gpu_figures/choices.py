"""What only a GPU can decide: runners, kernels of our own or torch's, kernels by trial, the price of determinism."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from gan_dist.bench.step import build
from gan_dist.model.convolution import from_latents, to_logits
from gan_dist.model.kernels import resolve_kernels
from gan_dist.training import runner as runners_module
from gan_dist.training.runner import Captured, Compiled, Eager, Runner
from gan_dist.training.update import Update, maps_dtype
from tests.bench.compare_step import compare
from tests.bench.gpu_figures.plan import Plan, keep


def _without_trial() -> Any:
    """Within it, cuDNN's kernels are not chosen by trial, as in a deterministic run."""
    return mock.patch.object(runners_module, "_convolutions_by_trial", nullcontext)


def runners(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns images/s of the runners that compile nothing, and of the captured one without choice by trial."""
    found: dict[str, Any] = {}
    for batch in plan.batches:
        found[str(batch)] = row = {"eager": plan.images_per_second(batch, lambda update: Eager(update, ""))}
        row["captured"] = plan.images_per_second(batch, lambda update: Captured(update, ""))
        with _without_trial():
            row["captured, no trial"] = plan.images_per_second(batch, lambda update: Captured(update, ""))
        row["captured, again"] = plan.images_per_second(batch, lambda update: Captured(update, ""))
        keep(work, found)
    return found


def compiled(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns images/s of the runners that compile, beside captured, and the seconds that each took in all."""
    wraps: dict[str, Callable[[Update], Runner]] = {
        "captured": lambda update: Captured(update, ""),
        "captured_compiled": lambda update: Captured(update, "", compiled=True),
        "compiled": lambda update: Compiled(update, ""),
    }
    found: dict[str, Any] = {}
    for batch in plan.batches:
        found[str(batch)] = {}
        for name, wrap in wraps.items():
            start = time.perf_counter()
            rate = plan.images_per_second(batch, wrap)
            found[str(batch)][name] = {"images_per_second": rate, "took_seconds": time.perf_counter() - start}
            keep(work, found)
    return found


def determinism(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns images/s of captured steps with and without deterministic kernels, interleaved, and the price."""
    ways: dict[str, dict[str, Any]] = {
        "off": {},
        "on": {"deterministic": True},
        "on, new memory filled": {"deterministic": True, "fill": True},
    }
    found: dict[str, Any] = {}
    for batch in plan.batches:
        rates: dict[str, list[float]] = {way: [] for way in (*ways, "off, no trial")}
        for _ in range(1 if plan.dry else 3):
            for way, settings in ways.items():
                rates[way].append(plan.images_per_second(batch, lambda update: Captured(update, ""), **settings))
            with _without_trial():
                rates["off, no trial"].append(plan.images_per_second(batch, lambda update: Captured(update, "")))
        medians = {way: statistics.median(each) for way, each in rates.items()}
        price = {way: 1 - median / medians["off"] for way, median in medians.items() if way != "off"}
        found[str(batch)] = {"images_per_second": medians, "price": price}
        keep(work, found)
    return found


def kernels(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns images/s of captured steps, interleaved: with our kernels where they can be, with torch's layers at
    images, and with torch's everything."""
    found: dict[str, Any] = {}
    for batch in plan.batches:
        rates: dict[str, list[float]] = {"auto": [], "auto, torch's image layers": [], "torch": []}
        for _ in range(1 if plan.dry else 3):
            for name, each in rates.items():
                wrap = _with_torchs_image_layers if "image" in name else lambda update: Captured(update, "")
                each.append(plan.images_per_second(batch, wrap, kernels=name.split(",")[0]))
        found[str(batch)] = {name: statistics.median(each) for name, each in rates.items()}
        keep(work, found)
    chosen, why = resolve_kernels("auto", plan.world, maps_dtype(plan.precision))
    return {**found, "auto": f"{chosen}: {why}"}


def _with_torchs_image_layers(update: Update) -> Runner:
    networks: tuple[Any, Any] = update.g.network, update.d.network
    networks[0].to_images = networks[1].to_maps = None
    return Captured(update, "")


def peer(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns the tutorial's step and ours, interleaved."""
    runs = list(plan.runners)
    return {str(batch): compare(batch, plan.device, runs, plan.precision, rounds=plan.rounds) for batch in plan.batches}


class _As(nn.Module):
    """A layer that does `function` with a weight."""

    def __init__(self, function: Callable[..., torch.Tensor], weight: nn.Parameter) -> None:
        super().__init__()
        self.function, self.weight = function, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def layers(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns microseconds, forward and back, of both networks' small ends in two forms, and of D on both halves."""
    found = {}
    for batch in plan.batches:
        update, _reals, latents = build(plan.world, batch, plan.precision, plan.shape)
        ends = _small_ends(plan, update, latents[0])
        found[str(batch)] = {
            "ends": {name: plan.microseconds(_both_ways(plan, layer, x)) for name, (layer, x) in ends.items()},
            "D on both halves": _halves(plan, update, latents[0]),
        }
    return found


def _autocast(plan: Plan) -> Any:
    return torch.autocast(plan.device.type, torch.bfloat16)


def _both_ways(plan: Plan, layer: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with _autocast(plan):
            y = layer(x)
        return torch.autograd.grad(y.float().sum(), [x, *layer.parameters()])

    return call


def _small_ends(plan: Plan, update: Update, z: torch.Tensor) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Returns {name: (layer, input)} of G's first layer and D's last, as products and as convolutions."""
    first = update.g.network.get_parameter("convt1.weight")
    last = [weight for name, weight in update.d.network.named_parameters() if name.startswith("conv")][-1]
    z = z.clone().requires_grad_()
    maps = torch.randn(len(z), last.shape[1], 4, 4).to(device=plan.device, memory_format=torch.channels_last)
    maps.requires_grad_()

    def by_convolution(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv_transpose2d(z[:, :, None, None], weight)

    return {
        "G's first layer, a product": (_As(from_latents, first), z),
        "G's first layer, a convolution": (_As(by_convolution, first), z),
        "D's last layer, a product": (_As(to_logits, last), maps),
        "D's last layer, a convolution": (_As(nn.functional.conv2d, last), maps),
    }


def _halves(plan: Plan, update: Update, z: torch.Tensor) -> dict[str, float]:
    """Returns microseconds of D's forward and backward over two batches, in one grouped pass and in two."""
    fake = update.generate(z).detach()
    other = fake.clone()

    def grouped() -> Any:
        with _autocast(plan):
            logits = update.d.network(torch.cat([other, fake]), groups=2)
        return torch.autograd.grad(logits.float().sum(), update.d.parameters)

    def separate() -> Any:
        with _autocast(plan):
            logits = update.d.network(other).float().sum() + update.d.network(fake).float().sum()
        return torch.autograd.grad(logits, update.d.parameters)

    return {"one grouped pass": plan.microseconds(grouped), "two passes": plan.microseconds(separate)}
