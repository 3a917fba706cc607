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
    """A lock between the processes and threads of one machine, on a file that may be removed meanwhile.

    Where the system or file system has no flock, every lock is granted: temporary names keep writers apart, and the
    worst that can happen is that something is fetched twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def take(
        self, *, exclusive: bool, wait: Callable[[], bool] | None = None, give_up: Callable[[], bool] = never_cancelled
    ) -> bool:
        """Returns whether the lock is ours now; a lock taken before is freed first.

        With `wait` it tries until it has the lock or `give_up()` is true. Raises Cancelled when `wait()` is true.
        """
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
        """Whether the locked file is still the one that others will open."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        return False

    def hand_over(self) -> FileLock:
        """Returns a new owner of this lock, which leaving this one's context does not free."""
        other = FileLock(self.path)
        other._descriptor, self._descriptor = self._descriptor, -1
        return other

    def free(self) -> None:
        """Releases the lock, if there is one."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


_open_paths: set[str] = set()
_guard = threading.Lock()


class Locks:
    """Numbered locks, each on one byte of a file. POSIX record locks: NFS and Lustre honour them between machines.

    They separate processes only, so a process may open the locks of a path once at a time: GanDistError otherwise.
    """

    def __init__(self, path: Path) -> None:
        self.missing = False  # whether this system or file system turned out to have no locks
        self._name = os.path.realpath(path)
        with _guard:
            if self._name in _open_paths:
                raise GanDistError(f"this process is already preparing into {path.parent.parent}")
            _open_paths.add(self._name)
        try:
            self._stream = path.open("ab")
        except BaseException:
            self.close()
            raise

    def take(self, number: int, wait: bool = False) -> bool:
        """Returns whether lock `number` is ours now; with `wait`, waits for it."""
        try:
            import fcntl
        except ImportError:  # on Windows, temporary names keep writers apart
            self.missing = True
            return True
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks: likewise
            self.missing = True
        return True

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """A context in which lock `number` is ours, once it is free."""
        self.take(number, wait=True)
        try:
            yield
        finally:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.lockf(self._stream, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Releases all locks."""
        with _guard:
            _open_paths.discard(self._name)
        if hasattr(self, "_stream"):
            self._stream.close()
