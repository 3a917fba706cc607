"""A wish to stop, heard from the first moment of a rank's process on; imports nothing that takes time."""

from __future__ import annotations

import signal

from gan_dist.stop import StopRequest

STOP = StopRequest()
"""What the signals of this process ask for. The trainer looks at it after each step."""


def listen() -> None:
    """Makes SIGUSR2 (time limit, preemption), SIGTERM (cancel, preemption) and SIGINT set STOP and do nothing else.

    Replaces Submitit's handlers, which would requeue the job from within the rank and ignore SIGTERM. The pair CONT and
    TERM of a preemption needs no more than this.
    """

    def on_signal(number: int, frame: object) -> None:
        STOP.ask(signal.Signals(number).name)

    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
