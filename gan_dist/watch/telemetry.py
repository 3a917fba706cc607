"""What a run tells: TensorBoard, metrics.jsonl and the console. Silent off rank 0; each logged step stands once.

A run that resumes from step s drops the metric lines after s (events stay: they are its history) and opens TensorBoard
with purge_step = s + 1, so curves are clean through any number of restarts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gan_dist.watch.console import make_console


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, metrics and events in order; a line that a kill cut short is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


def _rewind(path: Path, step: int) -> None:
    """Drops the metric lines after `step` and any torn line from the file at `path`, all at once or not at all."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if "event" in line or line.get("step", 0) <= step]
    content = "".join(json.dumps(line) + "\n" for line in kept)
    if content != path.read_text(encoding="utf-8"):
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class Telemetry:
    """The run's voice on the rank that is `active`; on every other rank each call does nothing."""

    def __init__(self, run_dir: Path, *, active: bool, step: int, total_steps: int, console: bool = True) -> None:
        """`step` is that of the checkpoint that was resumed from, 0 for a new run."""
        self._console = make_console(active and console, step, total_steps)
        self._board: SummaryWriter | None = None
        if active:
            path = run_dir / "metrics.jsonl"
            _rewind(path, step)
            self._metrics = path.open("a", encoding="utf-8")
            # A new run has drawn nothing yet, and a run resumed at step 0 draws its first pictures again.
            purge = step + 1 if step else 0
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def progress(self, step: int) -> None:
        """Notes that `step` is done. Cheap: called at every step."""
        self._console.progress(step)

    def scalars(self, step: int, images_seen: int, values: Mapping[str, float]) -> None:
        """Writes one point of every tag in `values`."""
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)
            self._write({"step": step, "images_seen": images_seen, **values})
        self._console.scalars(step, values)

    def image(self, tag: str, step: int, image: Tensor) -> None:
        """Writes a picture, uint8 [3, H, W], to TensorBoard."""
        if self._board is not None:
            self._board.add_image(tag, image, step)

    def text(self, tag: str, step: int, text: str) -> None:
        """Writes a text (Markdown) to TensorBoard."""
        if self._board is not None:
            self._board.add_text(tag, text, step)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Writes a line of the run's history: a start, a stop, a skip, ..."""
        if self._board is not None:
            self._write({"event": name, "step": step, "time": round(time.time(), 3), **fields})
            self._metrics.flush()

    def say(self, line: str) -> None:
        """Prints a line on the console."""
        self._console.say(line)

    def flush(self) -> None:
        """Returns once all that was told is in the files, on the disk."""
        if self._board is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files and the console."""
        self._console.close()
        if self._board is not None:
            self._metrics.close()
            self._board.close()
            self._board = None

    def _write(self, line: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
