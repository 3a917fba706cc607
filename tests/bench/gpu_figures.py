"""Every figure that needs a GPU, in one go: python -m tests.bench.gpu_figures --out FOLDER [--only PART ...]

Parts, in order; each writes FOLDER/PART.json or .txt, and a part that fails does not stop the next:
  tests      the tests marked gpu: captured equals eager, GPU equals CPU, no host sync, NCCL equals gloo (two GPUs)
  peer       the tutorial's step and ours, interleaved, at batch 128 and 1024
  sweep      images/s over batches and runners with the shares of the matmul and copy rates and peak memory
  variants   what was left to measure: compiled passes inside the graph, cuDNN's kernels by trial, padded 3-channel
             layers, layouts, products for the small end's convolutions, groups
  profile    where the time of a step goes, by kernel
  headline   the thesis' whole job on stand-in images: 103,250 of 64x64, 30 epochs, batch 128, samples and checkpoints
  evaluation what evaluating 10,000 images takes while a run trains on headline's shards, and that it changes no bit
With several GPUs: python -m torch.distributed.run --nproc-per-node N -m tests.bench.gpu_figures --out F --only scaling
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gan_dist.bench.step import SWEEP, bench_step, build, time_steps
from gan_dist.data.prepare.synthetic import paint
from gan_dist.distributed.world import World, join
from gan_dist.model.convolution import from_latents, to_logits
from gan_dist.runs.checkpoint import find
from gan_dist.runs.record import read_run
from gan_dist.training.runner import Captured, Compiled, Eager
from gan_dist.training.trainer import train
from gan_dist.training.update import Update
from tests.bench.compare_step import compare

SHAPE = {"resolution": 64, "latent_dim": 100, "channels": 64}
PAINTINGS, BATCH = 103_250, 128
THESIS_HOURS = 24


def _world() -> World:
    return World(device=torch.device("cuda", 0))


def tests(out: Path) -> None:
    with (out / "tests.txt").open("w") as log:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], stdout=log, check=True)


def peer(out: Path) -> dict[str, Any]:
    device = _world().device
    return {str(batch): compare(batch, device, ["eager", "captured"], "bf16", rounds=9) for batch in (128, 1024)}


def sweep(out: Path) -> dict[str, Any]:
    runners = ("eager", "compiled", "captured")
    return bench_step(_world(), batches=SWEEP[3:], runners=runners, precision="bf16", seconds=2, log=print)


def scaling(out: Path) -> dict[str, Any]:
    with join("cuda") as world:
        return bench_step(world, batches=SWEEP[3:], runners=("captured",), precision="bf16", seconds=2, log=print)


def _microseconds(function: Callable[[], Any], repeats: int = 30) -> float:
    """Returns the time of one call inside a CUDA graph of its own, so that launches do not count."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return 1e6 * statistics.median(found)


