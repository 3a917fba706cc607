"""Work that may take longer than a collective may: the ranks tell one another every second that they are alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from gan_dist.distributed.world import World
from gan_dist.utils.errors import GanDistError
from gan_dist.utils.stop import Cancelled, StopRequest

T = TypeVar("T")
HEARTBEAT_S = 1.0
GRACE_S = 3.0
"""Seconds that work gets to clean up when it is called off."""


def with_heartbeat(world: World, work: Callable[[Callable[[], bool]], T], stop: StopRequest) -> T:
    """Returns this rank's `work(cancelled)`, however long it takes on whichever rank; a collective.

    It runs in a thread, while the ranks tell one another every second that they are alive: a timeout of the collectives
    bounds the silence of a rank, not its work. As soon as it fails on one, it is called off on all.

    Raises what the first failing rank raised, on every rank; Cancelled (status 75) when one was asked to stop.
    """
    value: list[Any] = []
    failure: list[BaseException] = []
    off = threading.Event()

    def run() -> None:
        try:
            value.append(work(off.is_set))
        except BaseException as error:  # handed over: the ranks raise it together
            failure.append(error)

    thread = threading.Thread(target=run, name="patience", daemon=True)
    thread.start()
    while True:
        until = time.monotonic() + HEARTBEAT_S
        while thread.is_alive() and time.monotonic() < until:
            thread.join(0.05)
            if world.size == 1 and stop:
                break
        done = not thread.is_alive()
        answers = world.gather_objects((done, _portable(failure, world), stop.reason))
        failures = [(rank, error) for rank, (_, error, _) in enumerate(answers) if error is not None]
        reasons = [reason for _, _, reason in answers if reason]
        if reasons:  # work that heeds the same request by itself is no failure
            failures = [(rank, error) for rank, error in failures if not isinstance(error, Cancelled)]
        if failures or reasons:
            off.set()
            thread.join(GRACE_S)
            if failure and not isinstance(failure[0], GanDistError | OSError):
                raise failure[0]  # a mistake of ours: with its traceback
            rank, error = failures[0] if failures else (0, _stopped(reasons[0]))
            if isinstance(error, GanDistError):
                error.reported_elsewhere = rank != world.rank
            raise error
        if all(done for done, _, _ in answers):
            result: T = value[0]
            return result


def _portable(failure: list[BaseException], world: World) -> GanDistError | OSError | None:
    """Returns a failure in a form that can be sent to the other ranks."""
    if not failure or isinstance(failure[0], GanDistError | OSError):
        return failure[0] if failure else None  # type: ignore[return-value]
    return GanDistError(f"rank {world.rank} on {world.host} failed: {type(failure[0]).__name__}: {failure[0]}")


def _stopped(reason: str) -> Cancelled:
    return Cancelled(
        f"stopped by {reason} while data were fetched, before any step; run the same command again to continue"
    )
