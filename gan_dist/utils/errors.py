"""The errors that a user sees as one line, and the exit status of each."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""Stopped on request with a checkpoint saved (EX_TEMPFAIL): the same command continues."""


class GanDistError(Exception):
    """The work failed for a reason that fits one line. The command exits with status 1."""

    exit_status = EXIT_FAILED
    reported_elsewhere = False
    """Whether another rank raised this error and reports it; this rank then exits silently."""
    exit_now = False
    """Whether a device hangs, so that whatever waits for it would hang too: once the error is written, the process must
    leave by `exit_at_once`, without cleaning up."""


class UserError(GanDistError):
    """Bad usage, configuration or input. Its line says what was expected, what was found and what to do. Status 2."""

    exit_status = EXIT_USAGE


def exit_at_once(error: GanDistError) -> None:
    """Ends the process if `error` says so; its lines are flushed, nothing else is finished."""
    if error.exit_now:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(error.exit_status)


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's text, or the name of its class when it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
