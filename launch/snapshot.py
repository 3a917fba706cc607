"""A copy of the code as it is at submission, so that edits while a job waits change nothing."""

from __future__ import annotations

import compileall
import shutil
import subprocess
from pathlib import Path

from gan_dist.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
LARGEST_MIB = 200
LEFT_OUT = {"build", "dist", "runs", "data", "wheelhouse", "gan-dist-demo"}
"""Directories at the top of a checkout that are not copied unless git tracks them: builds, data and runs."""


def files_of(root: Path) -> list[Path]:
    """Returns the code's files relative to `root`: tracked, changed and new ones that git does not ignore.

    Without git: all but hidden directories, virtual environments and what LEFT_OUT names.
    """
    if (root / ".git").exists() and shutil.which("git"):
        tracked = _git(root, "ls-files", "-z", "--cached")
        left_out = [f"--exclude=/{name}/" for name in sorted(LEFT_OUT)]
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", *left_out)
        if tracked is not None and new is not None:
            names = sorted({Path(name) for name in (tracked + new).split("\0") if name})
            return [name for name in names if (root / name).is_file()]  # one that was deleted is listed still
    found: list[Path] = []
    for folder, folders, files in root.walk() if hasattr(root, "walk") else _walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and not (folder == root and name in LEFT_OUT)
            and not (folder / name / "pyvenv.cfg").exists()
        )
        found += [(folder / name).relative_to(root) for name in sorted(files) if (folder / name).is_file()]
    return found


def _walk(root: Path) -> list[tuple[Path, list[str], list[str]]]:  # Path.walk is Python 3.12's
    import os

    return ((Path(folder), folders, files) for folder, folders, files in os.walk(root))  # type: ignore[return-value]


def commit_of(root: Path) -> str | None:
    """Returns the commit of the checkout, with `-dirty` where files differ from it; None without git."""
    told = _git(root, "describe", "--always", "--dirty", "--abbrev=12") if (root / ".git").exists() else None
    return told.strip() if told else None


def code_of(root: Path) -> list[Path]:
    """Returns files_of(root). Raises UserError when they are too large to be code: then there is data among them."""
    files = files_of(root)
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > LARGEST_MIB * 2**20:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the checkout {root} holds {sum(sizes.values()) / 2**20:,.0f} MiB that git does not ignore, {largest} "
            f"most of all; expected code of {LARGEST_MIB} MiB at most: move data elsewhere or name it in .gitignore"
        )
    return files


def take(root: Path, target: Path) -> None:
    """Copies the code to `target` and compiles it there, so that jobs write nothing into it. Raises as code_of does."""
    for name in code_of(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    compileall.compile_dir(target, quiet=2)


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
