"""What happened to a run, as a person would tell it, and what to do with it next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gan_dist.report.curves import median, seconds_trained
from gan_dist.runs.metrics_file import event_details, format_time
from gan_dist.runs.record import Run
from gan_dist.telemetry.console import duration

TITLES = {
    "start": "Started",
    "stop": "Stopped",
    "end": "Finished",
    "warning": "Warning",
    "skipped": "Skipped updates",
    "save_failed": "A checkpoint could not be saved",
    "evaluate": "Evaluated",
}


@dataclass(frozen=True)
class Entry:
    """One thing that happened: its kind (the event's name, or `lost`), a title, when, and the rest in words."""

    kind: str
    title: str
    when: str
    detail: str


def entries(run: Run) -> list[Entry]:
    """Returns the run's history. Skips in a row become one entry; a start that follows no last word tells of a loss."""
    told: list[Entry] = []
    words: str | None = None  # the last start, stop or end
    skips = 0

    def tell_skips(step: int) -> None:
        nonlocal skips
        if skips:
            many = f"{skips} updates" if skips > 1 else "One update"
            detail = "gradients or a loss were not finite; weights stayed as they were"
            told.append(Entry("skipped", f"{many} skipped up to step {step:,}", "", detail))
            skips = 0

    for event in run.events:
        name, step = str(event["event"]), int(event.get("step") or 0)
        moment = format_time(event["time"]) if event.get("time") else ""
        if name == "skipped":
            skips += 1
            continue
        tell_skips(step)
        if name == "start" and words == "start":
            lost = f"what it did after step {step:,} was not saved, and was done again"
            told.append(Entry("lost", "Lost without a last word", "", lost))
        if name in ("start", "stop", "end"):
            words = name
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        if name == "start" and step:
            title = "Continued"
        told.append(Entry(name, f"{title} at step {step:,}", moment, event_details(event)))
    tell_skips(run.step)
    if run.state == "interrupted":
        saved = f"its newest checkpoint is of step {run.checkpoints[-1]:,}" if run.checkpoints else "it saved nothing"
        told.append(Entry("lost", "Not heard of since", format_time(run.touched), saved))
    return told


def commands(run: Run) -> list[tuple[str, str]]:
    """Returns (what for, command) of what one may do with the run next."""
    path = shlex.quote(str(run.path))
    launched = run.environment.get("command")
    offered = []
    if run.state != "done":
        again = _as_typed(launched) if isinstance(launched, list) and launched else None
        offered.append(
            ("Continue it", again or f"gan-dist train {shlex.quote(str(run.path / 'config.yaml'))} --run-dir {path}")
        )
    if run.checkpoints:
        step = run.checkpoints[-1]
        offered.append(("Draw from it", f"gan-dist sample {path} --count 64 --out grid.png"))
        offered.append(("Take its generator elsewhere", f"gan-dist sample {path} --export generator.safetensors"))
        offered.append(
            ("Start a new run from it", f"gan-dist train CONFIG --name NEW --from {shlex.quote(f'{run.path}@{step}')}")
        )
    offered.append(("Look closer", f"tensorboard --logdir {shlex.quote(str(run.path / 'tensorboard'))}"))
    return [(what, typed(words)) for what, words in offered]


def typed(command: str) -> str:
    """Returns a command of this environment as it is to be typed: after `uv run`, where that started this program."""
    return f"uv run {command}" if os.environ.get("UV") else command


def closing_lines(run: Run) -> list[str]:
    """Returns what to say when a command on a run ends: what was done, how fast, where things are, what to do next."""
    newest = run.points[-1] if run.points else {}
    seen, rate = newest.get("images_seen", 0), median(run, "throughput/images_per_second")
    speed = f", {rate:,.1f} images/s (median), {duration(seconds_trained(run))} of training" if rate else ""
    why = f" by {run.why}" if run.state == "stopped" and run.why else ""
    places = [("report", run.path / "report.html"), ("checkpoints", run.path / "checkpoints")]
    if run.samples:
        places.insert(0, ("newest samples", run.samples[-1][1]))
    rows = [(what, str(path)) for what, path in places if path.exists()]
    rows += [(what.lower(), words) for what, words in commands(run)]
    width = max(len(what) for what, _ in rows)
    return [
        f"{run.state}{why}: step {run.step:,} of {run.total:,}, {seen:,} images seen{speed}",
        *(f"  {what:<{width}}  {words}" for what, words in rows),
    ]


def _as_typed(words: Sequence[object]) -> str:
    """Returns a recorded command line as a person would type it."""
    first, *rest = map(str, words)
    name = Path(first).name
    head = "python -m gan_dist" if name == "__main__.py" else name
    return " ".join([head, *map(shlex.quote, rest)])
