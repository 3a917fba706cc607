"""A wish to stop, heard from the first moment of a rank's process on; imports nothing that takes time."""

from __future__ import annotations

import signal

from gan_dist.utils.stop import StopRequest

STOP = StopRequest()
"""What the signals of this process ask for. The trainer looks at it after each step."""
HEARD = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def hold_back() -> None:
    """Keeps what `listen` hears pending until that is called, however many handlers others install in between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)


def listen() -> None:
    """Makes SIGUSR2 (time limit, preemption), SIGTERM (cancel, preemption) and SIGINT set STOP and do nothing else.

    Replaces Submitit's handlers, which would requeue the job from within the rank and ignore SIGTERM. The pair CONT and
    TERM of a preemption needs no more than this.
    """

    def on_signal(number: int, frame: object) -> None:
        STOP.ask(signal.Signals(number).name)

    for number in HEARD:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)


def deafen() -> None:
    """Makes this process ignore what it listened for: it has done what it could, and a signal on its way out would
    turn a rank that has saved into one that was killed."""
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)
