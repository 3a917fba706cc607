"""The algorithm: d_steps discriminator updates and one generator update of one game that all ranks play together.

Goodfellow et al. 2014, algorithm 1, with Adam. runner.py decides how it is run (eager, compiled, as a CUDA graph):
nothing here waits for the device, and no branch depends on a value on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gan_dist.config.schema import LossName
from gan_dist.data.classes import one_hot
from gan_dist.data.order import rank_slice
from gan_dist.distributed.exchange import PLAIN, Collectives
from gan_dist.distributed.world import World
from gan_dist.model import losses
from gan_dist.model.augment import NO_AUGMENT, NUMBERS, Augment
from gan_dist.model.batchnorm import prepare
from gan_dist.model.kernels import Kernels
from gan_dist.model.losses import PAIRED, SHIFT_INVARIANT
from gan_dist.model.networks import IMAGE_CHANNELS
from gan_dist.model.penalty import NO_PENALTY, GradientPenalty
from gan_dist.training.draws import draw_dropped, draw_noise, draw_uniform
from gan_dist.training.optim import Buffers, Player
from gan_dist.training.schedule import CONSTANT, STILL, Beta2Ramp, Schedule
from gan_dist.utils.tensors import copy_state, to_host

Precision = Literal["bf16", "tf32", "fp32", "fp64"]


def maps_dtype(precision: Precision) -> torch.dtype:
    """Returns the dtype of the networks' maps."""
    return {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)


STATS = (
    "loss/discriminator",
    "loss/generator",
    "probability/real",
    "probability/fake",
    "probability/fake_after_update",
    "value/minimax",
    "gradient_norm/discriminator",
    "gradient_norm/generator",
    "control/stop",
    "control/save",
    "control/skipped",
)
"""What a step returns, in order. All are the whole world's: losses, probabilities and the value are means over the
global batch; control/stop and control/save are the numbers of ranks that ask to stop and to save; control/skipped is
the number of this step's updates (of D and of G) that were not applied because a gradient or loss was not finite."""
Requests = tuple[float, float]
"""(stop, save): 1 where a rank asks for it, else 0."""
NO_REQUESTS: Requests = (0.0, 0.0)
LABEL_DROPOUT = 0.1
"""Share of images, real and generated, that lose their label for a step: from them the unconditional part of both
networks learns what all classes have in common, and a class can be asked for with more or less strength."""


