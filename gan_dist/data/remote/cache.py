"""The cache of a remote dataset: each shard is fetched once a machine, however many processes use it.

The folder is named after the manifest's hash, so all processes that use the same data share it. A file there under its
final name is complete and verified: it is hashed while it arrives and renamed at the end.
Locks are flock(2) on small files: the kernel frees them when a process dies, however it dies.

    HOME = <cache_dir>/gan_dist-<uid>, or gan_dist-<uid>.auto in a place chosen here
    HOME/<hash>.lock                   shared by every user of the folder; exclusive to remove it
    HOME/<hash>/staging.lock           exclusive to fetch the whole set
    HOME/<hash>/shard-00000.tar.lock   exclusive to fetch or remove a shard; shared to use it in a window
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gan_dist.data.remote.fetch import RetryPolicy, fetch, file_address, redacted
from gan_dist.data.shards import MANIFEST, Manifest, quick_fault
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import expand, fsync_folder, temporary_name, write_atomically
from gan_dist.utils.locks import POLL_S, FileLock
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled
from gan_dist.utils.system import NETWORK, file_system, room

FETCHERS = 4
"""Shards fetched at once: an object store gives one connection a fraction of its bandwidth."""
GRACE_S = 2.0
"""Seconds that threads get at the end to remove their partial files."""
STANDSTILL_S = 300.0
"""Seconds without growth after which the process with the lock counts as hung, and is no longer waited for."""


def choose_home(cache_dir: str | Path | None, name: str, needed: int) -> Path:
    """Returns the private folder for the folder `name` of `needed` bytes, having made it where it was missing.

    Without a `cache_dir`, the first with room of node-local scratch ($TMPDIR or /tmp), /dev/shm and ~/.cache. A place
    that already has the folder comes first, so that all processes of a machine share it.

    Raises:
        UserError: no place has room, or the folder belongs to another user.
    """
    user = str(os.geteuid()) if hasattr(os, "geteuid") else getpass.getuser()
    if cache_dir is not None:
        homes = [expand(cache_dir) / f"gan_dist-{user}"]
    else:
        places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
        places = [path for path in places if path.is_dir() and not NETWORK.search(file_system(path))]
        places.append(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
        homes = [path / f"gan_dist-{user}.auto" for path in places]
    for home in sorted(homes, key=lambda home: not (home / name).is_dir()):
        if needed - folder_size(home / name) <= room(home):
            return private_folder(home)
    free = "; ".join(f"{home.parent} has room for {room(home) / 2**30:.1f}" for home in homes)
    raise UserError(
        f"staging needs {needed / 2**30:.1f} GiB on this machine, but {free}; set data.cache_dir to a larger disk, or "
        "data.window_shards to stage a few shards at a time"
    )


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in `folder`; 0 when it does not exist."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def private_folder(path: Path) -> Path:
    """Returns `path`, made as a folder that no other user can enter. Raises UserError when it belongs to another."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()  # lstat: a link that another user placed here could lead anywhere
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or path.is_symlink() or not path.is_dir()):
            raise UserError(
                f"the cache {path} belongs to user {status.st_uid} or is no folder: its content cannot be trusted; "
                "set data.cache_dir to a folder of your own"
            )
        path.chmod(0o700)
    except OSError as error:
        raise UserError(f"the cache {path} cannot be made ({error.strerror}): set data.cache_dir") from None
    return path


