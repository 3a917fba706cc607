"""Our step beside the usual DCGAN tutorial's, in turn on one machine: python -m tests.bench.compare_step

The peer is the step as tutorials write it: Sequential networks with sigmoid, three separate D passes, BCELoss, Adam,
float32, torch's default layout, `.item()` on what is printed. It runs in a process of its own, as it would by itself;
"tutorial_settled" is the same in ours, with what torch_settings.py asks of the C library. All play batch 128 of 64x64.

With `--before CHECKOUT`, another checkout of this project plays the first of the runners too, as "before", in a process
of its own: whether a change made the step slower is told by one run, in which both take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gan_dist.bench.step import build, machine_limits, share_of, work
from gan_dist.distributed.world import World
from gan_dist.training.runner import make_runner, resolve_precision
from gan_dist.training.torch_settings import torch_settings
from gan_dist.utils.tensors import float32_products


def tutorial_step(batch: int, device: torch.device) -> Callable[[], object]:
    """Returns the peer's step: one call is one D and one G update."""
    up: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise([100, 512, 256, 128, 64, 3])):
        up.append(nn.ConvTranspose2d(wide, narrow, 4, 1 if i == 0 else 2, 0 if i == 0 else 1, bias=False))
        up += [nn.BatchNorm2d(narrow), nn.ReLU(True)] if i < 4 else [nn.Tanh()]
    down: list[nn.Module] = []
    for i, (narrow, wide) in enumerate(itertools.pairwise([3, 64, 128, 256, 512, 1])):
        down.append(nn.Conv2d(narrow, wide, 4, 2 if i < 4 else 1, 1 if i < 4 else 0, bias=False))
        down += [nn.BatchNorm2d(wide)] if 0 < i < 4 else []
        down.append(nn.LeakyReLU(0.2, inplace=True) if i < 4 else nn.Sigmoid())
    generator, discriminator = nn.Sequential(*up).to(device), nn.Sequential(*down).to(device)
    for module in (*generator, *discriminator):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = nn.BCELoss()
    real = torch.rand(batch, 3, 64, 64, device=device) * 2 - 1

    def step() -> object:
        discriminator.zero_grad()
        label = torch.full((batch,), 1.0, device=device)
        output = discriminator(real).view(-1)
        loss_real = criterion(output, label)
        loss_real.backward()
        d_x = output.mean().item()
        fake = generator(torch.randn(batch, 100, 1, 1, device=device))
        label.fill_(0.0)
        output = discriminator(fake.detach()).view(-1)
        loss_fake = criterion(output, label)
        loss_fake.backward()
        d_g_z1 = output.mean().item()
        optimizer_d.step()
        generator.zero_grad()
        label.fill_(1.0)
        output = discriminator(fake).view(-1)
        loss_g = criterion(output, label)
        loss_g.backward()
        d_g_z2 = output.mean().item()
        optimizer_g.step()
        return d_x, d_g_z1, d_g_z2

    return step


def our_step(batch: int, device: torch.device, runner: str, precision: str) -> Callable[[], object]:
    """Returns our step on the same shapes."""
    shape = {"resolution": 64, "latent_dim": 100, "channels": 64}
    update, reals, latents = build(World(device=device), batch, precision, shape)
    running = make_runner(runner, update)
    return lambda: running.step(reals, latents)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of a step: one on a CPU, of twenty in a row on a GPU."""
    calls = 20 if device.type == "cuda" else 1
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _serve(pipe: Connection, batch: int, device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    step = tutorial_step(batch, device)
    while pipe.recv():
        pipe.send(timed(step, device))


@contextmanager
def elsewhere(batch: int, device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields what returns the seconds of a tutorial step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, batch, device, torch.get_num_threads()), daemon=True)
    process.start()
    theirs.close()  # so that a peer that dies is heard of

    def ask() -> float:
        ours.send(True)
        seconds: float = ours.recv()
        return seconds

    try:
        yield ask
    finally:
        ours.send(False)
        process.join()


PLAY = """
import sys, torch
from tests.bench.compare_step import our_step, timed
from gan_dist.training.torch_settings import torch_settings
batch, name, runner, precision, threads = sys.argv[1:]
device = torch.device(name)
torch.set_num_threads(int(threads))
with torch_settings(device):
    step = our_step(int(batch), device, runner, precision)
    for _ in sys.stdin:
        print(timed(step, device), flush=True)
