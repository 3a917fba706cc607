"""How fast this machine prepares a source: `gan-dist bench prepare`."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image, JpegImagePlugin

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import Recipe
from gan_dist.data.prepare.plan import Options, make_plan
from gan_dist.data.prepare.reading import Reader
from gan_dist.data.prepare.sources import Entry, Source
from gan_dist.data.prepare.staging import source_name, spread
from gan_dist.data.prepare.workers import make_jobs, run_jobs
from gan_dist.data.shards import ShardWriter
from gan_dist.utils.system import default_workers


def bench_prepare(
    source: str | Path,
    *,
    resolution: int = 64,
    resample: str = "lanczos",
    full_decode: bool = False,
    workers: int | None = None,
    samples: int = 1000,
) -> dict[str, Any]:
    """Returns this machine's figures for preparing `source` (local), from up to `samples` images spread over it.

    `images_per_second` and `mb_per_second` of all `workers` together, and for each (`..._per_core`); `shares` of the
    workers' time in read, decode and resize, and `write`, the parent's time over the whole time; `floor_fraction`: the
    least possible time, reading and entropy-decoding (a JPEG decoded to 1/8 takes hardly more), over the workers' time;
    None when no image is a JPEG. Nothing is kept.

    Raises:
        UserError: a source that cannot be prepared.
    """
    paths = [(Path(text), source_name(text)) for text in spread([source])]
    recipe = Recipe(resolution, resample, full_decode=full_decode)
    workers = default_workers() if workers is None else workers
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(paths, Options(recipe), Path(folder))
        every = -(-len(plan.entries) // samples)
        entries = plan.entries[::every]
        jobs = make_jobs(entries, resolution)
        seconds = {"read": 0.0, "decode": 0.0, "resize": 0.0}
        written = rejected = measured = 0
        write = 0.0
        began = perf_counter()
        with (
            closing(run_jobs(jobs, plan.sources, recipe, workers)) as finished,
            ShardWriter(Path(folder), 0, resolution) as writer,
        ):
            for number, done in enumerate(finished):
                if number == 0 and len(jobs) > 4 * max(workers, 1):
                    began = perf_counter()  # the workers have started; the first job does not count
                else:
                    measured += len(done.outcomes)
                for stage, spent in done.seconds.items():
                    seconds[stage] += spent
                start = perf_counter()
                for outcome in done.outcomes:
                    rejected += bool(outcome.reason)
                    if not outcome.reason:
                        writer.add(written, outcome.pixels, outcome.record)
                        written += 1
                write += perf_counter() - start
            start = perf_counter()
            writer.commit()
            write += perf_counter() - start
        total = perf_counter() - began
        floor = _floor(entries, plan.sources)
    busy = sum(seconds.values())
    megabytes = sum(entry.packed or entry.size for entry in entries) / len(entries) * measured / 1e6
    cores = max(1, workers)
    return {
        "images_per_second": round(measured / total, 2),
        "images_per_second_per_core": round(measured / total / cores, 2),
        "mb_per_second": round(megabytes / total, 3),
        "mb_per_second_per_core": round(megabytes / total / cores, 3),
        "shares": {
            **{stage: round(spent / busy, 4) for stage, spent in seconds.items()},
            "write": round(write / total, 4),
        },
        "floor_fraction": round(floor[0] / (busy * floor[1] / len(entries)), 4) if floor[1] else None,
        "images": len(entries),
        "rejected": rejected,
        "seconds": round(total, 3),
        "workers": workers,
        "resolution": resolution,
    }


def _floor(entries: Sequence[Entry], sources: Sequence[Source]) -> tuple[float, int]:
    """Returns seconds and number of images for reading and entropy-decoding the JPEGs among up to 100 entries."""
    seconds, images = 0.0, 0
    with closing(Reader(sources)) as reader:
        for entry in entries[:: -(-len(entries) // 100)]:
            began = perf_counter()
            try:
                data = reader.read(entry)
                if data[:2] != b"\xff\xd8":
                    continue
                with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
                    image.draft(None, (1, 1))
                    image.load()
            except (Rejected, OSError, SyntaxError, Image.DecompressionBombError):
                continue
            seconds += perf_counter() - began
            images += 1
    return seconds, images
