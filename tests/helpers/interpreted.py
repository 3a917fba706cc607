"""Triton's kernels in its interpreter, on CPUs: what a test asks of them runs in processes that are told so from birth.

An example lies in a world of 1 to 3 ranks: its arrays are cut as a global batch is, each rank has its share.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gan_dist.config.schema import WITH_GENERATOR_TARGET, WITH_REAL_TARGET, LossName
from gan_dist.distributed.world import World
from gan_dist.model.augment import Augment
from gan_dist.model.batchnorm import BatchNorm, prepare
from gan_dist.model.kernels import resolve_kernels
from gan_dist.model.penalty import GradientPenalty
from gan_dist.training.runner import Compiled
from tests.helpers.games import CPU, batches, game, moves, tensors
from tests.helpers.ranks import run_ranks

SIZES = (1, 2, 3)
MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class Example:
    """A layer's input: `images` in each group over all ranks, of `channels` and `side` squared pixels."""

    images: int
    channels: int
    side: int
    groups: int = 1
    slope: float = 0.2
    dtype: torch.dtype = torch.float32
    offset: float = 1.0
    channels_last: bool = True
    programs: int = 1024
    """How many programs the kernels spread over: few of them have chunks of several tiles."""
    tolerance: float = 0.0
    """Of what is computed with the mean, where it is not what the dtype says."""
    tile: int = 4096
    """Values in a tile: small ones make many chunks of few numbers."""
    merged_parts: int = 128
    """Records that a merge has in hand at a time: fewer than there are chunks make it merge in rounds."""

    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x and dy, [groups, images, C, H, W], in the example's dtype, and weight and bias [C], in float64."""
        source = torch.Generator().manual_seed(self.channels)
        shape = (2, self.groups, self.images, self.channels, self.side, self.side)
        x, dy = torch.randn(shape, generator=source, dtype=torch.float64)
        weight, bias = torch.randn(2, self.channels, generator=source, dtype=torch.float64)
        scales = 1 + torch.arange(self.groups).view(-1, 1, 1, 1, 1)
        return (
            (x * scales + self.offset).to(self.dtype),
            dy.to(self.dtype),
            weight.float().double(),
            bias.float().double(),
        )


EXAMPLES = {
    "one tile": Example(3, 8, 4),
    "ReLU, groups": Example(4, 24, 4, groups=2, slope=0.0),
    "no activation, groups": Example(3, 16, 4, groups=2, slope=1.0),
    "odd channels, 1x1": Example(7, 5, 1, groups=2),
    "one channel": Example(5, 1, 8),
    "three channel tiles, the last one broken": Example(3, 130, 2, groups=2),
    "one sample a rank": Example(3, 12, 2, groups=2),
    "far from zero": Example(6, 16, 8, offset=3000.0, tolerance=2e-4),  # float32 has no mean nearer than 1e-4
    "many chunks, merged in two rounds": Example(5, 8, 6, tile=64, merged_parts=16),
    "chunks of many tiles, the last one short": Example(9, 64, 10, groups=2, programs=4),
    "contiguous maps": Example(4, 24, 4, groups=2, channels_last=False),
    "bfloat16": Example(8, 24, 8, groups=2, dtype=torch.bfloat16),
    "bfloat16, ReLU": Example(5, 64, 4, slope=0.0, dtype=torch.bfloat16),
    "float64": Example(7, 24, 4, groups=2, dtype=torch.float64),
    "float64, many chunks": Example(3, 24, 8, groups=2, dtype=torch.float64, tile=256),
}
SHARED = ("ReLU, groups", "odd channels, 1x1", "one sample a rank", "bfloat16", "float64")
"""Those that several ranks play too."""


