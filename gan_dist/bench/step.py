"""How fast the update runs on this machine, beside what the machine could do: `gan-dist bench step`."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from gan_dist.distributed.exchange import resolve_collectives
from gan_dist.distributed.world import World
from gan_dist.model.initialise import initialise
from gan_dist.model.kernels import resolve_kernels
from gan_dist.model.networks import Discriminator, Generator
from gan_dist.training.runner import Runner, make_runner, resolve_precision
from gan_dist.training.update import Update, maps_dtype
from gan_dist.utils.errors import GanDistError, UserError

SWEEP = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def bench_step(
    world: World,
    *,
    batches: Sequence[int] = (128,),
    runners: Sequence[str] = ("auto",),
    precision: str = "auto",
    resolution: int = 64,
    latent_dim: int = 100,
    channels: int = 64,
    max_channels: int | None = None,
    seconds: float = 5.0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Returns the figures of the fastest (batch, runner) measured, all of them under `sweep`, for JSON.

    `batches` are global. Keys: images_per_second (median over steps; `spread` holds its 10th and 90th percentile),
    milliseconds {step, d_step, g_step, collectives, optimizer} (the parts are of separate eager steps, under torch's
    profiler), gflop_per_image, matmul_share and copy_share of the measured rates (1 is the machine's limit, None
    where the step was faster than that, which makes it no limit; the traffic is that of the convolutions alone, all
    else fused into them), peak_memory_gib, and, with more than one rank, `scaling`. A collective: every rank calls it.

    Raises UserError for a runner or precision that the device cannot do and for fewer images than ranks; GanDistError
    naming the largest batch that fits when none of `batches` does.
    """
    chosen, why = resolve_precision(precision, world.device)
    if small := [batch for batch in batches if batch < world.size]:
        raise UserError(f"--batch {small[0]}: expected an image a rank or more, found {world.size} ranks")
    shape = {"resolution": resolution, "latent_dim": latent_dim, "channels": channels, "max_channels": max_channels}
    limits = machine_limits(world.device, chosen)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for name in runners:
            try:
                row = _measure(world, batch, name, chosen, shape, seconds, limits)
            except torch.OutOfMemoryError:
                row = {"batch": batch, "runner": name, "out_of_memory": True}
            except UserError:
                raise
            except GanDistError as error:  # of this runner, and not of the others
                row = {"batch": batch, "runner": name, "error": str(error)}
            rows.append(row)
            log(_line(row))
    good = [row for row in rows if "images_per_second" in row]
    if not good and (errors := [row["error"] for row in rows if "error" in row]):
        raise GanDistError(errors[0])
    if not good:
        fits = _largest_that_fits(world, min(batches), runners[0], chosen, shape)
        raise GanDistError(f"out of device memory at batch {min(batches)}; the largest batch that fits is {fits}")
    best = max(good, key=lambda row: row["images_per_second"])
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    report = {
        **best,
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "precision_reason": why,
        **shape,
        **limits,
        "sweep": rows,
    }
    if world.size > 1:
        report["scaling"] = _scaling(world, good, chosen, shape, seconds)
        log(report["scaling"]["verdict"])
    return report


def _line(row: dict[str, Any]) -> str:
    if row.get("out_of_memory"):
        return f"batch {row['batch']}, {row['runner']}: out of device memory"
    if "error" in row:
        return f"batch {row['batch']}, {row['runner']}: {row['error']}"
    shares = (
        f"{row[f'{name}_share']:.0%} of the {name} rate"
        if row[f"{name}_share"] is not None
        else f"more than the {name} rate that was measured, which is no limit then"
        for name in ("matmul", "copy")
    )
    return (
        f"batch {row['batch']}, {row['runner']}, {row['precision']}: {row['images_per_second']:,.0f} images/s, "
        f"{row['milliseconds']['step']:.2f} ms a step, " + ", ".join(shares)
    )


def build(
    world: World, batch: int, precision: Any, shape: Mapping[str, Any], kernels: str = "auto"
) -> tuple[Update, list[Tensor], list[Tensor]]:
    source = torch.Generator().manual_seed(0)
    widest = shape.get("max_channels")
    generator = Generator(shape["resolution"], shape["latent_dim"], shape["channels"], max_channels=widest)
    discriminator = Discriminator(shape["resolution"], shape["channels"], max_channels=widest)
    for network in (generator, discriminator):
        initialise(network, 0.02, source)
    chosen, _ = resolve_kernels(kernels, world, maps_dtype(precision))
    update = Update(
        generator,
        discriminator,
        world=world,
        global_batch=batch,
        precision=precision,
        batchnorm_kernels=chosen,
        collectives=resolve_collectives(world),
    )
    share = (world.rank + 1) * batch // world.size - world.rank * batch // world.size
    side = shape["resolution"]
    real = torch.randint(0, 256, (share, 3, side, side), dtype=torch.uint8, generator=source).to(world.device)
    latents = torch.randn(share, shape["latent_dim"], generator=source).to(world.device)
    return update, [real], [latents]


