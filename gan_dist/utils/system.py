"""What this machine offers: file systems and their free room, memory, CPUs; and which version of the code runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import cast

MEMORY = {"tmpfs", "ramfs"}
COMMIT = "COMMIT"
"""The file beside this package's modules that names the commit of a copy, as DESCRIBE does that of a checkout."""
DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=12")
NETWORK = re.compile(r"nfs|lustre|cifs|smb|beegfs|gpfs|ceph|afs|gluster|panfs|orangefs|9p|fuse\.")


def existing(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """Returns the type of the file system of `path`, which need not exist (ext4, nfs4, tmpfs, ...); "" if unknown."""
    real, best, kind = existing(path).resolve(), -1, ""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            mount = Path(before.split()[4].encode().decode("unicode_escape"))  # a space is \040 there
            if real.is_relative_to(mount) and len(mount.parts) >= best:
                best, kind = len(mount.parts), after.split()[0]
    return kind


def room(path: Path) -> int:
    """Returns the bytes that files under `path` may still take; on a tmpfs at most half of the available memory, since
    its files are charged to the job like its own memory."""
    free = shutil.disk_usage(existing(path)).free
    return min(free, available_memory() // 2) if file_system(path) in MEMORY else free


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of memory that this process may still take: the machine's, or less where a cgroup limits it.

    Reclaimable page cache counts as available. Cgroups of both versions are read, with all their ancestors.
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
            own = base / place.lstrip("/")  # missing in a container that sees its subtree as the root
            rooms += [_headroom(folder, *names) for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return max(0, min(rooms))


def _headroom(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
    except (OSError, ValueError):  # "max": no limit
        return 2**62
    return most - max(0, used - _field(folder / "memory.stat", reclaimable, 0))


def _field(path: Path, name: str, default: int) -> int:
    with suppress(OSError):
        match = re.search(rf"^{name}:?\s+(\d+)", path.read_text(), re.MULTILINE)
        return int(match[1]) if match else default
    return default


def default_workers() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_files() -> Path:
    """Returns the folder of this package: a path, or what reads like one in an archive, from which jobs may run."""
    return cast(Path, files("gan_dist"))


def code_version() -> str | None:
    """Returns the commit that gan_dist runs from, with `-dirty` where files differ from it; None outside a checkout.

    Of code that was copied from a checkout, COMMIT tells.
    """
    recorded = own_files() / COMMIT
    if recorded.is_file():
        return recorded.read_text().strip() or None
    root = Path(str(own_files())).parent
    if not (root / ".git").exists():
        return None
    words = git_command(root, *DESCRIBE)
    try:
        described = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def git_command(root: Path, *words: str) -> list[str]:
    """Returns the words that run git in the checkout `root`, whoever owns it.

    git would refuse a checkout that belongs to another user, lest its configuration runs programs. Whoever asks runs
    its code anyway; the two settings that make commands such as DESCRIBE run a program are switched off still.
    """
    settings = [f"safe.directory={root}", f"safe.directory={root.resolve()}", "core.fsmonitor=false", "core.pager=cat"]
    return ["git", "-C", str(root), *(word for setting in settings for word in ("-c", setting)), *words]
