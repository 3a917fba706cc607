"""W ranks play the game that one rank would play on the whole batch, to rounding; and the tests can tell when not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gan_dist.distributed.world import World
from gan_dist.model.augment import Augment
from gan_dist.model.batchnorm import BatchNorm
from gan_dist.model.penalty import GradientPenalty
from gan_dist.training.draws import draw_noise
from gan_dist.training.schedule import Beta2Ramp
from tests.helpers.games import CPU, STYLES, batches, game, moves, tensors, worst
from tests.helpers.ranks import run_ranks

WORLDS = (2, 3, 4)
STEPS = 3
MINIMAX = {"loss": "minimax"}
SMOOTHED = {"loss": "non_saturating", "real_target": 0.9, "generator_target": 0.9}
CASES: dict[str, dict[str, Any]] = {
    f"{loss['loss']}-d{d_steps}-batch{batch}": {**loss, "d_steps": d_steps, "global_batch": batch}
    for loss in (MINIMAX, SMOOTHED)
    for d_steps in (1, 2)
    for batch in (12, 7)  # 12 divides evenly by 2, 3 and 4; 7 by none
}
CASES |= {
    "relativistic-d2-batch7": {"loss": "relativistic", "d_steps": 2, "global_batch": 7},
    "hinge-spectral-nearest": {
        "loss": "hinge",
        "global_batch": 7,
        "model": {"d_norm": "spectral", "upsample": "nearest", "init": "he"},
    },
    "least-squares-no-norm": {"loss": "least_squares", "global_batch": 7, "model": {"d_norm": "none"}},
    "penalty-third-of-reals": {
        "global_batch": 7,
        "d_steps": 2,
        "model": {"d_norm": "none"},
        "penalty": GradientPenalty(0.5, 0.1, kinds=1, every=3),
    },
    "classes-penalty-all-spectral": {
        "global_batch": 7,
        "model": {"classes": STYLES, "d_norm": "spectral"},
        "penalty": GradientPenalty(0.5, 0.1, kinds=2),
    },
    "augment-adapted": {
        "global_batch": 7,
        "d_steps": 2,
        "augment": Augment(True, True, True, target=0.1, images_to_full=20),
    },
    "augment-relativistic": {"global_batch": 7, "loss": "relativistic", "augment": Augment(True, True, True, 0.7)},
    "augment-penalty": {
        "global_batch": 7,
        "model": {"d_norm": "none"},
        "augment": Augment(True, True, True, 0.7),
        "penalty": GradientPenalty(0.5, 0.1, kinds=2, every=2),
    },
    "minibatch-std": {"global_batch": 7, "model": {"minibatch_std": True}},
    "minibatch-std-residual": {
        "global_batch": 7,
        "model": {"minibatch_std": True, "d_norm": "spectral", "blocks": "residual"},
    },
    "ramped-adam": {"global_batch": 7, "g_betas": (0.0, 0.9), "d_betas": (0.0, 0.9), "beta2_ramp": Beta2Ramp(0.99, 20)},
    "classes-relativistic": {
        "global_batch": 7,
        "d_steps": 2,
        "loss": "relativistic",
        "model": {"classes": STYLES, "d_norm": "none"},
    },
    "relativistic-penalty-augment-nearest": {  # paintings64-modern
        "global_batch": 7,
        "loss": "relativistic",
        "model": {"upsample": "nearest", "d_norm": "none", "init": "he"},
        "penalty": GradientPenalty(0.5, 0.1, kinds=2, every=4),
        "augment": Augment(colour=True, translation=True),
        "g_betas": (0.0, 0.99),
        "d_betas": (0.0, 0.99),
    },
    "wasserstein-spectral-penalty": {  # whose parts of the last bias's gradient cancel out only but for rounding
        "loss": "wasserstein",
        "global_batch": 7,
        "model": {"d_norm": "spectral"},
        "penalty": GradientPenalty(0.5, 0.1, kinds=1),
    },
    "classes-penalty-augment": {
        "global_batch": 7,
        "real_target": 0.9,  # else real and generated images' parts of the last bias's gradient cancel out nearly
        "model": {"classes": STYLES, "d_norm": "none"},
        "penalty": GradientPenalty(0.5, 0.1, kinds=2, every=3),
        "augment": Augment(True, True, True, 0.7),
    },
    "penalty-exact": {
        "global_batch": 7,
        "model": {"d_norm": "none"},
        "penalty": GradientPenalty(0.5, kinds=2, every=2, method="exact"),
    },
}
PLAIN = "non_saturating-d1-batch7"
CASE_OF = {
    "local batch norm": PLAIN,
    "D's reduction skipped": PLAIN,
    "mean losses on unequal slices": PLAIN,
    "the same latents everywhere": PLAIN,
    "the same noise everywhere": "penalty-third-of-reals",
    "places counted on each rank": "penalty-third-of-reals",
    "the same changes everywhere": "augment-relativistic",
    "local deviations": "minibatch-std",
    "labels not sliced with images": "classes-relativistic",
}
"""Each control breaks a case."""


def _play(world: World, case: str, control: str = "", requests: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """Returns first-step gradients, third-step state and statistics; `control` breaks the game in one way."""
    update = game(world, sync_batchnorm=control != "local batch norm", **CASES[case])
    if control == "D's reduction skipped":
        update.d.world = World()
    if control == "local deviations":
        update.d.network.get_submodule("minibatch_std").process_group = None  # type: ignore[assignment]
    share = batches(update, 0)[0][0].shape[0]
    if control == "mean losses on unequal slices":
        update.global_batch, draw_from = share * world.size, update.global_batch
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        update.begin(step * update.global_batch)
        if control == "mean losses on unequal slices":
            update.global_batch, mean_of = draw_from, update.global_batch
            reals, latents = batches(update, step)
            update.global_batch = mean_of
        else:
            reals, latents = batches(update, step)
        if control == "the same latents everywhere":
            latents = [z[:share] for z in batches(game(None, **CASES[case]), step)[1]]
        _, _, _, draws = moves(update, step)
        if control in ("the same noise everywhere", "the same changes everywhere"):
            alone = moves(game(None, **CASES[case]), step)[3]
            draws = [whole[:, : own.shape[1]] for whole, own in zip(alone, draws, strict=True)]
        if control == "labels not sliced with images":
            alone = moves(game(None, **CASES[case]), step)[3]
            draws = [whole[:share] for whole in alone]
        if control == "places counted on each rank":
            update.lo = 0
            draws = [draw_noise(7, step, (1, share, 3, 32, 32), 3, 0, share, CPU, torch.float64) for _ in draws]
        stats = update.step(reals, latents, requests, draws)
        if step == 0:
            gradients = {"d": update.d.gradients.values.clone(), "g": update.g.gradients.values.clone()}
    return {"gradients": gradients, "state": tensors(update), "stats": stats}


def _oracle(world: World) -> dict[str, Tensor]:
    """Returns D's gradients with batch norm off: ours summed, and DistributedDataParallel's."""
    update = game(world, global_batch=8)
    update.d.network.eval()
    (real,), (z,) = batches(update, 0)
    fake = update.generate(z).detach()
    loss, extras = update.discriminator_pass(real, fake)
    update.d.gradients.fill(torch.autograd.grad(loss, update.d.parameters), [extras])
    world.all_reduce(update.d.gradients.flat)
    ours = update.d.gradients.values.clone()
    network = game(World(), global_batch=8).d.network.eval()
    ddp = nn.parallel.DistributedDataParallel(network, process_group=world.group, broadcast_buffers=False)
    both = torch.cat([real.double() / 127.5 - 1, fake])
    half = real.shape[0]
    targets = torch.cat([torch.ones(half), torch.zeros(half)]).double()
    loss = 2 * F.binary_cross_entropy_with_logits(ddp(both), targets)  # the mean over two halves; D's loss adds them
    torch.autograd.backward(loss)
    gradients = []
    for parameter in network.parameters():
        assert parameter.grad is not None
        gradients.append(torch.empty_like(parameter).copy_(parameter.grad).detach())
    return {"ours": ours, "ddp": torch.cat([torch.as_strided(g, (g.numel(),), (1,)) for g in gradients])}


def _batch_norm(world: World) -> dict[str, Tensor]:
    """Returns a grouped pass forward, backward and running statistics over unequal shares."""
    layer = BatchNorm(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1, 2]))
    layer.process_group = world.group
    stream = torch.Generator().manual_seed(5)
    x, dy = torch.randn(2, 2, 7, 3, 4, 4, dtype=torch.float64, generator=stream)  # [groups, batch, C, H, W] each
    lo, hi = world.rank * 7 // world.size, (world.rank + 1) * 7 // world.size
    share = (5 + 3 * x[:, lo:hi]).flatten(0, 1).requires_grad_()
    y = layer(share, groups=2)
    grads = torch.autograd.grad(y, [share, layer.weight, layer.bias], dy[:, lo:hi].flatten(0, 1))
    weight_bias = world.all_reduce(torch.cat(grads[1:]))
    return {
        "y": y.detach().reshape(2, hi - lo, 3, 4, 4),
        "dx": grads[0].reshape(2, hi - lo, 3, 4, 4),
        "weight_bias": weight_bias,
        "running": torch.cat([layer.running_mean, layer.running_var]),
    }


def _counts(world: World) -> dict[str, int]:
    """Returns how often a step calls each collective of torch.distributed."""
    update = game(world, global_batch=8)
    calls: dict[str, int] = {}
    honest = {name: getattr(dist, name) for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast"))}
    for name, function in honest.items():

        def counted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            large = _name == "all_reduce" and args[0].numel() > 1000
            calls["gradients" if large else _name] = calls.get("gradients" if large else _name, 0) + 1
            return _function(*args, **kwargs)

        setattr(dist, name, counted)
    update.step(*batches(update, 0))
    for name, function in honest.items():
        setattr(dist, name, function)
    return calls


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    worlds: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in WORLDS}
    results: dict[str, Any] = {}
    for size, group in worlds.items():
        if rank >= size:
            continue
        world = World(rank=rank, size=size, device=CPU, group=group)
        for case in CASES:
            results[f"{size} {case}"] = _play(world, case, requests=(float(rank == 1), 0.0))
        results[f"{size} batch norm"] = _batch_norm(world)
        results[f"{size} oracle"] = _oracle(world)
        results[f"{size} counts"] = _counts(world)
        if size == 2:
            for control, case in CASE_OF.items():
                results[control] = _play(world, case, control)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, Any]]]:
    """What each of four gloo ranks found, in worlds of 2, 3 and 4 of them."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(max(WORLDS), _rank, folder)
        yield [torch.load(Path(folder) / f"{rank}.pt") for rank in range(max(WORLDS))]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {case: _play(World(), case) for case in CASES}


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_ranks_play_one_game(ranks: list[dict[str, Any]], alone: dict[str, Any], size: int, case: str) -> None:
    played, reference = ranks[0][f"{size} {case}"], alone[case]
    assert worst(played["gradients"], reference["gradients"]) < 1e-12
    assert worst(played["state"], reference["state"]) < 1e-12
    torch.testing.assert_close(played["stats"][:8], reference["stats"][:8], rtol=1e-11, atol=0)
    assert played["stats"][8] == 1  # one rank of them asked to stop, and all know
    for rank in range(1, size):
        other = ranks[rank][f"{size} {case}"]
        assert torch.equal(other["stats"], played["stats"])
        for name, value in played["state"].items():
            assert torch.equal(other["state"][name], value), f"rank {rank} differs from rank 0 in {name}"


