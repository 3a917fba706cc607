"""The demo: paints a small set of pictures, prepares it and trains on it, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gan_dist.config.schema import preset
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.report.history import typed
from gan_dist.training.trainer import Outcome, train
from gan_dist.utils.stop import StopRequest

PAINTINGS = 2000
BROKEN = 12


def run_demo(directory: Path, stop: StopRequest, log: Callable[[str], None]) -> tuple[Outcome, list[str]]:
    """Returns the training's outcome, and lines that name what is where.

    Called again with the same directory, it continues where it stopped.
    """
    paintings, shards, run = directory / "paintings", directory / "shards", directory / "run"
    if not (shards / "manifest.json").exists():
        log(f"painting {PAINTINGS} pictures into {paintings}, {BROKEN} of them broken on purpose")
        paint_folder(paintings, PAINTINGS, broken=BROKEN)
    account = prepare([paintings], shards, resolution=preset("demo").model.resolution)
    for line in account.lines():
        log(line)
    outcome = train(preset("demo"), [f"data.shards={shards}"], run_dir=run, stop=stop)
    return outcome, [
        f"  shards       {shards}",
        f"  rejects      {shards / 'rejects.jsonl'}",
        *([f"  go on        {typed(f'gan-dist demo --out {directory}')}"] if outcome.stopped else []),
    ]