"""


@contextmanager
def another_checkout(root: Path | None, batch: int, device: torch.device, runner: str, precision: str) -> Iterator[Any]:
    """Yields what returns the seconds of a step of the project in `root`, or None where there is no other checkout."""
    if root is None:
        yield None
        return
    words = [sys.executable, "-c", PLAY, str(batch), str(device), runner, precision, str(torch.get_num_threads())]
    env = {**os.environ, "PYTHONPATH": str(root.resolve())}
    with subprocess.Popen(
        words, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        asked, told = process.stdin, process.stdout

        def ask() -> float:
            print(file=asked, flush=True)
            return float(told.readline())

        yield ask
        asked.close()


def compare(
    batch: int, device: torch.device, runners: list[str], precision: str, rounds: int, before: Path | None = None
) -> dict[str, Any]:
    """Returns medians of interleaved rounds: the peer's and each runner's images/s and the ratios."""
    chosen, why = resolve_precision(precision, device)
    shape = {"resolution": 64, "latent_dim": 100, "channels": 64}
    gflop, _ = work(*build(World(device=device), batch, chosen, shape, "torch"))
    # Ours; the tutorial's is what torch does by itself.
    arithmetic: Any = partial(float32_products, "tf32" if chosen == "tf32" else "ieee")
    with arithmetic():
        limits = machine_limits(device, chosen)
    theirs = another_checkout(before, batch, device, runners[0], chosen)
    with torch_settings(device), elsewhere(batch, device) as peer, theirs as earlier:
        steps: dict[str, Callable[[], float]] = {"tutorial": peer}
        steps |= {"before": earlier} if earlier else {}
        in_this_process = {"tutorial_settled": tutorial_step(batch, device)}
        in_this_process |= {runner: our_step(batch, device, runner, chosen) for runner in runners}
        steps |= {name: partial(timed, step, device) for name, step in in_this_process.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(rounds + 2):
            for name, step in steps.items():
                with arithmetic() if name in runners else nullcontext():
                    found = step()
                if index >= 2:
                    seconds[name].append(found)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "batch": batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": chosen,
        "precision_reason": why,
        "images_per_second": {name: round(batch / median, 1) for name, median in medians.items()},
        "spread": {n: [round(batch / max(f), 1), round(batch / min(f), 1)] for n, f in seconds.items()},
        "times_the_tutorial": {n: round(medians["tutorial"] / m, 2) for n, m in medians.items() if n != "tutorial"},
        "times_before": {n: round(medians["before"] / medians[n], 3) for n in runners if "before" in medians},
        # What a step without anything but its multiplications at the measured matmul rate would be.
        "ceiling_times_the_tutorial": round(medians["tutorial"] * limits["matmul_gflop_per_second"] / gflop, 2),
        "matmul_share": {n: share_of(gflop / m, limits["matmul_gflop_per_second"]) for n, m in medians.items()},
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runners", default="eager,compiled", help="ours, separated by commas")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--before", type=Path, help="another checkout of this project, whose step takes its turn too")
    parser.add_argument("--at-least", type=float, default=None, help="exit with 1 when the best ratio is lower")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    runners = args.runners.split(",")
    found = compare(args.batch, torch.device(args.device), runners, args.precision, args.rounds, args.before)
    print(json.dumps(found, indent=2))
    if args.at_least and max(found["times_the_tutorial"][name] for name in runners) < args.at_least:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
