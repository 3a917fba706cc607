"""Where large files may lie on this machine: kinds of file systems, free room, and memory as the cgroup allows it."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand

MEMORY = {"tmpfs", "ramfs"}
NETWORK = re.compile(r"nfs|lustre|cifs|smb|beegfs|gpfs|ceph|afs|gluster|panfs|orangefs|9p|fuse\.")


def existing(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """Returns the type of the file system that `path` lies or would lie on (ext4, nfs4, tmpfs, ...); "" if unknown."""
    real, best, kind = existing(path).resolve(), -1, ""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            mount = Path(before.split()[4].encode().decode("unicode_escape"))  # a space is \040 there
            if real.is_relative_to(mount) and len(mount.parts) >= best:
                best, kind = len(mount.parts), after.split()[0]
    return kind


def room(path: Path) -> int:
    """Returns the bytes that files under `path` may still take; in a file system of memory at most half of what is
    available, since files there are charged to the job like its own memory."""
    free = shutil.disk_usage(existing(path)).free
    return min(free, available_memory() // 2) if file_system(path) in MEMORY else free


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of memory that this process may still take: the machine's, or less where a cgroup says so.

    Page cache that can go counts as available. Cgroups of both versions are understood, with all their ancestors.
    """
    rooms = [_field(proc / "meminfo", "MemAvailable", 2**62 // 1024) * 1024]
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers == "":
                base, names = cgroups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                base = cgroups / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            own = base / place.lstrip("/")  # not there in a container that sees its own part of the tree as the whole
            rooms += [_headroom(folder, *names) for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return max(0, min(rooms))


def _headroom(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
    except (OSError, ValueError):  # no limit says "max"
        return 2**62
    return most - max(0, used - _field(folder / "memory.stat", reclaimable, 0))


def _field(path: Path, name: str, default: int) -> int:
    with suppress(OSError):
        found = re.search(rf"^{name}:?\s+(\d+)", path.read_text(), re.MULTILINE)
        return int(found[1]) if found else default
    return default


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
        if needed - held(home / name) <= room(home):
            return own_folder(home)
    found = "; ".join(f"{home.parent} has room for {room(home) / 2**30:.1f}" for home in homes)
    raise UserError(
        f"staging needs {needed / 2**30:.1f} GiB on this machine, but {found}; set data.cache_dir to a larger disk, or "
        "data.window_shards to stage a few shards at a time"
    )


def held(folder: Path) -> int:
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
