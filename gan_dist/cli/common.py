"""What the commands share: the console, and what Ctrl-C and a scheduler's signals do."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table

from gan_dist.utils.errors import EXIT_STOPPED
from gan_dist.utils.stop import StopRequest

console = Console(highlight=False, soft_wrap=True, emoji=False)


def print_lines(lines: Iterable[str]) -> None:
    """Prints plain lines on standard output, brackets and all."""
    for line in lines:
        console.print(line, markup=False)


def print_error(line: str) -> None:
    """Prints one line on standard error."""
    print(f"gan-dist: {line}", file=sys.stderr, flush=True)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints right-aligned columns on standard output; no cell is cut or wrapped, however narrow the terminal."""
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=10_000, markup=False, highlight=False, emoji=False).print(table)


def listen_for_signals(stop: StopRequest) -> None:
    """Turns Ctrl-C, SIGTERM and SIGUSR2 into a stop request; a second Ctrl-C exits at once."""

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop:
            raise SystemExit(128 + number)
        stop.ask(signal.Signals(number).name)

    _on_stop_signals(on_signal)


@contextmanager
def resumable() -> Iterator[None]:
    """Ends the work inside on Ctrl-C, SIGTERM or SIGUSR2 with one line and status 75; a second Ctrl-C exits at once.

    For work that keeps what it has finished and needs no stop request.
    """

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        raise KeyboardInterrupt(signal.Signals(number).name)

    _on_stop_signals(on_signal)
    try:
        yield
    except KeyboardInterrupt as stopped:
        print_error(f"stopped by {stopped}; what is finished is kept: run the same command again to continue")
        raise typer.Exit(EXIT_STOPPED) from None


def _on_stop_signals(handler: Callable[[int, object], None]) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)
