"""Stop requests and cancelled work. Imports nothing heavy: the command line listens before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable

from gan_dist.utils.errors import EXIT_STOPPED, GanDistError


class StopRequest:
    """Made by a signal handler, a clock, a file or a caller; the trainer acts on it at the end of a step.

    Safe to make in a signal handler: it touches no lock, no file and no collective.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Records the first reason; later ones change nothing."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        return self.reason is not None


class Cancelled(GanDistError):
    """The work was cancelled, by a stop request or because another rank has failed. Status 75."""

    exit_status = EXIT_STOPPED


def never_cancelled() -> bool:
    """Returns False: for work that nobody cancels."""
    return False


def raise_if_cancelled(cancelled: Callable[[], bool]) -> None:
    """Raises Cancelled when `cancelled()` is true."""
    if cancelled():
        raise Cancelled(
            "stopped while fetching data; what has been fetched stays in the cache if data.cache_dir is set"
        )