class Update:
    """One step of the game, and the state that it moves."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        world: World,
        global_batch: int,
        loss: LossName = "non_saturating",
        real_target: float = 1.0,
        generator_target: float | None = None,
        penalty: GradientPenalty = NO_PENALTY,
        augment: Augment = NO_AUGMENT,
        g_lr: float = 2e-4,
        d_lr: float = 2e-4,
        g_betas: tuple[float, float] = (0.5, 0.999),
        d_betas: tuple[float, float] = (0.5, 0.999),
        schedule: Schedule = CONSTANT,
        beta2_ramp: Beta2Ramp = STILL,
        d_steps: int = 1,
        precision: Precision = "fp32",
        sync_batchnorm: bool = True,
        batchnorm_kernels: Kernels = "torch",
        collectives: Collectives = PLAIN,
    ) -> None:
        """Moves both networks to the world's device and broadcasts rank 0's parameters and buffers.

        batchnorm_kernels and collectives: what kernels.resolve_kernels and exchange.resolve_collectives returned.
        """
        self.world = world
        self.global_batch = global_batch
        self.d_steps = d_steps
        self.sync_batchnorm = sync_batchnorm
        self.precision = precision
        self.batchnorm_kernels = batchnorm_kernels
        self.collectives = collectives
        self.num_classes: int = getattr(generator, "num_classes", 0)
        self._labelled = min(1, self.num_classes)  # how many of a pass's draws are classes
        self.loss = loss
        self._paired = loss in PAIRED
        judge: Any = discriminator  # of which nn.Module says nothing
        judge.level_counts = loss not in SHIFT_INVARIANT
        self._judges_alone: bool = judge.sees_images_alone
        fused = batchnorm_kernels == "triton"
        terms: Any = import_module("gan_dist.model.losses_triton") if fused else losses
        self.discriminator_terms, self.generator_terms = terms.discriminator_terms, terms.generator_terms
        self.real_target = real_target
        self.generator_target = generator_target
        self.penalty = penalty
        self.augment = augment
        self.probability = torch.full((), 0.0 if augment.adapts else augment.probability, device=world.device)
        self.lo, self.hi = rank_slice(global_batch, world.rank, world.size)
        self.schedule = schedule
        self.beta2_ramp = beta2_ramp
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        for network in (generator, discriminator):
            network.to(device=world.device, dtype=self.dtype).to(memory_format=torch.channels_last).train()
            alone = World(device=world.device)
            prepare(network, world if sync_batchnorm else alone, batchnorm_kernels, collectives.one_shot)
        self.maps = maps = maps_dtype(precision)
        if fused and maps == torch.bfloat16 and not penalty.differentiates_twice:
            layers: Any = import_module("gan_dist.model.image_layers_triton")
            generator.to_images, discriminator.to_maps = layers.to_images, layers.to_maps
        # D's buffer also carries loss, D(x), D(G(z)) and the value; G's the loss, D(G(z)) and the requests.
        shared: dict[str, Any] = {"maps": maps, "num_buckets": collectives.gradient_buckets}
        shared["beta2_moves"] = beta2_ramp.images > 0
        self.g = Player(generator, world, lr=g_lr, betas=g_betas, num_extras=4, **shared)
        extras = 5 if augment.adapts else 4
        self.d = Player(discriminator, world, lr=d_lr, betas=d_betas, num_extras=extras, **shared)
        self.buffers = Buffers(generator, discriminator)

    def begin(self, images_seen: int) -> None:
        """Sets what a step at this position takes from the host: learning rates and decay rates. To be called before
        each step."""
        for player in (self.g, self.d):
            if not self.schedule.constant:
                player.set_lr(self.schedule(images_seen))
            if self.beta2_ramp.images:
                player.set_beta2(self.beta2_ramp(player.betas[1], images_seen))

    def draw(self, seed: int, position: int, classes: Tensor | None = None) -> list[Tensor]:
        """Returns what D's update at `position` takes beside images and latents, this rank's share: random numbers and,
        in a game with classes, first of all its images' `classes`, int64 [b], one-hot where they were not dropped."""
        draws = []
        if self.num_classes:
            assert classes is not None, "a game with classes needs those of its images"
            part = (self.lo, self.hi, self.world.device)
            dropped = draw_dropped(seed, position, self.global_batch, LABEL_DROPOUT, *part)
            draws.append(one_hot(classes.masked_fill(dropped, 0), self.num_classes, self.dtype))
        if self.augment.changes:
            numbers = (2, self.global_batch, NUMBERS)
            draws.append(draw_uniform(seed, position, numbers, self.lo, self.hi, self.world.device, self.dtype))
        if not self.penalty.kinds or self.penalty.method == "exact":
            return draws
        side: Any = self.d.network.resolution
        shape = (self.penalty.kinds, self.global_batch, IMAGE_CHANNELS, side, side)
        every, device = self.penalty.every, self.world.device
        return [*draws, draw_noise(seed, position, shape, every, self.lo, self.hi, device, self.dtype)]

    def step(
        self,
        reals: Sequence[Tensor],
        latents: Sequence[Tensor],
        requests: Requests | Tensor = NO_REQUESTS,
        draws: Sequence[Tensor] = (),
    ) -> Tensor:
        """Returns STATS, one vector on the device, after d_steps updates of D and one of G.

        reals: d_steps local uint8 batches [b, 3, S, S]; latents: as many local [b, Z]; requests: this rank's, as
        Requests or a tensor [2]; draws: what `draw` returned for each of the d_steps, one after another. An all-reduce
        a network and update carries gradients, statistics and requests.
        """
        d, g, buffers = self.d, self.g, self.buffers
        of_d = buffers.parts[1]
        num_skipped: list[Tensor] = []
        each = len(draws) // self.d_steps
        for k, (real, z) in enumerate(zip(reals, latents, strict=True)):
            last = k == self.d_steps - 1
            # A skipped update also undoes what its forward passes did to batch norm's running statistics.
            kept = buffers.snapshot()
            drawn = draws[k * each : (k + 1) * each]
            with torch.set_grad_enabled(last):
                fake = self.generate(z, *drawn[: self._labelled])
                if self.augment.changes:
                    real, fake = self.change(real, fake, *drawn)
            d_loss, d_extras = self.discriminator_pass(real, fake.detach(), *drawn)
            d_norm, d_bad, d_sums = d.update(d_loss, d_extras)
            if self.augment.adapts:
                self.augment.adapt(self.probability, d_sums[4], self.global_batch, d_bad)
            buffers.restore(kept, d_bad, of_d if last else slice(None))  # the last fakes belong to G's update
            num_skipped.append(d_bad)
        kept[of_d] = buffers.flat[of_d]
        with d.frozen():
            g_loss, g_extras = self.generator_pass(fake, real, *drawn)
            if not isinstance(requests, Tensor):  # filled by kernels: a copy from the host would wait for the device
                requests = torch.cat([g_extras.new_full((1,), value) for value in requests])
            g_norm, g_bad, g_sums = g.update(g_loss, g_extras, requests)
        buffers.restore(kept, g_bad)
        skipped = sum(num_skipped, g_bad)
        values = [d_sums[0], g_sums[0], d_sums[1], d_sums[2], g_sums[1], d_sums[3], d_norm, g_norm]
        values += [g_sums[2], g_sums[3], skipped]
        return torch.stack([value.to(self.dtype) for value in values])

    # The four passes below are what a runner may compile.

    def generate(self, latents: Tensor, *classes: Tensor) -> Tensor:
        """Returns fakes [b, 3, S, S] in [-1, 1], in a game with classes those of the real images at their places."""
        with self._autocast():
            images: Tensor = self.g(latents.to(self.maps), *classes)
        return images

    def change(self, real: Tensor, fake: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Returns uint8 `real` images made signed, and `fake` ones, both augmented: once, for D's pass and for G's."""
        kinds = (to_signed(real, fake.dtype), fake)
        numbers = draws[self._labelled].unbind()
        changed = [self.augment(one, each, self.probability) for one, each in zip(kinds, numbers, strict=True)]
        return changed[0], changed[1]

    def discriminator_pass(self, real: Tensor, fake: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Returns D's loss and [loss, D(x), D(G(z)), V(D, G)], for `fake` in [-1, 1] and `real`: uint8, or what
        `change` made of it.

        draws: what `draw` returned. D is to be smooth where it looks: noise comes upon what augmentation made.
        """
        classes, draws = draws[: self._labelled], draws[self._labelled :]
        images = real_and_fake(real, fake)
        exact = self.penalty.method == "exact"
        if self.penalty.kinds and not exact:
            images = torch.cat([images, *self.penalty.noisy(images.chunk(2), draws[-1], self.lo)])
        if self.penalty.differentiates_twice:
            images.requires_grad_()
        again = [each[self.penalty.places(self.lo)] for each in classes] * (0 if exact else self.penalty.kinds)
        with self._autocast():
            plain = logits = self._judge(images, 2, [*classes, *classes, *again])
        if self.penalty.kinds:
            logits = logits.to(self.dtype)
            plain = logits[: 2 * len(real)]
        loss, extras = self.discriminator_terms(
            plain, self.global_batch, self.loss, self.real_target, self.augment.adapts
        )
        if self.penalty.kinds:
            penalty = self.penalty(logits, images, len(real), self.lo, self.global_batch)
            loss = loss + penalty
            extras[0] += penalty.detach()
        return loss, extras

    def generator_pass(self, fake: Tensor, real: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Returns G's loss and [loss, D(G(z))], through the discriminator as it stands.

        The `real` images, as in D's pass, count only where the loss compares pairs.
        """
        classes = draws[: self._labelled]
        kinds = [to_signed(real, fake.dtype), fake] if self._paired else [fake]
        with self._autocast():
            if self._paired and self._judges_alone:  # nobody needs the way back through real images
                with torch.no_grad():
                    of_reals = self._judge(kinds[0], 1, classes)
                logits = torch.cat([of_reals, self._judge(kinds[1], 1, classes)])
            else:
                images = torch.cat(kinds) if self._paired else fake
                logits = self._judge(images, len(kinds), list(classes) * len(kinds))
        terms: tuple[Tensor, Tensor] = self.generator_terms(logits, self.global_batch, self.loss, self.generator_target)
        return terms

    def _judge(self, images: Tensor, groups: int, classes: Sequence[Tensor]) -> Tensor:
        """Returns D's logits of `images`; in a game with classes, of those whose rows these are, part after part."""
        logits: Tensor = self.d(images, groups, torch.cat(list(classes))) if classes else self.d(images, groups=groups)
        return logits

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def snapshot(self, into: Any = None) -> dict[str, Any]:
        """Returns {generator, discriminator, optimizer_g, optimizer_d}: copies, in the layout and place that trains.

        `into`: an earlier snapshot that nobody needs any more; its tensors are overwritten instead of new ones made.
        """
        g, d = self.g.state_dict(), self.d.state_dict()
        state = {
            "generator": g["network"],
            "discriminator": d["network"],
            "optimizer_g": g["optimizer"],
            "optimizer_d": d["optimizer"],
        }
        if self.augment.adapts:
            state["augment"] = {"probability": self.probability}
        copied: dict[str, Any] = copy_state(state, into)
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Returns a snapshot in host memory and torch's default layout: what a checkpoint holds."""
        state: dict[str, Any] = to_host(self.snapshot())
        return state

    def networks(self) -> dict[str, dict[str, Tensor]]:
        """Returns {generator, discriminator}: the live tensors by name."""
        return {"generator": self.g.state_dict()["network"], "discriminator": self.d.state_dict()["network"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state, bit for bit. Learning rates and betas stay those that this Update was made with; where
        the state has no optimisers, Adam's moments stay too."""
        self.g.load_state_dict({"network": state["generator"], "optimizer": state.get("optimizer_g")})
        self.d.load_state_dict({"network": state["discriminator"], "optimizer": state.get("optimizer_d")})
        if self.augment.adapts and "augment" in state:  # a run that begins with another's weights may find none
            self.probability.copy_(state["augment"]["probability"])


def to_signed(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns uint8 `images` as `dtype` in [-1, 1], in channels_last: 0 becomes -1 and 255 becomes 1. Others are so
    already."""
    return _write_signed(images, _empty(images.shape, images.device, dtype)) if images.dtype == torch.uint8 else images


def real_and_fake(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the batch [2 b, 3, S, S] of `real` images made signed, then `fake` ones, in the dtype of these."""
    if real.dtype != torch.uint8:
        return torch.cat([real, fake])
    both = _empty((2 * len(fake), *fake.shape[1:]), fake.device, fake.dtype)
    _write_signed(real, both[: len(fake)])  # in its place: neither is copied once more
    both[len(fake) :].copy_(fake)
    return both


def _write_signed(images: Tensor, out: Tensor) -> Tensor:
    return out.copy_(images).sub_(127.5).div_(127.5)  # exact but for the division, in bfloat16 too


def _empty(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), device=device, dtype=dtype, memory_format=torch.channels_last)
