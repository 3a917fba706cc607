"""Progress of long work: a bar on a terminal, a line for each tenth in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

QUIET_S = 2.0
"""A transfer that takes less time than this prints no line."""


@contextmanager
def progress(
    console: Console | None = None, *, shown: bool = True, in_bytes: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of (verb, done, total) that shows how far the work of each verb has come; total 0: unknown.

    With `in_bytes`, done and total are bytes, shown as megabytes. Without `shown`, nothing is printed.
    """
    if not shown:
        yield lambda verb, done, total: None
        return
    out = console or Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        yield _Lines(out, in_bytes).update
        return
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        tasks = {}

        def update(verb: str, done: int, total: int) -> None:
            if verb not in tasks:
                tasks[verb] = bar.add_task(verb, total=total or None)
            bar.update(tasks[verb], completed=done, total=total or None)

        yield update


class _Lines:
    """Prints a line whenever another tenth of a verb's work is done."""

    def __init__(self, out: Console, in_bytes: bool) -> None:
        self._out, self._in_bytes = out, in_bytes
        self._began: dict[str, float] = {}
        self._tenth: dict[str, int] = {}
        self._next: dict[str, float] = {}

    def update(self, verb: str, done: int, total: int) -> None:
        seconds = time.monotonic() - self._began.setdefault(verb, time.monotonic())
        if not total:  # after a second, two, four, ...
            if seconds >= self._next.setdefault(verb, 1.0):
                self._next[verb] = 2 * seconds
                self._out.print(f"{verb}: {done} so far", markup=False)
            return
        tenth = 10 * done // max(total, 1)
        if tenth <= self._tenth.get(verb, 0 if self._in_bytes else -1) or (self._in_bytes and seconds <= QUIET_S):
            return
        self._tenth[verb] = tenth
        line = f"{verb}: {done} of {total}"
        if self._in_bytes:
            line = f"{verb}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB" + (f" in {seconds:.0f} s" * (tenth == 10))
        self._out.print(line, markup=False)


Show = Callable[[str, int, int], None]
"""Shows how far the work of a verb has come: (verb, done, total); total 0: unknown."""


def silent(verb: str, done: int, total: int) -> None:
    """Shows nothing."""


class Ticks:
    """Adds up what it is called with. As a context, it has a thread that shows the sum, in units, five times a second:
    also while one long call is under way."""

    def __init__(self, show: Show, verb: str, unit: int = 1) -> None:
        self._show: Callable[[int], None] = lambda count: show(verb, count // unit, 0)
        self._count, self._done = 0, Event()
        self._thread = Thread(target=self._run, name="progress", daemon=True)

    def __call__(self, amount: int = 1) -> None:
        self._count += amount

    def _run(self) -> None:
        with suppress(OSError):  # whoever reads it has gone, as the main thread will find
            while not self._done.wait(0.2):
                self._show(self._count)

    def __enter__(self) -> Self:
        self._show(0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:
            self._show(self._count)