class Cache:
    """The folder of one dataset on this machine, shared by any number of processes."""

    def __init__(
        self,
        address: str,
        manifest: Manifest,
        folder: Path,
        windowed: bool,
        automatic: bool,
        retry: RetryPolicy | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.address, self.manifest, self.folder, self.windowed = address, manifest, folder, windowed
        self._retry, self._log = retry, log
        self._lock = FileLock(folder.parent / f"{folder.name}.lock")
        self._locks: dict[int, FileLock] = {}
        # Also at the end of the process: an automatic cache must not stay because someone forgot to close it.
        self._leave = weakref.finalize(self, _leave, folder, self._lock, self._locks, automatic)

    def enter(self, manifest: bytes, cancelled: Callable[[], bool] = never_cancelled) -> None:
        """Registers as a user of the folder, which is made where it is missing."""
        with _writing(self.folder):
            while True:
                private_folder(self.folder.parent)
                with suppress(FileNotFoundError):  # its last user has just removed it: try again
                    self._lock.take(exclusive=False, wait=cancelled)
                    break
            self.folder.mkdir(mode=0o700, exist_ok=True)
            with FileLock(self.folder / f"{MANIFEST}.lock") as lock:
                lock.take(exclusive=True, wait=cancelled, give_up=_Standstill(self.folder))
                if not (self.folder / MANIFEST).exists():
                    write_atomically(self.folder / MANIFEST, manifest)

    @property
    def total(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.manifest.shards)

    def fetch_shard(self, i: int, cancelled: Callable[[], bool] = never_cancelled) -> None:
        """Returns once shard `i` is in the folder, complete and verified; there it stays until it is dropped.

        The first process that asks for it fetches it, the others wait.
        """
        if i in self._locks:
            return
        shard, fetched = self.manifest.shards[i], False
        path, lock = self.folder / shard.file, FileLock(self.folder / f"{shard.file}.lock")
        hung = _Standstill(self.folder)
        with _writing(self.folder), lock:
            while True:
                lock.take(exclusive=False, wait=cancelled, give_up=hung)
                if path.exists():
                    fault = quick_fault(self.folder, shard, self.manifest.resolution)
                    if fault is None:
                        break
                    if fetched:
                        raise UserError(
                            f"{redacted(file_address(self.address, shard.file))} {fault}, though its sha256 is right: "
                            "the manifest was edited; run the `gan-dist prepare` that made the dataset again"
                        )
                # Who gets the exclusive lock fetches; the others check again soon. Temporary names keep this process
                # apart from one that hangs with the lock.
                alone = lock.take(exclusive=True)
                if not alone and not hung():
                    raise_if_cancelled(cancelled)
                    time.sleep(POLL_S)
                elif not path.exists() or quick_fault(self.folder, shard, self.manifest.resolution):
                    for left in self.folder.glob(f"{shard.file}.*.tmp") if alone else ():
                        left.unlink(missing_ok=True)  # from a killed process: we have the lock
                    self._download(shard.file, shard.sha256, shard.bytes, cancelled)
                    fetched = True
            mine = lock.hand_over() if self.windowed else lock
            if self._locks.setdefault(i, mine) is not mine:
                mine.free()

    def fetch_sidecar(self, i: int) -> None:
        """Returns once the sidecar of shard `i` is in the folder."""
        shard = self.manifest.shards[i]
        with _writing(self.folder), FileLock(self.folder / f"{shard.sidecar}.lock") as lock:
            lock.take(exclusive=True, wait=never_cancelled, give_up=_Standstill(self.folder))
            if not (self.folder / shard.sidecar).exists():
                self._download(shard.sidecar, shard.sidecar_sha256, None, never_cancelled)

    def _download(self, name: str, sha256: str, size: int | None, cancelled: Callable[[], bool]) -> None:
        path = self.folder / name
        temporary = temporary_name(path)

        def receive(chunks: Iterator[bytes]) -> str | None:
            digest, count = hashlib.sha256(), 0
            with temporary.open("wb", buffering=0) as out:
                for data in chunks:
                    count += len(data)
                    if size is not None and count > size:
                        return f"has more bytes than the {size} in its manifest"
                    digest.update(data)
                    written = out.write(data)
                    while written < len(data):  # a full disk takes a part; the next write says why
                        written += out.write(data[written:])
                if size is not None and count < size:
                    return f"has {count} bytes, its manifest says {size}"
                if sha256 and digest.hexdigest() != sha256:
                    return "differs from its sha256 in the manifest"
                os.fsync(out.fileno())
            temporary.replace(path)
            return None

        try:
            fetch(file_address(self.address, name), receive, retry=self._retry, cancelled=cancelled, log=self._log)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def fetch_all(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> None:
        """Returns once every shard is in the folder; one process of the machine fetches them, the others wait.

        `progress` is called with the bytes present and the bytes in all.
        """
        names = {shard.file for shard in self.manifest.shards}

        def poll() -> bool:
            sizes = 0
            with suppress(OSError), os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name in names or entry.name.endswith(".tmp"):
                        with suppress(OSError):
                            sizes += entry.stat().st_size
            progress(min(sizes, self.total), self.total)
            return cancelled()

        with _writing(self.folder), FileLock(self.folder / "staging.lock") as lock:
            lock.take(exclusive=True, wait=poll, give_up=_Standstill(self.folder))
            in_parallel(self.fetch_shard, range(len(self.manifest.shards)), FETCHERS, poll)

    def drop(self, i: int) -> None:
        """Stops using shard `i`; the last user of a windowed cache removes it."""
        lock = self._locks.pop(i, None)
        if lock is not None and self.windowed:
            _evict(self.folder / self.manifest.shards[i].file, lock)

    def tidy(self, keep: Sequence[int]) -> None:
        """Removes the shards of a windowed cache that nobody uses, except `keep`: a killed process left them."""
        for i, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.file
            if self.windowed and i not in self._locks and i not in keep and path.exists():
                _evict(path, FileLock(path.with_name(f"{path.name}.lock")))

    def close(self) -> None:
        """Leaves the folder; the last user of an automatic one removes it."""
        self._leave()


def _evict(path: Path, lock: FileLock) -> None:
    with suppress(OSError):
        if lock.take(exclusive=True):
            path.unlink(missing_ok=True)
    lock.free()


def _leave(folder: Path, lock: FileLock, shard_locks: dict[int, FileLock], automatic: bool) -> None:
    while shard_locks:
        shard_locks.popitem()[1].free()
    if automatic:
        _remove(folder, lock)
    lock.free()


def _remove(folder: Path, lock: FileLock) -> None:
    """Removes a folder and its lock, unless someone uses it."""
    with suppress(OSError):
        if folder.parent.is_dir() and lock.take(exclusive=True):
            shutil.rmtree(folder, ignore_errors=True)
            lock.path.unlink(missing_ok=True)
            folder.parent.rmdir()  # fails, as it should, while it holds other datasets
    lock.free()


def sweep(home: Path, keep: str) -> None:
    """Removes the automatic caches that killed processes left behind: all that nobody uses, except `keep`."""
    for path in home.glob("*.lock"):
        if path.stem != keep:
            _remove(path.with_suffix(""), FileLock(path))


class _Standstill:
    """A function of no arguments that returns whether a folder has not changed in size for STANDSTILL_S."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._size, self._since = folder, -1, time.monotonic()

    def __call__(self) -> bool:
        size, now = folder_size(self._folder), time.monotonic()
        if size != self._size:
            self._size, self._since = size, now
        return now - self._since > STANDSTILL_S


class _writing:
    """A context that turns an OSError into one line that names the cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise GanDistError(
                f"the cache {self._folder} cannot be written ({error.strerror or error}); it has room for "
                f"{room(self._folder) / 2**30:.2f} GiB: free some space, or set data.cache_dir to a larger disk"
            ) from None


def in_parallel(
    work: Callable[[int, Callable[[], bool]], None],
    items: Sequence[int],
    threads: int,
    cancelled: Callable[[], bool] = never_cancelled,
) -> None:
    """Calls `work(item, cancelled)` for all items on some threads, while the caller's thread polls `cancelled`.

    Raises the first error soon after it occurs: threads that hang in the network are left to end by themselves.
    """
    todo, failures = deque(items), list[BaseException]()
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                item = todo.popleft()
            except IndexError:
                return
            try:
                work(item, over.is_set)
            except BaseException as error:  # raised in the thread that waits
                failures.append(error)
                over.set()

    # Daemons: a process that is asked to end must not wait for a server.
    running = [threading.Thread(target=run, name="fetch", daemon=True) for _ in range(min(threads, len(todo)))]
    for thread in running:
        thread.start()
    try:
        while not failures and (alive := [thread for thread in running if thread.is_alive()]):
            alive[0].join(POLL_S)
            raise_if_cancelled(cancelled)
    finally:
        over.set()
        deadline = time.monotonic() + GRACE_S
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    cancelled()
