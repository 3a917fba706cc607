"""A copy of the code at submission, so that later edits do not change a job that waits."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gan_dist.utils.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
MAX_MIB = 200
SKIPPED = {"build", "dist", "runs", "data", "wheelhouse", "gan-dist-demo"}
"""Directories at the top of a checkout that are copied only where git tracks them: builds, data and runs."""


def files_of(root: Path, outputs: Sequence[Path] = ()) -> list[Path]:
    """Returns the code's files relative to `root`: tracked, changed and new ones that git does not ignore.

    Without git: all but hidden directories, virtual environments and those in SKIPPED. New files in `outputs` or in the
    directory of a run are left out, or a snapshot would contain earlier ones. A link to a directory counts as a file.
    """

    @cache
    def holds_outputs(folder: Path) -> bool:
        return folder != root and (folder in outputs or is_run(folder) or holds_outputs(folder.parent))

    if is_tracked(root):
        tracked = _git(root, "ls-files", "-z", "--cached")
        skipped = [f"--exclude=/{name}/" for name in sorted(SKIPPED)]
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", *skipped)
        if tracked is not None and new is not None:
            code = {name for name in new.split("\0") if name and not holds_outputs((root / name).parent)}
            names = sorted(Path(name) for name in code.union(filter(None, tracked.split("\0"))))
            return [name for name in names if _is_copied(root / name)]  # git still lists a deleted file
    paths: list[Path] = []
    for folder, folders, files in root.walk() if hasattr(root, "walk") else _walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and not (folder == root and name in SKIPPED)
            and not (folder / name / "pyvenv.cfg").exists()
            and not holds_outputs(folder / name)
        )
        names = sorted([*files, *folders])
        paths += [(folder / name).relative_to(root) for name in names if _is_copied(folder / name)]
    return paths


def _is_copied(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and path.is_symlink())


def is_run(folder: Path) -> bool:
    """Returns whether a directory holds a run, or was submitted as one."""
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return True
    return any(any(folder.glob(f"launch/*/{name}")) for name in ("job.json", "code"))


def _walk(root: Path) -> list[tuple[Path, list[str], list[str]]]:  # Path.walk is Python 3.12's
    import os

    return ((Path(folder), folders, files) for folder, folders, files in os.walk(root))  # type: ignore[return-value]


def commit_of(root: Path) -> str | None:
    """Returns the commit of the checkout, with `-dirty` when files differ from it; None without git."""
    text = _git(root, "describe", "--always", "--dirty", "--abbrev=12") if is_tracked(root) else None
    return text.strip() if text else None


def is_tracked(root: Path) -> bool:
    """Returns whether git is there to say what belongs to the checkout."""
    if (root / ".git").exists() and shutil.which("git") is None:
        _note(f"no git on PATH: .gitignore and the commit of {root} are not known")
        return False
    return (root / ".git").exists()


def code_of(root: Path, outputs: Sequence[Path] = ()) -> list[Path]:
    """Returns what files_of does. Raises UserError when the files are too large to be code only."""
    files = files_of(root, outputs)
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > MAX_MIB * 2**20:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the checkout {root} holds {sum(sizes.values()) / 2**20:,.0f} MiB, {largest} most of all; expected at "
            f"most {MAX_MIB} MiB of code: move data elsewhere or name it in .gitignore"
        )
    return files


def take(root: Path, target: Path, outputs: Sequence[Path] = ()) -> None:
    """Copies the code to `target` and compiles it there, so that jobs do not write to it. Raises as code_of does."""
    for name in code_of(root, outputs):
        source, copy = root / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():  # a link within the checkout points into the copy
            inside = not source.readlink().is_absolute() and source.resolve().is_relative_to(root.resolve())
            copy.symlink_to(source.readlink() if inside else source.resolve())
        else:
            shutil.copy2(source, copy)
    compileall.compile_dir(target, quiet=2)


def _git(root: Path, *words: str) -> str | None:
    """Returns what git prints, or None, with a line on stderr, when it fails.

    git would refuse a checkout that belongs to another user, lest its configuration runs programs. Whoever submits from
    a checkout runs its code anyway; the two settings that make these commands run a program are switched off still.
    """
    trusted = [f"safe.directory={root}", f"safe.directory={root.resolve()}", "core.fsmonitor=false", "core.pager=cat"]
    options = [word for setting in trusted for word in ("-c", setting)]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *options, *words], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    else:
        if done.returncode == 0:
            return done.stdout
        reason = next(iter(done.stderr.splitlines()), f"status {done.returncode}")
    _note(f"git failed in {root}: {reason}; .gitignore and the commit are not known")
    return None


@cache
def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)
