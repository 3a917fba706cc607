"""The `gan-dist` command: its sub-commands, and how errors become one line and an exit status."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gan_dist.cli.bench import bench
from gan_dist.cli.common import print_error, print_lines
from gan_dist.cli.data import prepare, verify
from gan_dist.cli.evaluate import encoder, evaluate
from gan_dist.cli.runs import demo, report, sample, train
from gan_dist.utils.errors import EXIT_FAILED, GanDistError, exit_at_once


class _InOrderOfUse(TyperGroup):
    """Lists groups of commands after single commands, which are listed as they were added."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: isinstance(self.commands[name], TyperGroup))


app = typer.Typer(
    name="gan-dist",
    cls=_InOrderOfUse,
    help="Train a DCGAN on paintings, on any number of processes.",
    epilog="Exit status: 0 done; 1 failed; 2 bad usage, config or input; 75 stopped with a checkpoint: run it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False) -> None:
    """Check this machine and environment."""
    from gan_dist.doctor import diagnose, healthy

    findings = diagnose()
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        print_lines(finding.line() for finding in findings)
    if not healthy(findings):
        raise typer.Exit(EXIT_FAILED)


for command in (doctor, demo, prepare, verify, train, sample, encoder, evaluate, report):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Runs the command that the arguments name and exits with its status; a user's mistake is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may be "Naïve Art" where a terminal knows ASCII
    threading.excepthook = _ignore_disk_errors(threading.excepthook)
    try:
        app()
    except GanDistError as error:
        if not error.reported_elsewhere:
            print_error(str(error))
        exit_at_once(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ignore_disk_errors(otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a hook for exceptions in threads that leaves out OSErrors: our own threads hand theirs over.

    The one that does not is TensorBoard's writer; telemetry warns in one line when it stops.
    """

    def hook(failure: Any) -> None:
        if not issubclass(failure.exc_type, OSError):
            otherwise(failure)

    return hook


if __name__ == "__main__":
    main()
