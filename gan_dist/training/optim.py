"""A network with all that moves it: flat gradients, Adam, buffers, and the average of its weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from gan_dist.distributed.world import World
from gan_dist.training.adam import RampedAdam
from gan_dist.training.gradients import FlatGradients

EMA_RAMP = 0.05
"""Early on the half-life is this share of the images seen so far (Karras et al. 2020, arXiv:2006.06676): the average
forgets the first, meaningless weights."""


class Player:
    """A network in training: `update` all-reduces the gradients of a local loss and applies Adam."""

    def __init__(
        self,
        network: nn.Module,
        world: World,
        *,
        lr: float,
        betas: tuple[float, float],
        num_extras: int,
        maps: torch.dtype,
        beta2_moves: bool = False,
        num_buckets: int = 1,
    ) -> None:
        """maps: the dtype of the network's maps. Where weights have another, passes use copies in this one.
        num_buckets: in how many parts gradients are summed over the ranks.
        """
        self.network = network
        self.world = world
        self.full_lr = self.lr = lr
        self.parameters = list(network.parameters())
        self.gradients = FlatGradients(self.parameters, num_extras, num_buckets)
        self.betas = betas
        adam = RampedAdam if beta2_moves else torch.optim.Adam
        self.optimizer = adam(self.parameters, lr=lr, betas=betas, fused=True, capturable=world.device.type == "cuda")
        if isinstance(self.optimizer, RampedAdam):
            self.optimizer.beta2 = torch.full((), betas[1], dtype=torch.float64, device=world.device)
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
        self.working = WorkingCopies(network, maps)
        self.leaves = self.working.leaves
        self._one = torch.ones((), dtype=self.parameters[0].dtype, device=world.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the network's result, by the weights that gradients are taken of."""
        if not self.working.by_name:
            return self.network(*args, **kwargs)
        return functional_call(self.network, self.working.by_name, args, kwargs)

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

    def set_beta2(self, beta2: float) -> None:
        """Sets the second decay rate of a RampedAdam, without waiting for the device; a CUDA graph sees it too."""
        self.optimizer.beta2.fill_(beta2)  # type: ignore[attr-defined]

    def update(self, loss: Tensor, *extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (gradient norm, skipped, extras summed over the ranks), having updated the network or skipped it.

        skipped: float32 scalar on the device, 1 where the world's gradient or loss (the first extra) was not finite. It
        is computed from what was reduced, so it is the same on all ranks, and nobody waits for it.
        """
        self.gradients.take(loss, self.leaves, self._one, extras, self.world)
        norm = torch.linalg.vector_norm(self.gradients.values)
        both = norm + self.gradients.extras[0]
        skipped = (both - both).nan_to_num(nan=1.0).float()  # what is not finite leaves NaN
        # GradScaler's hook: where it is 1, a fused Adam does nothing, its step counters included.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.working.refresh()
        return norm, skipped, self.gradients.extras

    def state_dict(self) -> dict[str, Any]:
        """Returns {network, optimizer}: the live tensors, not copies, in the layout they train in."""
        return {"network": dict(self.network.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over weights, buffers and Adam's moments (unless they are None), in place; its learning rate and betas
        stay.

        In place, because a CUDA graph has their addresses, and fused Adam wants moments laid out like their parameters.
        """
        self.network.load_state_dict(state["network"])
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters if state["optimizer"] is not None else ()):
                for name, value in self.optimizer.state[parameter].items():
                    value.copy_(state["optimizer"]["state"][index][name])
        self.working.refresh()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it no gradient is computed for the network's weights; gradients still pass through to its input."""
        for weight in (*self.parameters, *self.leaves):
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in (*self.parameters, *self.leaves):
                weight.requires_grad_(True)


class WorkingCopies:
    """Weights of convolutions in the dtype of the maps, all made anew at once after each update.

    Autocast would cast each weight in each pass, and each gradient back.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        """Where the weights have that dtype already there are no copies: `leaves` are the parameters themselves."""
        self.by_name: dict[str, Tensor] = {}
        self._sources: list[Tensor] = []
        self.leaves: list[Tensor] = list(network.parameters())
        for prefix, module in network.named_modules():
            # A parametrised weight is computed anew in each pass, in full precision.
            plain = isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not is_parametrized(module)
            if plain and module.weight.dtype != dtype:
                weight: Any = module.weight
                copy = weight.detach().to(dtype).requires_grad_()
                self.by_name[f"{prefix}.weight"] = copy
                self._sources.append(weight)
                self.leaves = [copy if leaf is weight else leaf for leaf in self.leaves]

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copies equal the weights again, in place."""
        if self._sources:
            torch._foreach_copy_(list(self.by_name.values()), self._sources)


class Buffers:
    """All running statistics of some networks, moved into one flat tensor: keeping or restoring them is one launch."""

    ALIGNMENT = 16

    def __init__(self, *networks: nn.Module) -> None:
        places: list[tuple[Tensor, int]] = []
        self.parts: list[slice] = []
        """Of `flat`, by network."""
        end = 0
        for network in networks:
            begin = end
            # The largest numbers first: torch.compile compares places in elements, whatever their sizes, and what it
            # takes for overlapping it refuses.
            for buffer in sorted(network.buffers(), key=lambda buffer: -buffer.element_size()):
                places.append((buffer, end))
                end += -(-buffer.numel() * buffer.element_size() // self.ALIGNMENT) * self.ALIGNMENT
            self.parts.append(slice(begin // 8, end // 8))
        content = torch.zeros(end, dtype=torch.uint8, device=next(networks[0].parameters()).device)
        for buffer, begin in places:
            size = buffer.numel() * buffer.element_size()
            view = content[begin : begin + size].view(buffer.dtype).view(buffer.shape)
            view.copy_(buffer.detach())
            buffer.data = view
        self.flat = content.view(torch.int64)
        """Their bits: nothing is computed with them here."""

    def snapshot(self) -> Tensor:
        """Returns a copy of the values."""
        return self.flat.clone()

    def restore(self, kept: Tensor, condition: Tensor, part: slice = slice(None)) -> None:
        """Puts `kept` back, or a part of it, where the scalar `condition` on the device is not 0."""
        values = self.flat[part]
        torch.where(condition != 0, kept[part], values, out=values)


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
