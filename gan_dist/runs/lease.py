"""One writer a run directory, also on NFS and Lustre: a lease that is renewed, watched, and fenced by a number.

No flock, whose reach differs between file systems. The lease is a file created by link(2), which is atomic everywhere.
Nobody compares clocks between hosts: it is stale when an observer has itself seen no renewal for a whole term, or when
its holder provably ended. Each holder has a greater fence than the last, and reads it back before every commit, so a
host that was cut off and comes back can no longer write.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gan_dist.utils.errors import GanDistError, UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `launch status` only looks at leases
    from gan_dist.distributed.world import World

T = TypeVar("T")
TERM_S = float(os.environ.get("GAN_DIST_LEASE_TERM_S") or 60)
"""Seconds without a renewal after which a lease is stale; a holder renews it four times in that time."""
LAUNCH_ID = "GAN_DIST_LAUNCH_ID"
"""Environment variable by which a launcher names a job: its requeued self takes the lease over at once."""


class LeaseLost(GanDistError):
    """Another trainer has taken this run over; this one must write no more."""


@dataclass(frozen=True)
class Holder:
    """What a lease file says of the trainer that holds it."""

    fence: int
    renewals: int
    nonce: str
    host: str
    pid: int
    started: str
    """Boot, pid namespace and start time of the process: with `pid`, one process of one kernel."""
    launch: str | None

    def ended(self) -> bool:
        """Returns whether this kernel knows that the holder's process is gone."""
        mine, theirs = _process_birth(os.getpid()).rsplit(":", 1)[0], self.started.rsplit(":", 1)[0]
        return bool(mine) and mine == theirs and _process_birth(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _process_birth(pid: int) -> str:
    """Returns `boot:namespace:start` of a process on this kernel, with an empty start when it is not running."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (the link's text is the answer)
    except OSError:
        return ""
    try:
        # Fields after the parenthesised name, which may itself hold spaces; the 20th of them is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start = "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        start = ""
    return f"{boot}:{namespace}:{start}"


def _read(path: Path) -> Holder | None:
    """Returns who holds the lease at `path`, or None where there is none (or an unreadable one, which holds nobody)."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


class Lease:
    """The right to write in a run directory, held from `take` to `release` and renewed by a thread in between."""

    def __init__(self, path: Path, holder: Holder, term_s: float) -> None:
        self._path, self._holder, self._term_s = path, holder, term_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, run_dir: Path, log: Callable[[str], None] = lambda line: None, term_s: float = TERM_S) -> Lease:
        """Returns the lease on `run_dir`, waiting one term at most to see whether a holder is alive.

        Raises UserError naming the holder when it is.
        """
        path = run_dir / "lease"
        mine = Holder(
            fence=1,
            renewals=0,
            nonce=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_process_birth(os.getpid()),
            launch=os.environ.get(LAUNCH_ID),
        )
        while True:
            holder = _read(path)
            if holder is not None:
                _await_expiry(path, holder, mine, log, term_s)
                mine = Holder(**{**asdict(mine), "fence": holder.fence + 1})
            if _create(path, mine, replacing=holder):
                return cls(path, mine, term_s)

    def check(self) -> None:
        """Raises LeaseLost unless this trainer still holds the lease."""
        holder = _read(self._path)
        if holder is None or holder.nonce != self._holder.nonce:
            taker = holder or "another trainer, which has ended since"
            raise LeaseLost(f"{self._path.parent} was taken over by {taker}; this trainer writes no more")

    def release(self) -> None:
        """Gives the run directory free for the next trainer."""
        self._over.set()
        self._thread.join()
        with suppress(OSError, LeaseLost):
            self.check()
            self._path.unlink()

    def _keep_renewing(self) -> None:
        while not self._over.wait(self._term_s / 4):
            # A disk that refuses a renewal may let the next one through; whether it mattered shows at the next check.
            with suppress(OSError):
                try:
                    self.check()
                except LeaseLost:
                    return
                self._holder = Holder(**{**asdict(self._holder), "renewals": self._holder.renewals + 1})
                temporary = _write_beside(self._path, self._holder)
                temporary.replace(self._path)


class Observer:
    """Tells whether leases are held, without waiting: one is stale once it was seen to stay as it is for a term."""

    def __init__(self, term_s: float = TERM_S) -> None:
        self._term_s = term_s
        self._seen: dict[Path, tuple[Holder, float]] = {}

    def held(self, run_dir: Path) -> bool:
        """Returns whether `run_dir` is held by somebody who may be alive."""
        holder = _read(run_dir / "lease")
        if holder is None or holder.ended():
            return False
        before, since = self._seen.get(run_dir, (None, 0.0))
        if holder != before:
            self._seen[run_dir] = holder, time.monotonic()
            return True
        return time.monotonic() - since < self._term_s


def seems_held(run_dir: Path, term_s: float = TERM_S) -> bool:
    """Returns whether `run_dir` looks held at one glance. For those who only tell of it: this trusts two clocks to
    agree within ten terms, which nobody who takes a lease over may do."""
    path = run_dir / "lease"
    holder = _read(path)
    if holder is None or holder.ended():
        return False
    with suppress(OSError):  # given free meanwhile
        return time.time() - path.stat().st_mtime < 10 * term_s
    return False


def _await_expiry(path: Path, holder: Holder, mine: Holder, log: Callable[[str], None], term_s: float) -> None:
    """Waits until `holder` may be taken over. Raises UserError when it renewed the lease meanwhile."""
    if holder.ended() or (holder.launch is not None and holder.launch == mine.launch):
        return
    log(f"{path.parent} is held by {holder}; waiting {term_s:g} s to see whether it is alive")
    deadline = time.monotonic() + term_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, term_s / 10))
        now = _read(path)
        if now is None:
            return
        if now != holder:
            raise UserError(
                f"{path.parent} is being trained by {now}, seen alive just now; wait for it, stop it "
                f"(touch {path.parent / 'stop'}), or choose another --run-dir"
            )


def _write_beside(path: Path, holder: Holder) -> Path:
    temporary = path.with_name(f".lease-{holder.nonce}-{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        json.dump(asdict(holder), file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _create(path: Path, mine: Holder, replacing: Holder | None) -> bool:
    """Returns whether `mine` became the lease: where there was none, or in place of exactly the one that was judged."""
    temporary = _write_beside(path, mine)
    aside = path.with_name(f".lease-aside-{mine.nonce}")
    try:
        if replacing is not None:
            try:
                path.rename(aside)
            except FileNotFoundError:
                return False
            if _read(aside) != replacing:
                # Somebody was quicker and this is their lease: put it back, unless they are being replaced already.
                with suppress(FileExistsError):
                    os.link(aside, path)
                return False
        elif path.exists() and _read(path) is None:
            path.unlink(missing_ok=True)  # not a lease at all: nobody's
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)


@contextmanager
def claim(
    run_dir: Path, world: World, check: Callable[[], T], log: Callable[[str], None]
) -> Iterator[tuple[T, Lease | None]]:
    """Yields what `check` returns on rank 0, and there the lease on the run directory, given back on the way out.

    `check` runs before anything is written, and again once the directory is ours: it may have moved in between.
    """
    leases: list[Lease] = []
    created = not run_dir.exists()

    def take() -> T:
        check()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            leases.append(Lease.take(run_dir, log))
        except OSError as error:
            raise UserError(f"cannot write the run directory {run_dir}: {error.strerror}") from None
        return check()

    try:
        yield world.from_first(take), leases[0] if leases else None
    finally:
        for lease in leases:
            lease.release()
            if created:  # and still empty: the start was refused
                with suppress(OSError):
                    run_dir.rmdir()