@pytest.mark.parametrize("control", CASE_OF)
def test_the_comparison_sees_a_broken_game(ranks: list[dict[str, Any]], alone: dict[str, Any], control: str) -> None:
    played, reference = ranks[0][control], alone[CASE_OF[control]]
    assert worst(played["gradients"], reference["gradients"]) > 1e-3
    assert worst(played["state"], reference["state"]) > 1e-3


@pytest.mark.parametrize("size", WORLDS)
def test_batch_norm_equals_torchs_on_the_gathered_batch(ranks: list[dict[str, Any]], size: int) -> None:
    found = [ranks[rank][f"{size} batch norm"] for rank in range(size)]
    stream = torch.Generator().manual_seed(5)
    x, dy = torch.randn(2, 2, 7, 3, 4, 4, dtype=torch.float64, generator=stream)
    weight = torch.tensor([0.5, 1, 2], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    weight_bias: Tensor | float = 0
    for g in range(2):
        part = (5 + 3 * x[g]).requires_grad_()
        y = F.batch_norm(part, *running, weight, bias, True)
        grads = torch.autograd.grad(y, [part, weight, bias], dy[g])
        weight_bias = torch.cat(grads[1:]) + weight_bias
        torch.testing.assert_close(torch.cat([f["y"][g] for f in found]), y.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.cat([f["dx"][g] for f in found]), grads[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[0]["weight_bias"], weight_bias, rtol=1e-12, atol=1e-13)
    for f in found:
        torch.testing.assert_close(f["running"], torch.cat(running), rtol=1e-13, atol=0)
        assert torch.equal(f["running"], found[0]["running"])


def test_gradients_equal_distributed_data_parallels(ranks: list[dict[str, Any]]) -> None:
    for size in (2, 4):  # DDP averages over ranks, which is the global mean for equal shares only
        found = ranks[0][f"{size} oracle"]
        assert worst({"gradient": found["ours"]}, {"gradient": found["ddp"]}) < 1e-12


@pytest.mark.parametrize("size", WORLDS)
def test_a_step_calls_no_collective_more_than_it_must(ranks: list[dict[str, Any]], size: int) -> None:
    # Layers with batch norm: 3 in G, 2 in D. Passes: G once; D on real and fake together, D on fake again.
    layer_passes = 3 + 2 + 2
    for rank in range(size):
        counts = ranks[rank][f"{size} counts"]
        assert counts == {"gradients": 2, "all_gather_into_tensor": layer_passes, "all_reduce": layer_passes}
