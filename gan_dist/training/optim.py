"""A network with all that moves it: flat gradients, Adam, buffers, and the average of its weights (EMA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gan_dist.distributed.world import World

EMA_RAMP = 0.05
"""Early on the half-life is this share of the images seen so far (Karras et al. 2020, arXiv:2006.06676): the average
forgets the first, meaningless weights."""


@dataclass(frozen=True)
class Schedule:
    """The share of the learning rates that holds at a position: a rise over `warmup_images`, times a fall until
    `decay_images`, linear or cosine (Loshchilov and Hutter 2017, eq. 5), to `decay_to`."""

    warmup_images: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_images: int = 0
    decay_to: float = 0.0

    def __call__(self, images_seen: int) -> float:
        """Returns the share, in [0, 1], for a step that begins when D has seen so many images.

        The warm-up counts from the next image on, so that no step has a rate of 0.
        """
        share = min(1.0, (images_seen + 1) / self.warmup_images) if self.warmup_images else 1.0
        if self.decay == "none":
            return share
        way = min(1.0, images_seen / self.decay_images)
        fallen = 1 - way if self.decay == "linear" else (1 + math.cos(math.pi * way)) / 2
        return share * (self.decay_to + (1 - self.decay_to) * fallen)

    @property
    def constant(self) -> bool:
        """Whether the rates never move."""
        return self.warmup_images == 0 and self.decay == "none"


CONSTANT = Schedule()


class Player:
    """A network in training: `update` all-reduces the gradients of a local loss and applies Adam."""

    def __init__(
        self, network: nn.Module, world: World, *, lr: float, betas: tuple[float, float], num_extras: int
    ) -> None:
        self.network = network
        self.world = world
        self.full_lr = self.lr = lr
        self.parameters = list(network.parameters())
        self.buffers = Buffers(network)
        self.gradients = FlatGradients(self.parameters, num_extras)
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=lr, betas=betas, fused=True, capturable=world.device.type == "cuda"
        )
        for parameter, gradient in zip(self.parameters, self.gradients.views, strict=True):
            parameter.grad = gradient
            # Adam makes its state in its first step; a CUDA graph needs it to be there before.
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        with torch.no_grad():
            for tensor in (*self.parameters, *network.buffers()):
                world.broadcast(tensor)

    def set_lr(self, share: float) -> None:
        """Sets Adam's rate to `share` of the full one, without waiting for the device; a CUDA graph sees it too."""
        self.lr = share * self.full_lr
        (group,) = self.optimizer.param_groups
        if self.world.device.type != "cuda":
            group["lr"] = self.lr
        elif isinstance(group["lr"], Tensor):
            group["lr"].fill_(self.lr)
        else:
            group["lr"] = torch.full((), self.lr, device=self.world.device)

    def update(self, loss: Tensor, extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (gradient norm, skipped, extras summed over the ranks), having updated the network or skipped it.

        skipped: float32 scalar on the device, 1 where the world's gradient or loss (the first extra) was not finite. It
        is computed from what was reduced, so it is the same on all ranks, and nobody waits for it.
        """
        self.gradients.fill(torch.autograd.grad(loss, self.parameters), extras)
        self.world.all_reduce(self.gradients.flat)
        norm = torch.linalg.vector_norm(self.gradients.values)
        skipped = (~torch.isfinite(norm + self.gradients.extras[0])).float()
        # GradScaler's hook: where it is 1, a fused Adam does nothing, its step counters included.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        return norm, skipped, self.gradients.extras

    def state_dict(self) -> dict[str, Any]:
        """Returns {network, optimizer}: the live tensors, not copies, in the layout they train in."""
        return {"network": dict(self.network.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over weights, buffers and Adam's moments, in place; its learning rate and betas stay.

        In place, because a CUDA graph has their addresses, and fused Adam wants moments laid out like their parameters.
        """
        self.network.load_state_dict(state["network"])
        moments = state["optimizer"]["state"]
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                for name, value in self.optimizer.state[parameter].items():
                    value.copy_(moments[index][name])


class FlatGradients:
    """All gradients of a network and a few scalars behind them in one buffer, so that one all-reduce takes them all."""

    def __init__(self, parameters: Sequence[nn.Parameter], num_extras: int) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        self.flat = parameters[0].new_zeros(count + num_extras)
        self.values = self.flat[:count]
        self.extras = self.flat[count:]
        self.views: list[Tensor] = []
        offset = 0
        for parameter in parameters:  # each view is strided like its parameter, as fused kernels want it
            self.views.append(torch.as_strided(self.flat, parameter.shape, parameter.stride(), offset))
            offset += parameter.numel()

    def fill(self, gradients: Sequence[Tensor], extras: Tensor) -> None:
        """Overwrites everything."""
        torch._foreach_copy_(self.views, list(gradients))
        self.extras.copy_(extras)


class Buffers:
    """A network's running statistics, moved into flat tensors so that keeping and restoring them is a copy or two."""

    def __init__(self, network: nn.Module) -> None:
        buffers = list(network.buffers())
        self.flats = []
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            chosen = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.detach().flatten() for buffer in chosen])
            offset = 0
            for buffer in chosen:
                buffer.data = flat[offset : offset + buffer.numel()].view(buffer.shape)
                offset += buffer.numel()
            self.flats.append(flat)

    def snapshot(self) -> list[Tensor]:
        """Returns copies of the values."""
        return [flat.clone() for flat in self.flats]

    def restore(self, kept: list[Tensor], condition: Tensor) -> None:
        """Puts `kept` back where the scalar `condition` on the device is not 0."""
        for flat, values in zip(self.flats, kept, strict=True):
            flat.copy_(torch.where(condition != 0, values, flat))


class EMA:
    """An exponential moving average over images, which draws steadier pictures.

    Follows `network` with `twin`, an equal network of its own: parameters and batch norm's running statistics.

    After `half_life_images` more images, half of the average is of newer weights, whatever the batch and however many
    ranks share it. Equal weights on all ranks give equal averages: no collective is needed.
    """

    def __init__(
        self, network: nn.Module, twin: nn.Module, half_life_images: int, images_per_step: int, *, ramp: bool = True
    ) -> None:
        parameter = next(network.parameters())
        self.network = twin.to(device=parameter.device, dtype=parameter.dtype).to(memory_format=torch.channels_last)
        self.network.eval().requires_grad_(False)
        self.network.load_state_dict(network.state_dict())
        self._half_life, self._images_per_step, self._ramp = float(half_life_images), images_per_step, ramp
        theirs, mine = network.state_dict(), self.network.state_dict()
        followed = [name for name in mine if mine[name].is_floating_point()]
        self._mine, self._theirs = [mine[name] for name in followed], [theirs[name] for name in followed]
        self._counts = [(mine[name], theirs[name]) for name in mine if name not in followed]

    @torch.no_grad()
    def update(self, images_seen: int) -> None:
        """Folds in the weights after a step, without a host sync; `images_seen` counts that step's images."""
        half_life = min(self._half_life, EMA_RAMP * images_seen) if self._ramp else self._half_life
        weight = 1 - 0.5 ** (self._images_per_step / max(half_life, 1e-9))
        torch._foreach_lerp_(self._mine, self._theirs, weight)
        for mine, theirs in self._counts:
            mine.copy_(theirs)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within it no gradient is computed for the network's parameters; gradients still pass through to its input."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
