"""Several GPUs of one machine: how they scale, that they end, and that a rank that stops is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.distributed.exchange import BUCKETS, SMALL
from tests.bench.gpu_figures.job import CONFIG
from tests.bench.gpu_figures.plan import Plan, keep
from tests.helpers.processes import Ranks
from tests.helpers.training import wait_for_step


def scaling(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns bench step's figures under torchrun, on all GPUs."""
    return _bench(plan, (plan.batches[0], plan.large_batch))


def collectives(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns a step's milliseconds by what its ranks exchange tensors with, at the smallest batch."""
    found: dict[str, Any] = {}
    for name, words in {
        "group": {},
        "one_shot": {SMALL: "one_shot"},
        "two_buckets": {BUCKETS: "2"},
        "both": {SMALL: "one_shot", BUCKETS: "2"},
    }.items():
        figures = _bench(plan, plan.batches[:1], words)
        found[name] = {key: figures[key] for key in ("milliseconds", "images_per_second", "spread", "collectives")}
        keep(work, found)
    return found


def _bench(plan: Plan, batches: Sequence[int], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns what bench step says of all GPUs, at so many images for each of them."""
    count = 2 if plan.dry else torch.cuda.device_count()
    words = [word for batch in batches for word in ("--batch", str(batch * count))]
    told = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        + ["-m", "gan_dist", "bench", "step", *words, "--runner", plan.runners[-1], "--precision", plan.precision]
        + ["--device", plan.device.type, "--seconds", str(plan.seconds), "--json"]
        + (["--resolution", "32"] if plan.dry else []),
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(told.stdout)
    return figures


def endings(plan: Plan, out: Path, work: Path) -> dict[str, Any]:
    """Returns how long two ranks take to end, done and after one of them has stopped without a word."""
    paint_folder(work / "few", 40)
    prepare([work / "few"], work / "few_shards", resolution=plan.resolution, shard_samples=16)
    words = [f"data.shards={work / 'few_shards'}", *plan.words, "train.epochs=100000", "log.scalars_every=2"]
    limit = 3 if plan.dry else 20
    start = time.perf_counter()
    status = Ranks(2, CONFIG, work / "ends", *words, "--max-steps", "6" if plan.dry else "200").wait(120)
    found: dict[str, Any] = {"done": {"status": status, "seconds": time.perf_counter() - start}}
    ranks = Ranks(2, CONFIG, work / "lost", *words, f"dist.timeout_s={limit}")
    try:
        wait_for_step(work / "lost", 4, 100)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        start = time.perf_counter()
        status = [ranks.processes[0].wait(limit + 60)]
        found["one_stopped"] = {"status": status, "seconds": time.perf_counter() - start, "timeout_s": limit}
        found["one_stopped"]["words"] = ranks.log(0).splitlines()[-1]
    finally:
        ranks.kill()
    if found["done"]["status"] != [0, 0] or status != [1] or "rank 1" not in found["one_stopped"]["words"]:
        raise RuntimeError(f"the ranks ended otherwise than they should: {found}")
    return found
