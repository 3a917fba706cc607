"""A copy of the code as it is at submission, so that edits while a job waits change nothing."""

from __future__ import annotations

import compileall
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gan_dist.utils.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
LARGEST_MIB = 200
LEFT_OUT = {"build", "dist", "runs", "data", "wheelhouse", "gan-dist-demo"}
"""Directories at the top of a checkout that are not copied unless git tracks them: builds, data and runs."""


def files_of(root: Path, outputs: Sequence[Path] = ()) -> list[Path]:
    """Returns the code's files relative to `root`: tracked, changed and new ones that git does not ignore.

    Without git: all but hidden directories, virtual environments and what LEFT_OUT names. Neither takes what is new in
    `outputs` or in any directory that is a run: snapshots would hold the earlier ones. A link to a directory is a file.
    """

    @cache
    def holds_outputs(folder: Path) -> bool:
        return folder != root and (folder in outputs or is_run(folder) or holds_outputs(folder.parent))

    if (root / ".git").exists() and shutil.which("git"):
        tracked = _git(root, "ls-files", "-z", "--cached")
        left_out = [f"--exclude=/{name}/" for name in sorted(LEFT_OUT)]
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", *left_out)
        if tracked is not None and new is not None:
            code = {name for name in new.split("\0") if name and not holds_outputs((root / name).parent)}
            names = sorted(Path(name) for name in code.union(filter(None, tracked.split("\0"))))
            return [name for name in names if _is_copied(root / name)]  # one that was deleted is listed still
    found: list[Path] = []
    for folder, folders, files in root.walk() if hasattr(root, "walk") else _walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and not (folder == root and name in LEFT_OUT)
            and not (folder / name / "pyvenv.cfg").exists()
            and not holds_outputs(folder / name)
        )
        names = sorted([*files, *folders])
        found += [(folder / name).relative_to(root) for name in names if _is_copied(folder / name)]
    return found


def _is_copied(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and path.is_symlink())


def is_run(folder: Path) -> bool:
    """Returns whether a directory is a run's, or has at least been submitted as one."""
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return True
    return any(any(folder.glob(f"launch/*/{name}")) for name in ("job.json", "code"))


def _walk(root: Path) -> list[tuple[Path, list[str], list[str]]]:  # Path.walk is Python 3.12's
    import os

    return ((Path(folder), folders, files) for folder, folders, files in os.walk(root))  # type: ignore[return-value]


def commit_of(root: Path) -> str | None:
    """Returns the commit of the checkout, with `-dirty` where files differ from it; None without git."""
    told = _git(root, "describe", "--always", "--dirty", "--abbrev=12") if (root / ".git").exists() else None
    return told.strip() if told else None


def code_of(root: Path, outputs: Sequence[Path] = ()) -> list[Path]:
    """Returns files_of its arguments. Raises UserError when they are too large to be code: there is data among them."""
    files = files_of(root, outputs)
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > LARGEST_MIB * 2**20:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the checkout {root} holds {sum(sizes.values()) / 2**20:,.0f} MiB that git does not ignore, {largest} "
            f"most of all; expected code of {LARGEST_MIB} MiB at most: move data elsewhere or name it in .gitignore"
        )
    return files


def take(root: Path, target: Path, outputs: Sequence[Path] = ()) -> None:
    """Copies the code to `target` and compiles it there, so that jobs write nothing into it. Raises as code_of does."""
    for name in code_of(root, outputs):
        source, copy = root / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():  # a link that stays within the checkout leads to the copy
            inside = not source.readlink().is_absolute() and source.resolve().is_relative_to(root.resolve())
            copy.symlink_to(source.readlink() if inside else source.resolve())
        else:
            shutil.copy2(source, copy)
    compileall.compile_dir(target, quiet=2)


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
