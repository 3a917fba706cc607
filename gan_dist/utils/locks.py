"""One writer for each shard, across processes and machines: byte ranges of one lock file, freed when a process dies."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gan_dist.utils.errors import GanDistError

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

    @contextmanager
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