def _measure(
    world: World,
    batch: int,
    name: str,
    precision: Any,
    shape: Mapping[str, Any],
    seconds: float,
    limits: dict[str, float],
) -> dict[str, Any]:
    """Returns a row of the sweep: the rate is the runner's own, undisturbed; the parts are of eager steps after it."""
    _release(world.device)
    update, reals, latents = build(world, batch, precision, shape)
    with closing(make_runner(name, update)) as runner:
        steps = time_steps(world, runner, reals, latents, seconds)
    median = statistics.median(steps)
    cuts = statistics.quantiles(steps, n=10) if len(steps) > 1 else [median] * 9
    share = reals[0].shape[0]
    peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else _resident_bytes()
    parts = _parts(*build(world, batch, precision, shape))
    gflop, megabytes = work(*build(world, batch, precision, shape, "torch"))  # a counter sees nothing of our kernels
    return {
        "images_per_second": batch / median,
        "spread": [batch / cuts[-1], batch / cuts[0]],
        "steps_timed": len(steps),
        "batch": batch,
        "runner": runner.name,
        "runner_reason": runner.reason,
        "batchnorm_kernels": update.batchnorm_kernels,
        "collectives": update.collectives.reason or None,
        "precision": precision,
        "milliseconds": {"step": 1e3 * median, **parts},
        "gflop_per_image": gflop / share,
        "traffic_mb_per_image": megabytes / share,
        "matmul_share": share_of(gflop / median, limits["matmul_gflop_per_second"]),
        "copy_share": share_of(megabytes / 1e3 / median, limits["copy_gb_per_second"]),
        "peak_memory_gib": peak / 2**30,
    }


def time_steps(
    world: World, runner: Runner, reals: Sequence[Tensor], latents: Sequence[Tensor], seconds: float
) -> list[float]:
    """Returns seconds a step, one number a block of steps (a block is one step on a CPU), after a warm-up.

    Every rank times the same steps: rank 0 decides how many.
    """
    cuda = world.device.type == "cuda"
    for _ in range(3):
        runner.step(reals, latents)
    _wait(world.device)
    start = time.perf_counter()
    for _ in range(block := 10 if cuda else 1):
        runner.step(reals, latents)
    _wait(world.device)
    count = world.gather_objects(min(500, max(5, int(seconds * 1.0 / (time.perf_counter() - start)))))[0]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(block):
            runner.step(reals, latents)
        _wait(world.device)
        times.append((time.perf_counter() - start) / block)
    return times


def _parts(update: Update, reals: list[Tensor], latents: list[Tensor], rounds: int = 5) -> dict[str, float]:
    """Returns milliseconds of D step, G step, collectives and optimiser: medians of eager steps under torch's profiler.

    On a GPU by its own clock. Collectives and optimiser are parts of the D and G steps. The first two steps warm up.
    """
    device = update.world.device
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    rows: list[tuple[float, float, float, float]] = []
    for index in range(rounds + 2):
        with profile(activities=activities) as trace, record_function("whole step"):
            update.step(reals, latents)
            _wait(device)
        if index < 2:
            continue
        events = [event for event in trace.events() or () if (event.device_type.name == "CUDA") == cuda]
        events.sort(key=lambda event: event.time_range.start)
        (whole,) = (event.time_range for event in events if event.name == "whole step")
        adams = [event.time_range for event in events if event.name.startswith("Optimizer.step")]
        seam = adams[update.d_steps - 1].end  # D's last update ends its step
        collectives = [event.time_range for event in events if event.name.startswith(("gloo:", "nccl"))]
        spent = (sum(span.end - span.start for span in spans) for spans in (collectives, adams))
        rows.append((seam - whole.start, whole.end - seam, *spent))
    names = ("d_step", "g_step", "collectives", "optimizer")
    return {name: statistics.median(column) / 1e3 for name, column in zip(names, zip(*rows, strict=True), strict=True)}


class _ConvolutionTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that convolutions, and products in their place, read and write: what is left when everything
    else is fused into them."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "convolution" in func.__name__ or func.__name__ in ("mm.default", "mv.default"):
            tensors = [t for t in tree_flatten((args, out))[0] if isinstance(t, Tensor)]
            self.num_bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def work(update: Update, reals: Sequence[Tensor], latents: Sequence[Tensor]) -> tuple[float, float]:
    """Returns (GFLOP, MB of convolution traffic) of this rank's share of an eager step.

    A multiplication with its addition is two FLOP.
    """
    traffic: Any = _ConvolutionTraffic()  # type: ignore[no-untyped-call]
    with FlopCounterMode(display=False) as flops, traffic:
        update.step(reals, latents)
    return flops.get_total_flops() / 1e9, traffic.num_bytes / 1e6


