"""A wish to stop, in a module that imports nothing: the command line listens for signals before torch is loaded."""

from __future__ import annotations


class StopRequest:
    """Voiced by a signal handler, a clock, a file or a caller; the trainer acts on it at a step's end.

    Setting it is safe in a signal handler: it touches no lock, no file and no collective.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Records the first reason; later ones change nothing."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        return self.reason is not None
