"""metrics.jsonl: a line a logged step, and a line an event of the run's history."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXTS = "texts"
"""The event that notes at which step TensorBoard got texts; of no interest to people."""
PROTOCOL = "protocol"
"""The event that notes how the evaluations after it are made; shown beside their figures."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl in order, metrics and events; a line that a kill cut short is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


def notable_events(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the events among `lines` that a person wants to see."""
    return [line for line in lines if "event" in line and line["event"] not in (TEXTS, PROTOCOL)]


def format_time(seconds: float) -> str:
    """Returns seconds since 1970 as `2026-11-23 14:03 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def event_details(event: Mapping[str, Any]) -> str:
    """Returns an event's fields beside its name, step and time as text: `2 ranks, device cuda`."""
    parts = []
    for key, value in event.items():
        if key in ("event", "step", "time", "total_steps") or value in (None, "", [], False):
            continue
        text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        if key == "world_size":
            text = "1 rank" if value == 1 else f"{value} ranks"
        bare = key in ("reason", "notes", "world_size", "host")
        parts.append(text if bare else f"{key.replace('_', ' ')} {text}")
    return ", ".join(parts)


def history_table(lines: Sequence[dict[str, Any]]) -> str:
    """Returns the events among `lines` as a Markdown table: when, at which step, what, and details."""
    return markdown_table(
        ("when", "step", "what", ""),
        (
            (format_time(event.get("time", 0)), event.get("step", 0), event["event"], event_details(event))
            for event in notable_events(lines)
        ),
    )


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table as TensorBoard's texts show it."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, *rows)]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|---" * len(heads) + "|", *body])