def _layer_both_ways(layer: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        return torch.autograd.grad(y.float().sum(), [x, *layer.parameters()])

    return call


class _As(nn.Module):
    """A layer that does `function` with a weight."""

    def __init__(self, function: Callable[..., torch.Tensor], weight: nn.Parameter) -> None:
        super().__init__()
        self.function, self.weight = function, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def variants(out: Path) -> dict[str, Any]:
    world, found = _world(), {}
    for batch in (128, 1024):

        def images_per_second(wrap: Callable[[Update], Any], batch: int = batch) -> float:
            update, reals, latents = build(world, batch, "bf16", SHAPE)
            return batch / statistics.median(time_steps(world, wrap(update), reals, latents, 2.0))

        def both(update: Update) -> Captured:
            Compiled(update, "inside")
            return Captured(update, "outside")

        def chosen_by_trial(update: Update) -> Captured:
            torch.backends.cudnn.benchmark = True
            return Captured(update, "")

        found[f"{batch} images/s"] = {
            "eager": images_per_second(lambda update: Eager(update, "")),
            "captured": images_per_second(lambda update: Captured(update, "")),
            "captured around compiled passes": images_per_second(both),
            "captured, cuDNN's kernels chosen by trial": images_per_second(chosen_by_trial),
        }
        torch.backends.cudnn.benchmark = False
        layers: dict[str, float] = {}
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
            for padded in (3, 4, 8):
                first = nn.Conv2d(padded, 64, 4, 2, 1, bias=False).cuda().to(memory_format=layout)
                last = nn.ConvTranspose2d(64, padded, 4, 2, 1, bias=False).cuda().to(memory_format=layout)
                images = torch.randn(batch, padded, 64, 64, device="cuda").to(memory_format=layout).requires_grad_()
                maps = torch.randn(batch, 64, 32, 32, device="cuda").to(memory_format=layout).requires_grad_()
                layers[f"D's first layer, {padded} channels, {name}"] = _microseconds(_layer_both_ways(first, images))
                layers[f"G's last layer, {padded} channels, {name}"] = _microseconds(_layer_both_ways(last, maps))
        found[f"{batch} microseconds, both ways"] = layers
        update, _reals, latents = build(world, batch, "bf16", SHAPE)
        ends: dict[str, nn.Module] = {
            "G's first layer, a product": _As(from_latents, update.g.network.get_parameter("convt1.weight")),
            "G's first layer, a convolution": _As(
                lambda z, weight: nn.functional.conv_transpose2d(z[:, :, None, None], weight),
                update.g.network.get_parameter("convt1.weight"),
            ),
            "D's last layer, a product": _As(to_logits, update.d.network.get_parameter("conv5.weight")),
            "D's last layer, a convolution": _As(nn.functional.conv2d, update.d.network.get_parameter("conv5.weight")),
        }
        maps = torch.randn(batch, 512, 4, 4, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
        z = latents[0].clone().requires_grad_()
        layers |= {
            name: _microseconds(_layer_both_ways(end, z if name[0] == "G" else maps)) for name, end in ends.items()
        }
        fake = update.generate(latents[0]).detach()
        signed = fake.clone()

        def grouped(update: Update = update, signed: Any = signed, fake: Any = fake) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                logits = update.d.network(torch.cat([signed, fake]), groups=2)
            return torch.autograd.grad(logits.float().sum(), update.d.parameters)

        def separate(update: Update = update, signed: Any = signed, fake: Any = fake) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                logits = update.d.network(signed).float().sum() + update.d.network(fake).float().sum()
            return torch.autograd.grad(logits, update.d.parameters)

        found[f"{batch} microseconds, D on both halves"] = {
            "one grouped pass": _microseconds(grouped),
            "two passes": _microseconds(separate),
        }
    return found


def step_profile(out: Path) -> None:
    lines = []
    for batch in (128, 1024):
        update, reals, latents = build(_world(), batch, "bf16", SHAPE)
        runner = Captured(update, "")
        for _ in range(5):
            runner.step(reals, latents)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(10):
                runner.step(reals, latents)
            torch.cuda.synchronize()
        table = recorded.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90)
        lines.append(f"batch {batch}, 10 captured steps\n{table}")
    (out / "profile.txt").write_text("\n\n".join(lines), encoding="utf-8")


def _png(index: int) -> bytes:
    buffer = BytesIO()
    paint(index % 4000, index // 4000, (64, 64)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def headline(out: Path) -> dict[str, Any]:
    """The whole job by the command line, from shards to the last sample; preparing is timed apart."""
    sources, shards, run = out / "paintings.zip", out / "shards", out / "run"
    if not sources.exists():
        with ProcessPoolExecutor() as pool, zipfile.ZipFile(out / "part.zip", "w") as archive:
            for index, data in enumerate(pool.map(_png, range(PAINTINGS), chunksize=500)):
                archive.writestr(f"{index:06d}.png", data)
        (out / "part.zip").rename(sources)
    gan_dist = [sys.executable, "-m", "gan_dist"]
    start = time.perf_counter()
    subprocess.run([*gan_dist, "prepare", str(sources), str(shards)], check=True)
    prepared = time.perf_counter() - start
    start = time.perf_counter()
    words = ["configs/paintings64.yaml", f"data.shards={shards}", "--run-dir", str(run)]
    subprocess.run([*gan_dist, "train", *words], check=True)
    trained = time.perf_counter() - start
    return {
        "paintings": PAINTINGS,
        "epochs": 30,
        "batch": BATCH,
        "prepare_seconds": prepared,
        "train_seconds": trained,
        "images_per_second": 30 * PAINTINGS / trained,
        "times_the_thesis": THESIS_HOURS * 3600 / trained,
    }


def evaluation(out: Path, steps: int = 4000, words: Sequence[str] = ()) -> dict[str, Any]:
    """Two runs of `steps` steps, one of them evaluated four times: seconds, share of the time, and equal weights."""
    states = {}
    for name, every in (("examined", steps // 4), ("left_alone", 0)):
        run = out / name
        asked = [f"data.shards={out / 'shards'}", "train.deterministic=true", f"evaluate.every_steps={every}", *words]
        train("configs/paintings64.yaml", asked, run_dir=run, max_steps=steps)
        states[name] = find(run).state["generator"]
    rows = read_run(out / "examined").evaluations
    same = all(torch.equal(tensor, states["left_alone"][key]) for key, tensor in states["examined"].items())
    return {
        "samples": rows[-1]["protocol"]["samples"],
        "seconds": [row["seconds"] for row in rows],
        "share_of_time": rows[-1]["share_of_time"],
        "swd": [row["swd"] for row in rows],
        "same_weights": same,
    }


PARTS: dict[str, Callable[[Path], Any]] = {
    "tests": tests,
    "peer": peer,
    "sweep": sweep,
    "variants": variants,
    "profile": step_profile,
    "headline": headline,
    "evaluation": evaluation,
    "scaling": scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=[part for part in PARTS if part != "scaling"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_figures: torch sees no CUDA device here")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in args.only:
        start = time.perf_counter()
        try:
            found = PARTS[part](args.out)
        except Exception as error:  # the figures of the other parts are still worth having
            print(f"{part}: failed: {type(error).__name__}: {error}", flush=True)
            failed.append(part)
            continue
        if found is not None:
            found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **found}
            (args.out / f"{part}.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
        print(f"{part}: done in {time.perf_counter() - start:.0f} s", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
