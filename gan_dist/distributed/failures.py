"""When a rank dies, the others say which one, where, and what it said last, instead of a collective's stack trace.

Ranks meet once more in the rendezvous store, which torchrun's agent (or rank 0) keeps: whoever does not come is the one
that was lost. A rank that fails on its own leaves its last words there first.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gan_dist.distributed.world import World
from gan_dist.utils.errors import GanDistError, first_line

MEET_S = 5.0
"""How long survivors wait for one another: all of them fail within moments of the same lost connection."""


class RankLost(GanDistError):
    """A rank of the world is gone or hangs; the run continues from its last checkpoint when it is started again."""


class DeviceHangs(RankLost):
    """The device does not finish its work, as when it waits in a collective for a rank that is lost."""

    exit_now = True

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: how long the device was waited for."""
        super().__init__(f"the device did not finish a step within dist.timeout_s={timeout_s:g} s")


def _is_collective_failure(error: BaseException) -> bool:
    """Returns whether `error` is a collective's: another rank's trouble, seen from here."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    signs = (
        "gloo",
        "connection closed by peer",
        "connection reset by peer",
        "timed out waiting",
        "nccl",
        "broken pipe",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def device_may_hang(world: World, error: BaseException) -> bool:
    """Returns whether, after `error`, this rank's device may wait without end for another rank's."""
    return getattr(error, "exit_now", False) or (
        world.size > 1 and world.device.type == "cuda" and _is_collective_failure(error)
    )


@contextmanager
def naming_lost_ranks(world: World, run_dir: Path) -> Iterator[None]:
    """Within it, a collective that fails because a rank is lost raises RankLost, which names rank and host.

    Any other exception leaves its last words for the other ranks on its way out. Stack traces of all threads go to
    hang/ in the run directory when a collective timed out.
    """
    if world.size == 1:
        yield
        return
    hosts = world.gather_objects(world.host)
    try:
        yield
    except Exception as error:
        hangs = isinstance(error, DeviceHangs)
        if not hangs and (isinstance(error, GanDistError) or not _is_collective_failure(error)):
            _leave_words(world, str(error) if isinstance(error, GanDistError) else f"{type(error).__name__}: {error}")
            raise
        if hangs or "timed out" in str(error).lower() or "timeout" in str(error).lower():
            _dump_stacks(world, run_dir)
        lost = RankLost(_name_the_lost(world, hosts, error))
        lost.exit_now = device_may_hang(world, error)
        raise lost from error


def _store() -> Any:
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=MEET_S))
        return store
    return None


def _leave_words(world: World, words: str) -> None:
    if (store := _store()) is not None:
        with suppress(Exception):
            store.set(f"last-words/{world.rank}", words)


def _name_the_lost(world: World, hosts: list[str], error: BaseException) -> str:
    """Returns who did not come to the meeting of survivors, where they were, and what they said last."""
    store, reason = _store(), first_line(error)
    lost, words = [], {}
    try:
        if store is None:
            raise RuntimeError("no store")
        store.set(f"survivor/{world.rank}", "")
        deadline = time.monotonic() + MEET_S
        missing = set(range(world.size)) - {world.rank}
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if store.check([f"survivor/{rank}"])}
            explained = {rank for rank in missing if store.check([f"last-words/{rank}"])}
            if explained == missing:
                break
            time.sleep(0.1)
        lost = sorted(missing)
        words = {rank: store.get(f"last-words/{rank}").decode() for rank in lost if store.check([f"last-words/{rank}"])}
    except Exception:  # the store is gone as well, and with it whoever kept it
        lost = [0] if world.rank else []
    named = "; ".join(
        f"rank {rank} on {hosts[rank]} was lost" + (f", its last words: {words[rank]}" if rank in words else "")
        for rank in lost
    )
    advice = "run the same command again: it continues from the last checkpoint"
    return f"{named or 'a rank was lost, all say they are alive'} ({reason}); {advice}"


def _dump_stacks(world: World, run_dir: Path) -> None:
    """Writes this rank's stacks, and NCCL's flight record where there is one, to hang/ in the run directory."""
    with suppress(OSError):
        folder = run_dir / "hang"
        folder.mkdir(exist_ok=True)
        with (folder / f"rank-{world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if world.device.type == "cuda":
            with suppress(Exception):
                dump: Any = torch._C._distributed_c10d
                record = dump._dump_nccl_trace()
                (folder / f"rank-{world.rank}.nccl").write_bytes(record)
