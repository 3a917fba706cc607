"""Locks between processes: one on a whole file within a machine, and numbered ones across machines.

The kernel frees both kinds when a process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gan_dist.utils.errors import GanDistError
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled

POLL_S = 0.05


class FileLock:
    """A lock that processes and threads of one machine share, on a file that may be removed meanwhile.

    Where the system or file system has no flock, every lock is granted: temporary names keep writers apart, and the
    worst that happens is that something is fetched twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def take(
        self, *, exclusive: bool, wait: Callable[[], bool] | None = None, give_up: Callable[[], bool] = never_cancelled
    ) -> bool:
        """Returns whether the lock is ours now. With `wait` it comes back with the lock, or without it when `give_up()`
        is true, and raises Cancelled as soon as `wait()` is. A lock that was held before is given back first."""
        while True:
            self.free()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            if self._lock(exclusive) and self._still_named():
                return True
            self.free()
            if wait is None or give_up():
                return False
            raise_if_cancelled(wait)
            time.sleep(POLL_S)

    def _lock(self, exclusive: bool) -> bool:
        try:
            import fcntl

            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (ImportError, OSError):
            return True
        return True

    def _still_named(self) -> bool:
        """Whether the file that is locked is the one that others will open."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        return False

    def hand_over(self) -> FileLock:
        """Returns another holder of this lock, which leaving this one's context does not free."""
        other = FileLock(self.path)
        other._descriptor, self._descriptor = self._descriptor, -1
        return other

    def free(self) -> None:
        """Gives the lock back; without one, does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


_here: set[str] = set()
_guard = threading.Lock()


class Locks:
    """Locks of numbered things. POSIX record locks: NFS and Lustre honour them between machines; they hold between
    processes only, so a process may open a path's locks once at a time (a second time is a GanDistError)."""

    def __init__(self, path: Path) -> None:
        self.missing = False  # whether this file system or this machine turned out to have none
        self._name = os.path.realpath(path)
        with _guard:
            if self._name in _here:
                raise GanDistError(f"this process is already preparing into {path.parent.parent}")
            _here.add(self._name)
        try:
            self._stream = path.open("ab")
        except BaseException:
            self.close()
            raise

    def take(self, number: int, wait: bool = False) -> bool:
        """Returns whether thing `number` is now ours; with `wait`, waits until it is."""
        try:
            import fcntl
        except ImportError:  # on Windows temporary names of their own keep writers apart
            self.missing = True
            return True
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks; the same holds
            self.missing = True
        return True

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Holds thing `number` within the context, having waited for it."""
        self.take(number, wait=True)
        try:
            yield
        finally:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.lockf(self._stream, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Frees all."""
        with _guard:
            _here.discard(self._name)
        if hasattr(self, "_stream"):
            self._stream.close()
