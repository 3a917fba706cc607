"""Patience: slow work is waited for, failed work is told to all, a stop calls it off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from gan_dist.distributed.heartbeat import with_heartbeat
from gan_dist.distributed.world import World, join
from gan_dist.utils.errors import EXIT_STOPPED, UserError
from gan_dist.utils.stop import Cancelled, StopRequest
from tests.helpers.ranks import run_ranks


def test_alone_it_is_the_work_itself() -> None:
    assert with_heartbeat(World(), lambda cancelled: 7, StopRequest()) == 7
    with pytest.raises(ZeroDivisionError):
        with_heartbeat(World(), lambda cancelled: 1 // 0, StopRequest())
    with pytest.raises(UserError, match="bad") as caught:
        with_heartbeat(World(), _fail, StopRequest())
    assert not caught.value.reported_elsewhere


def _fail(cancelled: Callable[[], bool]) -> None:
    raise UserError("bad")


def test_a_stop_calls_the_work_off() -> None:
    stop, seen = StopRequest(), threading.Event()

    def work(cancelled: Callable[[], bool]) -> None:
        while not (cancelled() or stop):
            time.sleep(0.01)
        seen.set()
        raise Cancelled("in the work's own words")

    threading.Timer(0.2, stop.ask, args=("SIGTERM",)).start()
    with pytest.raises(Cancelled, match="stopped by SIGTERM") as caught:
        with_heartbeat(World(), work, stop)
    assert caught.value.exit_status == EXIT_STOPPED and seen.is_set()


def _slow_then_failing(rank: int) -> None:
    with join("cpu", timeout_s=3) as world:
        # Longer than a collective may take, on one rank only.
        def slow(cancelled: Callable[[], bool]) -> int:
            time.sleep(5 * rank)
            return rank

        assert with_heartbeat(world, slow, StopRequest()) == rank

        def work(cancelled: Callable[[], bool]) -> None:
            if rank == 1:
                raise UserError("rank 1 has no data")
            deadline = time.monotonic() + 20
            while not cancelled():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        with pytest.raises(UserError, match="rank 1 has no data") as caught:
            with_heartbeat(world, work, StopRequest())
        assert caught.value.reported_elsewhere == (rank == 0)

        def mistake(cancelled: Callable[[], bool]) -> float:
            return 1 / rank

        with pytest.raises(Exception, match="division by zero"):
            with_heartbeat(world, mistake, StopRequest())


@pytest.mark.chaos
def test_ranks_wait_for_slow_work_and_end_together() -> None:
    run_ranks(2, _slow_then_failing)
