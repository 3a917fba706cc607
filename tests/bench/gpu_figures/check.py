"""Is gan_dist right on this GPU, how fast is it, and where does a step's time go?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch.profiler import ProfilerActivity, profile

from gan_dist.bench.step import bench_step, build
from gan_dist.training.runner import Captured
from gan_dist.training.torch_settings import torch_settings
from tests.bench.gpu_figures.plan import Plan

FIELDS = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu,ecc.mode.current"
KINDS = {
    "image layers": r"_(to_maps|to_images|weight_gradient)_kernel",
    "convolutions and products": r"conv|gemm|wgrad|dgrad|fprop|cutlass|xmma|cudnn|nvjet|gemv|splitk",
    "collectives": r"nccl|all_?reduce|all_?gather|symm",
    "optimiser": r"adam|multi_tensor|foreach",
    "batch norm": r"batch_?norm|bn_|_(statistics|merge|normalise|chunk_sums|add_sums|input_gradient|track)_kernel",
    "copies and casts": r"copy|memcpy|memset|cat|fill",
}
"""Words in the names of kernels. The first kind that has one takes it; what is left is elementwise."""


def machine(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns what doctor and nvidia-smi say of this machine."""
    told = subprocess.run([sys.executable, "-m", "gan_dist", "doctor", "--json"], capture_output=True, text=True)
    found: dict[str, Any] = {"doctor": json.loads(told.stdout)}
    with suppress(OSError):
        query = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return found


def tests(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Runs the tests marked gpu, of the files that have some; their output goes to tests.txt."""
    files = [str(file) for file in sorted(Path("tests").rglob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    # A warning of this machine's torch is no failure; an option of a plugin that it lacks is none either.
    options = [
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=default",
        "-o",
        "timeout=90",
        "-p",
        "no:cacheprovider",
        "-ra",
        "-m",
        "gpu",
    ]
    with (out / "tests.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "pytest", *options, *(["--collect-only", "-q"] if plan.dry else []), *files]
        status = subprocess.run(command, stdout=log, stderr=log).returncode
    last = (out / "tests.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
    if status != 0:
        raise RuntimeError(f"pytest ended with status {status}: {last}")
    return {"files": files, "last_line": last}


def step(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns images/s over batches and runners, with the shares of the measured limits and peak memory, as a run sets
    torch."""
    with torch_settings(plan.device, True, plan.precision):
        return bench_step(
            plan.world,
            batches=(*plan.batches, plan.large_batch),
            runners=plan.runners,
            precision=plan.precision,
            seconds=plan.seconds / 2,
            log=print,
            **plan.shape,
        )


def step_profile(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns the kernels of a captured step with their times, and each kind's share."""
    cuda, steps, found = plan.device.type == "cuda", 10, {}
    for batch in plan.batches:
        with torch_settings(plan.device, True, plan.precision):
            update, reals, latents = build(plan.world, batch, plan.precision, plan.shape)
            runner = Captured(update, "")
            for _ in range(5):
                runner.step(reals, latents)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
                for _ in range(steps):
                    runner.step(reals, latents)
                torch.cuda.synchronize()
            runner.close()
        field = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = [(event.key, event.count / steps, getattr(event, field) / steps) for event in recorded.key_averages()]
        rows = sorted((event for event in events if event[2] > 0), key=lambda event: -event[2])
        total = sum(microseconds for _, _, microseconds in rows)
        kinds: dict[str, float] = {}
        for name, _, microseconds in rows:
            kind = kind_of(name)
            kinds[kind] = kinds.get(kind, 0) + microseconds / total
        found[str(batch)] = {
            "kernels_a_step": sum(count for _, count, _ in rows),
            "microseconds_a_step": total,
            "shares": {kind: round(share, 4) for kind, share in sorted(kinds.items(), key=lambda each: -each[1])},
            "kernels": [
                {"name": name[:160], "a_step": count, "microseconds": round(spent, 2)}
                for name, count, spent in rows[:60]
            ],
        }
    return found


def kind_of(kernel: str) -> str:
    """Returns which of KINDS a kernel's name belongs to, or `elementwise`."""
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel, re.IGNORECASE)), "elementwise")
