"""A run read back from its directory: its configuration, history, figures, samples and checkpoints."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gan_dist.runs.metrics_file import PROTOCOL, notable_events, read_metrics
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand

NETWORKS = ("inception", "encoder")
"""Whose features some figures are of: a protocol names the weights of each that was used."""
LIVE_WITHIN_S = 600
"""A run without an end or a stop counts as running while its files are younger than this."""


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Returns the rows that `gan-dist evaluate` has kept in a run: step, swd, protocol and more."""
    return [line for line in read_metrics(run / "evaluations.jsonl") if "step" in line and "swd" in line]


@dataclass(frozen=True)
class Run:
    """Everything that a run directory holds; whatever is missing there is empty here."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    points: tuple[dict[str, Any], ...]
    """The metric lines, by step."""
    events: tuple[dict[str, Any], ...]
    samples: tuple[tuple[int, Path], ...]
    """(step, picture) of each grid of the fixed latents."""
    real: Path | None
    classes: tuple[int, Path] | None
    """(step, picture) of the newest grid of classes."""
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints that exist, in order."""
    evaluations: tuple[dict[str, Any], ...] = ()
    """Rows of figures by step: those of `gan-dist evaluate`, and those made during training."""
    dataset: dict[str, Any] = field(default_factory=dict)
    """The dataset's card (telemetry.gallery.dataset_card); empty where there is none."""
    touched: float = 0.0
    """When the run last wrote a file, in seconds since 1970."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        """The newest step that left a trace: a metric line, an event or a checkpoint."""
        traces = [line.get("step", 0) for line in (*self.points, *self.events)]
        return max([*traces, *self.checkpoints], default=0)

    @property
    def total(self) -> int:
        """The step at which the run ends, as its last start announced it; the newest step where none did."""
        totals = [event["total_steps"] for event in self.events if event.get("total_steps")]
        return max(int(totals[-1]), self.step) if totals else self.step

    @property
    def state(self) -> str:
        """done, stopped, running, interrupted (no end or stop, and no news for LIVE_WITHIN_S) or empty."""
        last = next((e["event"] for e in reversed(self.events) if e["event"] in ("start", "stop", "end")), None)
        if last is None and not self.points:
            return "empty"
        if last in ("end", "stop"):
            return "done" if last == "end" else "stopped"
        return "running" if time.time() - self.touched < LIVE_WITHIN_S else "interrupted"

    @property
    def why(self) -> str:
        """The reason of the last stop, or nothing."""
        words = [e for e in self.events if e["event"] in ("start", "stop", "end")]
        return str(words[-1].get("reason") or "") if words else ""


def read_run(path: str | Path) -> Run:
    """Returns the run in directory `path`, be it in progress, finished or crashed.

    Raises UserError when there is no such directory, or when it holds no run.
    """
    root = expand(path)
    if not root.is_dir():
        raise UserError(f"no run at {root}; expected a run directory or a name under $GAN_DIST_RUNS (default ./runs)")
    if not (root / "config.yaml").is_file():
        raise UserError(f"{root} holds no run (no config.yaml); expected a directory that `gan-dist train` made")
    lines = read_metrics(root / "metrics.jsonl")
    points = sorted((line for line in lines if "event" not in line and "step" in line), key=lambda line: line["step"])
    samples = sorted((step_of(file), file) for file in (root / "samples").glob("step-*.png") if step_of(file) >= 0)
    classes = sorted(
        (int(file.stem.removeprefix("classes-")), file)
        for file in (root / "samples").glob("classes-*.png")
        if file.stem.removeprefix("classes-").isdecimal()
    )
    checkpoints = sorted(
        step_of(folder) for folder in (root / "checkpoints").glob("step-*") if (folder / "manifest.json").is_file()
    )
    real = root / "samples" / "real.png"
    config = _mapping(root / "config.yaml")
    written = [file.stat().st_mtime for file in (root / "metrics.jsonl", root / "environment.json") if file.exists()]
    return Run(
        path=root,
        config=config,
        environment=_mapping(root / "environment.json"),
        points=tuple(points),
        events=tuple(notable_events(lines)),
        samples=tuple(samples),
        real=real if real.is_file() else None,
        classes=classes[-1] if classes else None,
        checkpoints=tuple(step for step in checkpoints if step >= 0),
        evaluations=_evaluations(root, lines),
        dataset=_mapping(root / "dataset.json"),
        touched=max(written, default=0.0),
    )


def _evaluations(root: Path, lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    during, protocol = [], None
    for line in lines:
        if line.get("event") == PROTOCOL:
            protocol = {key: value for key, value in line.items() if key not in ("event", "step", "time")}
        elif line.get("evaluate/swd") is not None:
            row = {tag.removeprefix("evaluate/"): line[tag] for tag in line if tag.startswith("evaluate/")}
            during.append({"step": line["step"], **row, "protocol": protocol})
    return tuple(merged([*during, *read_evaluations(root)]))


def merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows of evaluations by step, with rows of the same step and protocol merged; later figures win.

    Rows with different NETWORKS or held-out sets stay apart; a row without joins one that has them.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike = groups.setdefault((int(row["step"]), comparable(row)), [])
        earlier = next((one for one in alike if _agree(one, row)), None)
        if earlier is None:
            alike.append(dict(row))
        else:
            protocol = {**_protocol(earlier), **{key: one for key, one in _protocol(row).items() if one is not None}}
            earlier.update({**row, "protocol": protocol or None})
    return sorted((row for alike in groups.values() for row in alike), key=lambda row: int(row["step"]))


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(weights_of(one, name), weights_of(other, name)) for name in NETWORKS]
    pairs.append((one.get("held_out"), other.get("held_out")))
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def weights_of(row: Mapping[str, Any], network: str) -> str | None:
    """Returns the hash of the weights of one of NETWORKS behind a row's figures, or None."""
    return _protocol(row).get(network)


def _protocol(row: Mapping[str, Any]) -> dict[str, Any]:
    return row.get("protocol") or {}


def comparable(row: Mapping[str, Any]) -> str:
    """Returns the part of the protocol that two rows must share for their swd to be compared."""
    return json.dumps({key: one for key, one in _protocol(row).items() if key not in NETWORKS}, sort_keys=True)


def by_protocol(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns rows of evaluations in groups that may be compared, the largest group first, steps in order.

    Rows without one of NETWORKS join those of the weights that were used most.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(comparable(row), []).append(row)
    tables: list[list[dict[str, Any]]] = []
    for group in groups.values():
        most = [_most_used(group, name) for name in NETWORKS]
        split: dict[tuple[str | None, ...], list[dict[str, Any]]] = {}
        for row in group:
            used = (weights_of(row, name) or usual for name, usual in zip(NETWORKS, most, strict=True))
            split.setdefault(tuple(used), []).append(row)
        tables += split.values()
    return sorted(tables, key=len, reverse=True)


def _most_used(rows: Sequence[dict[str, Any]], network: str) -> str | None:
    used = Counter(weights for row in rows if (weights := weights_of(row, network)))
    return max(used, key=used.__getitem__, default=None)


def step_of(path: Path) -> int:
    """Returns the step in a name like step-00000200.png, or -1 where there is none."""
    match = re.fullmatch(r"step-(\d+)(\.png)?", path.name)
    return int(match[1]) if match else -1


def _mapping(path: Path) -> dict[str, Any]:
    """Returns a YAML or JSON file's mapping; an empty one where the file is missing or holds something else."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
