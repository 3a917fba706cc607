"""The console of a run: a live panel on a terminal, one greppable line a log interval anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gan_dist.runs.record import read_run

FIGURES = {
    "epoch": ("progress/epoch", ".2f"),
    "images/s": ("throughput/images_per_second", ".1f"),
    "loss_d": ("loss/discriminator", ".3f"),
    "loss_g": ("loss/generator", ".3f"),
    "d_real": ("probability/real", ".3f"),
    "d_fake": ("probability/fake", ".3f"),
    "swd": ("evaluate/swd", ".1f"),
    "wait": ("throughput/data_wait_fraction", ".3f"),
    "gib": ("memory/device_gib", ".1f"),
    "skipped": ("updates/skipped", ".0f"),
}
"""A run's figures on the console, in a log and in `status`: key -> (tag, format)."""

PINNED = 4
"""Warnings that the panel keeps in sight; older ones have scrolled by above it."""


def duration(seconds: float) -> str:
    """Returns seconds as 42s, 3m10s, 5h04m or 2d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def figures(values: Mapping[str, float | None]) -> dict[str, str]:
    """Returns the values that are there as text, for example {"epoch": "0.25", "loss_d": "0.512"}."""
    return {
        key: format(value, form)
        for key, (tag, form) in FIGURES.items()
        if (value := values.get(tag)) is not None and not (key == "skipped" and value == 0)
    }


def line_of(step: int, total: int, values: Mapping[str, float | None], left: float | None = None) -> str:
    """Returns one line of key=value pairs, as a log has them each interval and `status` shows them."""
    pairs = [f"step={step}/{total}", *(f"{key}={text}" for key, text in figures(values).items())]
    return " ".join([*pairs, *([f"left={duration(left)}"] if left is not None else [])])


def status_line(path: str | Path, state: str = "") -> str:
    """Returns a run in one line: its name, its state, then step=... loss_d=... of its newest point, as a log has them.

    `state` is another word for it, of one who knows more than the run's files. A run in progress also gets left=...,
    the time that the remaining images take at the newest rate. Raises UserError where there is no run.
    """
    run = read_run(path)
    state = state or run.state
    newest = run.points[-1] if run.points else {}
    step, rate, left = newest.get("step", run.step), newest.get("throughput/images_per_second"), None
    if state == "running" and step and rate:
        left = (run.total - step) * newest["images_seen"] / step / rate
    line = line_of(step, run.total, newest, left)
    return f"{run.name} {state} {line}" + (f" ({run.why})" if run.why and state == run.state else "")


class RunConsole:
    """Shows a run's progress from `step` to `total` on `console` (standard output).

    verbosity: None shows nothing; -1 only warnings; 0 one line (or the panel) each log interval; 1 adds every tag that
    was logged.
    """

    def __init__(
        self, name: str, step: int, total: int, console: Console | None = None, verbosity: int | None = 0
    ) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True, quiet=verbosity is None)
        self._verbosity = -1 if verbosity is None else verbosity
        self._name, self._step, self._total = name, step, total
        self._began = self._mark = (time.monotonic(), step)
        self._steps_per_second: float | None = None
        self._values: dict[str, float] = {}
        self._sample: Path | None = None
        self._warnings: list[str] = []
        self._live: Live | None = None
        if self._verbosity >= 0 and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Twice a second: each refresh takes milliseconds of the core that also feeds the device.
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2)
            self._live.start()

    def progress(self, step: int) -> None:
        """Moves the bar."""
        self._step = step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the step's figures: in the panel, or as a line of key=value pairs."""
        self._step, self._values = step, dict(values)
        now, (then, before) = time.monotonic(), self._mark
        self._mark = (now, step)
        if step > before and now > then:
            rate = (step - before) / (now - then)
            # A moving average: one slow interval (a checkpoint, samples) should not swing the time left.
            old = self._steps_per_second
            self._steps_per_second = rate if old is None else 0.7 * old + 0.3 * rate
        if self._live is None and self._verbosity >= 0:
            line = line_of(step, self._total, values, self._left())
            if self._verbosity > 0:
                shown = {tag for tag, _ in FIGURES.values()}
                line += "".join(f" {tag}={value:.5g}" for tag, value in values.items() if tag not in shown)
            self._print(line)

    def sample(self, path: Path) -> None:
        """Names the newest samples."""
        self._sample = path

    def log(self, line: str) -> None:
        """Prints a line, above the panel where there is one."""
        if self._verbosity >= 0:
            self._print(line)

    def warn(self, line: str) -> None:
        """Prints a warning, and keeps the newest few in sight."""
        self._warnings = [*self._warnings, line][-PINNED:]
        self._print(f"WARNING: {line}")

    def close(self) -> None:
        """Ends the panel; its last state stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def _left(self) -> float | None:
        """Returns the seconds until the end at the present rate, or None while no rate is known."""
        if self._steps_per_second is None:
            return None
        return (self._total - self._step) / self._steps_per_second

    def _panel(self) -> RenderableType:
        left = self._left()
        done = self._step / max(1, self._total)
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            f"step {self._step}/{self._total}",
            ProgressBar(total=max(1, self._total), completed=self._step),
            f"{done:.0%}, {duration(left)} left" if left is not None else f"{done:.0%}",
        )
        words = figures(self._values)
        words["elapsed"] = duration(time.monotonic() - self._began[0])
        columns = max(1, min(len(words), (self._console.width - 4) // 18))
        cells = [Text.assemble((f"{word} ", "dim"), (text, "bold")) for word, text in words.items()]
        body = Table.grid(expand=True, padding=(0, 2))
        for _ in range(columns):
            body.add_column(ratio=1, no_wrap=True)
        for start in range(0, len(cells), columns):
            body.add_row(*cells[start : start + columns])
        parts: list[RenderableType] = [head, body]
        if self._verbosity > 0:
            shown = {tag for tag, _ in FIGURES.values()}
            rest = [f"{tag} {value:.5g}" for tag, value in self._values.items() if tag not in shown]
            parts.append(Text("  ".join(rest), style="dim"))
        if self._sample is not None:
            parts.append(Text.assemble(("newest samples ", "dim"), str(self._sample), overflow="fold"))
        parts += [Text(f"! {line}", style="yellow", overflow="fold") for line in self._warnings]
        return Panel(Group(*parts), title=escape(self._name), title_align="left", border_style="dim")
