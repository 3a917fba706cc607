"""How far long work has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

QUIET_S = 2.0
"""Work that is done sooner needs no words."""


@contextmanager
def transfers(shown: bool = True, console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of (verb, bytes done, bytes in all) that shows how far each verb's work has come.

    In a log each tenth is a line, and so is the end of what took longer than a moment. Not `shown`, it is silent.
    """
    if not shown:
        yield lambda verb, done, total: None
        return
    out = console or Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        yield _Lines(out).tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as bar:
        tasks = {}

        def move(verb: str, done: int, total: int) -> None:
            if verb not in tasks:
                tasks[verb] = bar.add_task(verb, total=total)
            bar.update(tasks[verb], completed=done, total=total)

        yield move


class _Lines:
    def __init__(self, out: Console) -> None:
        self._out = out
        self._began: dict[str, float] = {}
        self._told: dict[str, int] = {}

    def tell(self, verb: str, done: int, total: int) -> None:
        began = self._began.setdefault(verb, time.monotonic())
        tenth = 10 * done // max(total, 1)
        seconds = time.monotonic() - began
        if tenth > self._told.get(verb, 0) and seconds > QUIET_S:
            self._told[verb] = tenth
            rate = f" in {seconds:.0f} s" if tenth == 10 else ""
            self._out.print(f"{verb}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB{rate}", markup=False)
