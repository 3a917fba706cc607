"""Staging: the shards of a remote or slow dataset, brought to this machine once, whoever on it asks.

A dataset's folder is named after its manifest's hash, so everybody who wants the same data meets in the same place,
and what is in there under its own name is whole and was right: it is hashed on the way in and renamed when complete.
Locks are flock(2) on small files: the kernel frees them when a process dies, however it dies.

    HOME = <cache_dir>/gan_dist-<uid>, or gan_dist-<uid>.auto where nobody chose a place
    HOME/<hash>.lock           shared by every user of the folder; exclusive to remove it
    HOME/<hash>/staging.lock   held by the one who fetches the whole set
    HOME/<hash>/shard-00000.tar.lock   exclusive to fetch or evict a shard, shared to use it in a window
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

from gan_dist.data.remote.fetch import Patience, fetch, member, shown
from gan_dist.data.shards import MANIFEST, Manifest, quick_fault
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import expand, fsync_folder, temporary_name, write_atomically
from gan_dist.utils.locks import POLL_S, FileLock
from gan_dist.utils.stop import never_cancelled, raise_if_cancelled
from gan_dist.utils.system import NETWORK, file_system, room

FETCHERS = 4
"""Shards fetched at once: object stores give one connection a fraction of what they have."""
GRACE_S = 2.0
"""Seconds that threads get to take their half-written files away once the work is over."""
STANDSTILL_S = 300.0
"""Seconds in which nothing grew after which whoever has the lock is taken for hung, and not waited for any more."""


def choose_home(cache_dir: str | Path | None, name: str, needed: int) -> Path:
    """Returns the private folder that holds, or will hold, the folder `name` of `needed` bytes; it is made if need be.

    Without a `cache_dir`: node-local scratch ($TMPDIR, or /tmp), then /dev/shm, then ~/.cache, the first with room.
    A place where the folder is already comes first, so that all processes of a machine meet.
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
            return own_folder(home)
    found = "; ".join(f"{home.parent} has room for {room(home) / 2**30:.1f}" for home in homes)
    raise UserError(
        f"staging needs {needed / 2**30:.1f} GiB on this machine, but {found}; set data.cache_dir to a larger disk, or "
        "data.window_shards to stage a few shards at a time"
    )


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in `folder`, 0 where there is none."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def own_folder(path: Path) -> Path:
    """Returns `path`, made as a folder that nobody else can enter. Raises UserError when it is somebody else's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()  # lstat: a link that another user laid here would lead anywhere
        if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or path.is_symlink() or not path.is_dir()):
            raise UserError(
                f"the cache {path} belongs to user {found.st_uid} or is no folder: what is in there cannot be trusted; "
                "set data.cache_dir to a place of your own"
            )
        path.chmod(0o700)
    except OSError as error:
        raise UserError(f"the cache {path} cannot be made ({error.strerror}): set data.cache_dir") from None
    return path


class Cache:
    """The folder of one dataset on this machine, used by any number of processes at once."""

    def __init__(
        self,
        address: str,
        manifest: Manifest,
        folder: Path,
        windowed: bool,
        automatic: bool,
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.address, self.manifest, self.folder, self.windowed = address, manifest, folder, windowed
        self._patience, self._say = patience, say
        self._lock = FileLock(folder.parent / f"{folder.name}.lock")
        self._held: dict[int, FileLock] = {}
        # At the end of the process too: an automatic cache must not stay because somebody forgot to close.
        self._leave = weakref.finalize(self, _leave, folder, self._lock, self._held, automatic)

    def enter(self, manifest: bytes, cancelled: Callable[[], bool] = never_cancelled) -> None:
        """Becomes a user of the folder, and makes it where it is not there."""
        with _writing(self.folder):
            while True:
                own_folder(self.folder.parent)
                with suppress(FileNotFoundError):  # whoever left last has just removed it: once more
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

    def hold(self, i: int, cancelled: Callable[[], bool] = never_cancelled) -> None:
        """Makes shard `i` lie in the folder, whole and right, until it is dropped: fetched by whoever comes first."""
        if i in self._held:
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
                            f"{shown(member(self.address, shard.file))} {fault}, though its sha256 is the manifest's: "
                            "the manifest there was edited; run the `gan-dist prepare` that made it again"
                        )
                # Whoever gets the lock for itself fetches; the others look again soon. Names of temporary files keep
                # this one apart from one that hangs with the lock.
                alone = lock.take(exclusive=True)
                if not alone and not hung():
                    raise_if_cancelled(cancelled)
                    time.sleep(POLL_S)
                elif not path.exists() or quick_fault(self.folder, shard, self.manifest.resolution):
                    for left in self.folder.glob(f"{shard.file}.*.tmp") if alone else ():
                        left.unlink(missing_ok=True)  # by a process that was killed: we have the lock
                    self._download(shard.file, shard.sha256, shard.bytes, cancelled)
                    fetched = True
            mine = lock.hand_over() if self.windowed else lock
            if self._held.setdefault(i, mine) is not mine:
                mine.free()

    def fetch_sidecar(self, i: int) -> None:
        """Makes the sidecar of shard `i` lie in the folder."""
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
                        return f"has more than the {size} bytes that its manifest says"
                    digest.update(data)
                    written = out.write(data)
                    while written < len(data):  # a disk that fills up takes a part; the next write says why
                        written += out.write(data[written:])
                if size is not None and count < size:
                    return f"has {count} bytes, its manifest says {size}"
                if sha256 and digest.hexdigest() != sha256:
                    return "differs from its sha256 in the manifest"
                os.fsync(out.fileno())
            temporary.replace(path)
            return None

        try:
            fetch(member(self.address, name), receive, patience=self._patience, cancelled=cancelled, say=self._say)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def fetch_all(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> None:
        """Returns when every shard lies in the folder; one process of the machine fetches, the others wait for it.

        `progress` is called with the bytes that are there and the bytes in all.
        """
        names = {shard.file for shard in self.manifest.shards}

        def tell() -> bool:
            sizes = 0
            with suppress(OSError), os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name in names or entry.name.endswith(".tmp"):
                        with suppress(OSError):
                            sizes += entry.stat().st_size
            progress(min(sizes, self.total), self.total)
            return cancelled()

        with _writing(self.folder), FileLock(self.folder / "staging.lock") as lock:
            lock.take(exclusive=True, wait=tell, give_up=_Standstill(self.folder))
            in_parallel(self.hold, range(len(self.manifest.shards)), FETCHERS, tell)

    def drop(self, i: int) -> None:
        """Stops using shard `i`; in a windowed cache its last user removes it."""
        lock = self._held.pop(i, None)
        if lock is not None and self.windowed:
            _evict(self.folder / self.manifest.shards[i].file, lock)

    def tidy(self, keep: Sequence[int]) -> None:
        """Removes what a windowed cache holds and nobody uses, but `keep`: left by a process that was killed."""
        for i, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.file
            if self.windowed and i not in self._held and i not in keep and path.exists():
                _evict(path, FileLock(path.with_name(f"{path.name}.lock")))

    def close(self) -> None:
        """Leaves the folder; the last user of an automatic one removes it."""
        self._leave()


def _evict(path: Path, lock: FileLock) -> None:
    with suppress(OSError):
        if lock.take(exclusive=True):
            path.unlink(missing_ok=True)
    lock.free()


def _leave(folder: Path, lock: FileLock, held: dict[int, FileLock], automatic: bool) -> None:
    while held:
        held.popitem()[1].free()
    if automatic:
        _remove(folder, lock)
    lock.free()


def _remove(folder: Path, lock: FileLock) -> None:
    """Removes a folder that nobody uses, and its lock; does nothing where somebody does."""
    with suppress(OSError):
        if folder.parent.is_dir() and lock.take(exclusive=True):
            shutil.rmtree(folder, ignore_errors=True)
            lock.path.unlink(missing_ok=True)
            folder.parent.rmdir()  # fails, as it should, while other datasets are in there
    lock.free()


def sweep(home: Path, keep: str) -> None:
    """Removes automatic caches of processes that were killed before they could: all that nobody uses, but `keep`."""
    for path in home.glob("*.lock"):
        if path.stem != keep:
            _remove(path.with_suffix(""), FileLock(path))


class _Standstill:
    """Tells whether nothing in a folder has grown for long."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._size, self._since = folder, -1, time.monotonic()

    def __call__(self) -> bool:
        size, now = folder_size(self._folder), time.monotonic()
        if size != self._size:
            self._size, self._since = size, now
        return now - self._since > STANDSTILL_S


class _writing:
    """Turns an OSError within into one line that names the cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise GanDistError(
                f"the cache {self._folder} cannot be written ({error.strerror or error}); it has room for "
                f"{room(self._folder) / 2**30:.2f} GiB: make room, or set data.cache_dir to a larger disk"
            ) from None


def in_parallel(
    work: Callable[[int, Callable[[], bool]], None],
    items: Sequence[int],
    threads: int,
    cancelled: Callable[[], bool] = never_cancelled,
) -> None:
    """Calls `work(item, cancelled)` for all items on some threads; the caller polls `cancelled` meanwhile.

    Raises the first error soon after it comes: threads that hang in the network are left to end by themselves.
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
            except BaseException as error:  # handed over to the thread that waits
                failures.append(error)
                over.set()

    # Daemons: a process that is told to end must not wait for a server to answer.
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
