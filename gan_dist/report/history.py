"""A run's history in plain words, and the commands that may come next."""

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
    "save_failed": "A checkpoint could not be saved",
}


@dataclass(frozen=True)
class Entry:
    """One event: its kind (the event's name, or `lost`), a title, when, and details."""

    kind: str
    title: str
    when: str
    detail: str


def entries(run: Run) -> list[Entry]:
    """Returns the run's history. Consecutive skips become one entry; a start without a stop before it means a loss."""
    history: list[Entry] = []
    last: str | None = None  # of start, stop and end
    skips = 0

    def add_skips(step: int) -> None:
        nonlocal skips
        if skips:
            many = f"{skips} updates" if skips > 1 else "One update"
            detail = "gradients or a loss were not finite; the weights were left unchanged"
            history.append(Entry("skipped", f"{many} skipped up to step {step:,}", "", detail))
            skips = 0

    for event in run.events:
        name, step = str(event["event"]), int(event.get("step") or 0)
        moment = format_time(event["time"]) if event.get("time") else ""
        if name == "skipped":
            skips += 1
            continue
        add_skips(step)
        if name == "start" and last == "start":
            lost = f"what came after step {step:,} was not saved and was repeated"
            history.append(Entry("lost", "Ended without notice", "", lost))
        if name in ("start", "stop", "end"):
            last = name
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        if name == "start" and step:
            title = "Continued"
        history.append(Entry(name, f"{title} at step {step:,}", moment, event_details(event)))
    add_skips(run.step)
    if run.state == "interrupted":
        saved = f"its newest checkpoint is of step {run.checkpoints[-1]:,}" if run.checkpoints else "it saved nothing"
        history.append(Entry("lost", "No news since", format_time(run.touched), saved))
    return history


def commands(run: Run) -> list[tuple[str, str]]:
    """Returns (purpose, command) of what one may do with the run next."""
    path = shlex.quote(str(run.path))
    launched = run.environment.get("command")
    rows = []
    if run.state != "done":
        again = _as_typed(launched) if isinstance(launched, list) and launched else None
        rows.append(
            ("Continue it", again or f"gan-dist train {shlex.quote(str(run.path / 'config.yaml'))} --run-dir {path}")
        )
    if run.checkpoints:
        step = run.checkpoints[-1]
        rows.append(("Sample it", f"gan-dist sample {path} --count 64 --out grid.png"))
        rows.append(("Export its generator", f"gan-dist sample {path} --export generator.safetensors"))
        rows.append(
            ("Start a new run from it", f"gan-dist train CONFIG --name NEW --from {shlex.quote(f'{run.path}@{step}')}")
        )
    rows.append(("Open TensorBoard", f"tensorboard --logdir {shlex.quote(str(run.path / 'tensorboard'))}"))
    return [(what, typed(words)) for what, words in rows]


def typed(command: str) -> str:
    """Returns a command as it is to be typed here: after `uv run`, where that started this program."""
    return f"uv run {command}" if os.environ.get("UV") else command


def closing_lines(run: Run) -> list[str]:
    """Returns the lines that a command ends with: what was done, how fast, where things are, what to do next."""
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