def share(example: Example, rank: int, size: int) -> slice:
    return slice(rank * example.images // size, (rank + 1) * example.images // size)


def play(example: Example, world: World) -> dict[str, Tensor]:
    """Returns what this rank's share of the example comes to."""
    x, dy, weight, bias = example.arrays()
    layer = BatchNorm(example.channels, EPS, MOMENTUM)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    if example.dtype == torch.float64:
        layer.double()
    prepare(layer, world, "triton")
    mine = share(example, world.rank, world.size)
    layout = torch.channels_last if example.channels_last else torch.contiguous_format
    parts = [values[:, mine].flatten(0, 1).contiguous(memory_format=layout) for values in (x, dy)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("programs", "tile", "merged_parts"):
            patch.setattr(f"gan_dist.model.batchnorm_triton.{name.upper()}", getattr(example, name))
        y = layer(parts[0].requires_grad_(), example.groups, example.slope)
        dx, dweight, dbias = torch.autograd.grad(y, [parts[0], layer.weight, layer.bias], parts[1])
    shape = (example.groups, -1, *x.shape[2:])
    return {
        "y": y.detach().reshape(shape),
        "dx": dx.reshape(shape),
        "dweight": dweight,
        "dbias": dbias,
        "mean": layer.running_mean,
        "var": layer.running_var,
        "batches": layer.num_batches_tracked,
    }


def step_state(world: World, kernels: str, backend: str | None = None) -> dict[str, Tensor]:
    """Returns the state after two steps of a game of 6 images, and the last one's statistics."""
    update = game(world, batchnorm_kernels=kernels)
    runner: Any = Compiled(update, "a test", backend) if backend else update
    for step in range(2):
        stats = runner.step(*batches(update, step))
    return {**tensors(update), "stats": stats[:8]}


def _rank(rank: int, out: str) -> None:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    group: Any = dist.new_group(list(range(size)))
    _save(World(rank=rank, size=size, device=CPU, group=group), out)
    dist.barrier()
    dist.destroy_process_group()


def _save(world: World, out: str) -> None:
    found: dict[str, Any] = {name: play(EXAMPLES[name], world) for name in (EXAMPLES if world.size == 1 else SHARED)}
    if world.size < 3:
        found["step"] = step_state(world, "triton")
    if world.size == 2:  # compiling takes most of the time, and one rank's passes are these without collectives
        found["compiled step"] = step_state(world, "triton", "aot_eager")
    torch.save(found, Path(out) / f"{world.size}-{world.rank}.pt")


def check(dtype: torch.dtype) -> str:
    """Returns what the start's check of the kernels says: nothing where they are right."""
    from gan_dist.model import batchnorm_triton

    try:
        batchnorm_triton.check(CPU, dtype)
    except ArithmeticError as error:
        return str(error)
    return ""


def _save_checks(out: str) -> None:
    """Saves what the check says of the kernels, and of kernels whose last one leaves the activation out."""
    from gan_dist.model import batchnorm_triton

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    right, honest = [check(dtype) for dtype in dtypes], batchnorm_triton._input_gradient
    torch.library.impl("gan_dist::input_gradient", "AutogradCPU")(lambda *arguments: honest(*arguments[:-1], 1.0))
    torch.save({"right": right, "wrong": [check(dtype) for dtype in dtypes]}, Path(out) / "checks.pt")


LOGITS = (2.0, -1.0, 0.0, 1.0, -1e-3, 60.0, -60.0, 3e4, 0.5, -2.5, 17.0)
"""Of images before D is sure, and after; those where a hinge bends among them."""


def logits(count: int, dtype: torch.dtype) -> Tensor:
    """Returns [2 * count]."""
    source = torch.Generator().manual_seed(count)
    drawn = torch.randn(2 * count, generator=source, dtype=torch.float64) * 3
    extremes = torch.tensor(LOGITS, dtype=torch.float64)[: 2 * count]
    drawn[: len(extremes)] = extremes
    return drawn.roll(count // 2).to(dtype)


def terms_of(module: Any, player: str, name: Any, given: Tensor, target: float | None) -> list[Tensor]:
    """Returns the loss, its sums, and the gradient of twice the loss."""
    given = given.clone().requires_grad_()
    if player == "discriminator":
        loss, sums = module.discriminator_terms(given, 7, name, 1.0 if target is None else target, True)
    else:
        loss, sums = module.generator_terms(given, 7, name, target)
    return [loss.detach(), sums, torch.autograd.grad(loss * 2, given)[0]]


COUNTS = {torch.float64: 11, torch.float32: 1030, torch.bfloat16: 1}
"""Logits of each kind: some, more than the kernel has in hand at a time, and one."""
TARGETS = {"discriminator": WITH_REAL_TARGET, "generator": WITH_GENERATOR_TARGET}
"""Which losses take one."""
Case = tuple[str, str, int, torch.dtype, float | None]


def cases() -> list[Case]:
    """Returns (player, loss, count, dtype, target) of all that is compared."""
    return [
        (player, name, count, dtype, target)
        for player in ("discriminator", "generator")
        for name in get_args(LossName)
        for dtype, count in COUNTS.items()
        for target in (None, 0.9)[: 1 + (name in TARGETS[player])]
    ]


def save_losses(out: str) -> None:
    """Saves what the losses' kernel makes of all cases; what the start's check says of it, and of a wrong one; and the
    state and statistics of games that ask for more than the plain one."""
    from gan_dist.model import losses_triton

    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    for player, name, count, dtype, target in cases():
        found[player, name, count, dtype, target] = terms_of(losses_triton, player, name, logits(count, dtype), target)
    found["games"] = {name: played(losses_triton, settings) for name, settings in OTHER_GAMES.items()}
    for what in ("right", "wrong"):
        found[what] = []
        for name in CHECKED:
            try:
                losses_triton.check(CPU, torch.float32, name)
                found[what].append("")
            except ArithmeticError as error:
                found[what].append(str(error))
        losses_triton.KINDS["generator"] = dict.fromkeys(get_args(LossName), ("squares", 0.0, 0.5))
    torch.save(found, Path(out) / RESULTS)


@dataclass(frozen=True)
class ImageExample:
    """What the layers between images and maps are given: `count` images of `side` pixels, maps of `channels`."""

    count: int
    channels: int
    side: int
    slope: float = 0.2
    biased: bool = False
    layout: torch.memory_format = torch.channels_last
    programs: int = 1024
    """How many programs share a sum over pixels: few of them have several tiles each."""

    def arrays(self) -> dict[str, Tensor]:
        """Returns images, maps that are given and maps' gradient, weight and bias, all bfloat16."""
        source = torch.Generator().manual_seed(self.side)
        image, half = (self.count, 3, self.side, self.side), self.side // 2
        maps = (self.count, self.channels, half, half)
        shapes = {"images": image, "maps": maps, "weight": (self.channels, 3, 4, 4), "bias": (self.channels,)}
        drawn = {name: torch.randn(shape, generator=source).bfloat16() for name, shape in shapes.items()}
        return {
            name: each.contiguous(memory_format=self.layout) if each.dim() == 4 else each
            for name, each in drawn.items()
        }


IMAGE_EXAMPLES = {
    "one image": ImageExample(1, 16, 8),
    "a bias, ReLU": ImageExample(3, 24, 8, slope=0.0, biased=True),
    "few channels, no activation": ImageExample(2, 5, 16, slope=1.0, biased=True),
    "three channel tiles, the last one broken": ImageExample(2, 130, 8, biased=True),
    "sums of several tiles, the last one short": ImageExample(5, 16, 12, programs=2, biased=True),
    "a training image": ImageExample(1, 64, 32),
    "contiguous": ImageExample(3, 16, 8, layout=torch.contiguous_format),
}
LAYER_KINDS = ("to_maps", "to_images")


def image_layer(module: Any, kind: str, example: ImageExample, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the result of a layer, and its gradients."""
    given = {name: values.to(dtype).requires_grad_() for name, values in example.arrays().items()}
    if kind == "to_images":
        leaves = {"maps": given["maps"], "weight": given["weight"]}
        result, gradient = module.to_images(*leaves.values()), given["images"]
    else:
        leaves = {name: given[name] for name in ("images", "weight", "bias")[: 2 + example.biased]}
        bias = leaves.get("bias")
        result, gradient = (
            module.to_maps(leaves["images"], leaves["weight"], bias, example.slope),
            given["maps"],
        )
    gradients = torch.autograd.grad(result, list(leaves.values()), gradient.detach())
    return {"result": result.detach(), **dict(zip(leaves, gradients, strict=True))}


IMAGE_GAMES: dict[str, dict[str, Any]] = {
    "thesis": {},
    "penalty": {"model": {"d_norm": "none"}, "penalty": GradientPenalty(1.0, 0.1, 2)},
    "nearest": {"model": {"upsample": "nearest"}},
}


def image_game(layers: Any, settings: dict[str, Any]) -> Tensor:
    """Returns the statistics of a step of a bfloat16 game with these layers at images, and torch's everything else."""
    update = game(precision="bf16", global_batch=4, **settings)
    networks: tuple[Any, Any] = update.g.network, update.d.network
    if layers:
        networks[0].to_images, networks[1].to_maps = layers.to_images, layers.to_maps
    return update.step(*moves(update, 0))[:8]


def save_image_layers(out: str) -> None:
    """Saves what the kernels make of all examples; what the start's check says of them, and of wrong ones; and
    what games come to with them."""
    from gan_dist.model import image_layers_triton as layers

    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    for name, example in IMAGE_EXAMPLES.items():
        for kind in LAYER_KINDS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layers, "PROGRAMS", example.programs)
                found[name, kind] = image_layer(layers, kind, example, torch.bfloat16)
    found["games"] = {name: image_game(layers, settings) for name, settings in IMAGE_GAMES.items()}
    leaf, scale = torch.ones(1, 3, 8, 8, requires_grad=True), torch.ones((), requires_grad=True)
    maps = layers.to_maps(leaf, torch.ones(16, 3, 4, 4), None, 0.2) * scale
    (first,) = torch.autograd.grad(maps.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # torch would warn, and leave a part of it out
        torch.autograd.backward(first.sum())
    given, ops = IMAGE_EXAMPLES["one image"].arrays(), torch.ops.gan_dist
    results = [  # what was activated may come in any layout
        (
            ops.maps_to_image(given["maps"], activated, given["weight"], 0.2),
            ops.image_weight_gradient(given["images"], given["maps"], activated, 0.2),
        )
        for activated in (given["maps"].neg(), given["maps"].neg().contiguous())
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    layers.PROGRAMS = 1
    layers.check(CPU, 8, 20, 40, biased=True)
    honest = layers._maps_to_image
    torch.library.impl("gan_dist::maps_to_image", "AutogradCPU")(lambda maps, _, *rest: honest(maps, None, *rest))
    try:
        layers.check(CPU, 8, 20, 40, biased=True)
    except ArithmeticError as error:
        found["wrong"] = str(error)
    torch.save(found, Path(out) / RESULTS)


CHECKED: tuple[LossName, ...] = ("hinge", "relativistic")
OTHER_GAMES: dict[str, dict[str, Any]] = {
    "penalty": {"model": {"d_norm": "none"}, "penalty": GradientPenalty(1.0, 0.1, 2), "loss": "least_squares"},
    "augmented pairs": {"augment": Augment(translation=True, target=0.6), "loss": "relativistic", "real_target": 1.0},
}


def played(losses: Any, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state after two steps of a game with these losses and torch's batch norm, and its statistics."""
    update = game(**settings)
    update.discriminator_terms, update.generator_terms = losses.discriminator_terms, losses.generator_terms
    for step in range(2):
        stats = update.step(*moves(update, step))
    return {**tensors(update), "stats": stats[:8]}


def main(out: str) -> None:
    """Plays everything, in each of the worlds."""
    torch.set_num_threads(1)
    for size in SIZES:
        if size == 1:
            _save(World(), out)
        else:
            run_ranks(size, _rank, out)
    _save_checks(out)


def without_triton() -> None:
    """Plays a step, and asks for the kernels of a GPU."""
    game(None).step(*batches(game(None), 0))
    kernels, why = resolve_kernels("auto", World(device=torch.device("cuda", 0)), torch.float32)
    print(f"{kernels}: {why}")


RESULTS = "results.pt"


def interpreted_results(save: str, out: Path) -> dict[Any, Any]:
    """Returns what the function `save` of this module has saved to RESULTS in `out`, under the interpreter."""
    done = interpreted(f"{save}(sys.argv[1])", out)
    assert done.returncode == 0, done.stdout
    loaded: dict[Any, Any] = torch.load(out / RESULTS, weights_only=False)
    return loaded


def interpreted(
    call: str, *arguments: object, path: Path | None = None, limit: float = 550
) -> subprocess.CompletedProcess[str]:
    """Returns a finished process that imported this module under the interpreter and ran `call`, e.g. main('/tmp').

    path: a folder whose modules come before all others.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    code = f"import sys\nfrom tests.helpers import interpreted\ninterpreted.{call}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        text=True,
        timeout=limit,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
