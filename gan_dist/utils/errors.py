"""The errors a person sees as one line, and the exit status each one ends with."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""Stopped on request with a checkpoint saved (EX_TEMPFAIL): run the same command again."""


class GanDistError(Exception):
    """The work failed for a reason that one line can tell. Ends the command with status 1."""

    exit_status = EXIT_FAILED
    reported_elsewhere = False
    """Whether another rank raised this first and tells the user; this rank then ends without a word."""


class UserError(GanDistError):
    """Bad usage, configuration or input: says what was expected, what was found, what to do. Status 2."""

    exit_status = EXIT_USAGE


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's text, or the name of its class when it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
