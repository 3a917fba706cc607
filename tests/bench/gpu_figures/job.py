"""The thesis' whole job by the command line, on stand-in images, and what evaluating costs beside it."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from gan_dist.data.prepare.synthetic import paint
from gan_dist.runs.checkpoint import find
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.runs.record import read_run
from gan_dist.training.trainer import train
from tests.bench.gpu_figures.plan import Plan

CONFIG = "configs/paintings64.yaml"
EPOCHS, THESIS_HOURS = 30, 24
WATCHED = {
    "images_per_second": "throughput/images_per_second",
    "data_wait_fraction": "throughput/data_wait_fraction",
    "checkpoint_stall_seconds": "checkpoint/stall_seconds",
    "device_gib": "memory/device_gib",
}


def _png(resolution: int, index: int) -> bytes:
    buffer = BytesIO()
    paint(index, 0, (resolution, resolution)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def stand_ins(plan: Plan, path: Path) -> None:
    """Writes an archive of `plan.paintings` PNG files to `path`: some that are painted, again and again."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's state
    numbers = range(plan.painted)
    with ProcessPoolExecutor(1 if plan.dry else workers, mp_context=context) as pool:
        files = list(pool.map(partial(_png, plan.resolution), numbers, chunksize=50))
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(plan.paintings):
            archive.writestr(f"{index:06d}.png", files[index % len(files)])


def headline(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns how long the whole job takes, from shards to the last sample; preparing is timed apart."""
    sources, shards, run = work / "paintings.zip", work / "shards", work / "run"
    stand_ins(plan, sources)
    gan_dist = [sys.executable, "-m", "gan_dist"]
    start = time.perf_counter()
    subprocess.run([*gan_dist, "prepare", sources, shards, "--resolution", str(plan.resolution)], check=True)
    prepared = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([*gan_dist, "train", CONFIG, f"data.shards={shards}", "--run-dir", run, *plan.words], check=True)
    trained = time.perf_counter() - start
    record, lines = read_run(run), read_metrics(run / "metrics.jsonl")
    newest = find(run)
    return {
        "paintings": plan.paintings,
        "prepare_seconds": prepared,
        "train_seconds": trained,
        "images_seen": newest.state["images_seen"],
        "images_per_second_over_all": newest.state["images_seen"] / trained,
        "times_the_thesis": THESIS_HOURS * 3600 / trained * newest.state["images_seen"] / (EPOCHS * plan.paintings),
        "resolved": record.environment["resolved"],
        **{
            name: {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "points": len(values),
            }
            for name, tag in WATCHED.items()
            if (values := [line[tag] for line in lines if line.get(tag) is not None])
        },
        "events": [line for line in lines if line.get("event") in ("start", "warning", "stop", "end")],
        "checkpoint_bytes": newest.manifest["files"]["state.pt"]["bytes"],
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "points": len(values)}


def evaluation(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns what four evaluations cost a run on headline's shards, and whether they change a bit of it."""
    states = {}
    for name, every in (("examined", plan.steps // 4), ("left_alone", 0)):
        run = work / name
        asked = [f"data.shards={work / 'shards'}", *plan.words, f"evaluate.every_steps={every}"]
        train(CONFIG, asked, run_dir=run, max_steps=plan.steps)
        states[name] = find(run).state["generator"]
    rows = read_run(work / "examined").evaluations
    same = all(torch.equal(tensor, states["left_alone"][key]) for key, tensor in states["examined"].items())
    return {
        "samples": rows[-1]["protocol"]["samples"],
        "seconds": [row["seconds"] for row in rows],
        "share_of_time": rows[-1]["share_of_time"],
        "swd": [row["swd"] for row in rows],
        "same_weights": same,
    }