def machine_limits(device: torch.device, precision: str) -> dict[str, float]:
    """Returns {matmul_gflop_per_second, copy_gb_per_second}: the best of square products and of the game's convolutions
    both ways in `precision`, in several sizes, and of several copies (bytes read plus bytes written).

    Convolutions too: they have kernels of their own, and on some processors these are faster than a product's.
    """
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    cuda = device.type == "cuda"
    rates = [_product_rate(device, dtype, side) for side in ((4096, 8192) if cuda else (512, 1024, 2048))]
    rates += [
        rate
        for channels, side in ((64, 32), (128, 16), (256, 8))
        for rate in _convolution_rates(device, dtype, 1024 if cuda else 32, channels, side)
    ]
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(device, lambda: target.copy_(source))
    return {
        "matmul_gflop_per_second": max(rates),
        "copy_gb_per_second": 2 * source.numel() / copy / 1e9,
    }


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Returns the GFLOP/s of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(device, lambda: torch.mm(a, b)) / 1e9


def _convolution_rates(
    device: torch.device, dtype: torch.dtype, batch: int, channels: int, side: int
) -> tuple[float, float]:
    """Returns the GFLOP/s of one of D's convolutions, and of its two gradients."""
    x = torch.randn(batch, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(2 * channels, channels, 4, 4, device=device).to(dtype, memory_format=torch.channels_last)
    y = torch.conv2d(x, weight, None, 2, 1)
    gflop = 2 * y.numel() * channels * 16 / 1e9
    rest = (None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    back = _best(device, lambda: torch.ops.aten.convolution_backward(y, x, weight, *rest))
    return gflop / _best(device, lambda: torch.conv2d(x, weight, None, 2, 1)), 2 * gflop / back


def share_of(rate: float, limit: float) -> float | None:
    """Returns the share that `rate` is of `limit`, or None where it is more, so that the limit is none."""
    return rate / limit if rate <= limit else None


def _best(device: torch.device, function: Callable[[], Any], rounds: int = 8) -> float:
    function()
    times = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _scaling(
    world: World, rows: list[dict[str, Any]], precision: Any, shape: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Returns what the ranks gain over one of them: rank 0 plays alone while the others wait."""
    alone: dict[str, float] = {}
    for row in rows:
        if str(row["batch"]) not in alone:
            rate = 0.0
            if world.rank == 0:
                single = World(device=world.device)
                try:
                    update, reals, latents = build(single, row["batch"], precision, shape)
                    with closing(make_runner(row["runner"], update)) as runner:
                        times = time_steps(single, runner, reals, latents, seconds)
                    rate = row["batch"] / statistics.median(times)
                except torch.OutOfMemoryError:
                    _release(world.device)
            alone[str(row["batch"])] = world.gather_objects(rate)[0]
    fastest = {
        batch: max(row["images_per_second"] for row in rows if row["batch"] == batch)
        for batch in sorted({row["batch"] for row in rows})
    }
    losing = [batch for batch, rate in fastest.items() if rate <= alone[str(batch)]]
    winning = [batch for batch in fastest if not losing or batch > max(losing)]
    top = max(rows, key=lambda row: row["images_per_second"])
    parts = top["milliseconds"]
    verdict = (
        f"{world.size} ranks beat one from batch {winning[0]} (of those measured)"
        if winning
        else f"{world.size} ranks lose to one at every batch measured: this game is too small for them"
    )
    return {
        "images_per_second_per_rank": top["images_per_second"] / world.size,
        "collectives_share": parts["collectives"] / (parts["d_step"] + parts["g_step"]),
        "one_rank_images_per_second": alone,
        "beats_one_rank_from_batch": winning[0] if winning else None,
        "verdict": verdict,
    }


def _largest_that_fits(world: World, too_large: int, name: str, precision: Any, shape: Mapping[str, Any]) -> int:
    """Returns the largest batch below `too_large` that plays, to a sixteenth; 0 when not even one image a rank does."""
    low, high = 0, too_large
    while high - low > max(1, high // 16):
        middle = max(world.size, (low + high) // 2)
        _release(world.device)
        try:
            update, reals, latents = build(world, middle, precision, shape)
            with closing(make_runner(name, update)) as runner:
                for _ in range(2):
                    runner.step(reals, latents)
                _wait(world.device)
            low = middle
        except torch.OutOfMemoryError:
            high = middle
        if middle == world.size and low < middle:
            break
    return low


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    """Frees what the last measurement left, and starts counting peak memory anew."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()  # it compiles a function for 8 shapes, and then no more
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
