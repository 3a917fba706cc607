"""The console of a run: a live bar on a terminal, one greppable line a log interval anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def duration(seconds: float) -> str:
    """Returns seconds as people say them: 42s, 3m10s, 5h04m, 2d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class RunConsole:
    """Shows a run's progress from `step` to `total` on `console` (standard output)."""

    def __init__(self, step: int, total: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total = total
        self._mark = (time.monotonic(), step)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[words]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=total, completed=step, words="")
            self._bar.start()

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the step's figures: beside the bar, or as a line of key=value words."""
        short = {
            "epoch": f"{values.get('progress/epoch', 0):.2f}",
            "images/s": f"{values.get('throughput/images_per_second', 0):.0f}",
            "loss_d": f"{values.get('loss/discriminator', 0):.3f}",
            "loss_g": f"{values.get('loss/generator', 0):.3f}",
        }
        if self._bar is not None:
            self._bar.update(self._task, completed=step, words=" ".join(f"{k} {v}" for k, v in short.items()))
            return
        now, (then, before) = time.monotonic(), self._mark
        self._mark = (now, step)
        left = (now - then) / max(1, step - before) * (self._total - step)
        words = " ".join(f"{key}={value}" for key, value in short.items())
        probabilities = f"d_real={values.get('probability/real', 0):.3f} d_fake={values.get('probability/fake', 0):.3f}"
        self.say(f"step={step}/{self._total} {words} {probabilities} left={duration(left)}")

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


class Silence:
    """The console of every rank but the first, and of a library call that asked for quiet."""

    def progress(self, step: int) -> None:
        """Nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def make_console(active: bool, step: int, total: int) -> Any:
    """Returns the console of a run, or silence."""
    return RunConsole(step, total) if active else Silence()
