"""The code as it is at submission, in one archive, so that later edits do not change a job that waits."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from gan_dist.utils.errors import UserError
from gan_dist.utils.files import write_atomically

ARCHIVE = "code.zip"
"""The file of a submission that holds its code, for PYTHONPATH; earlier versions copied all files to `code`."""
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
    return any(any(folder.glob(f"launch/*/{name}")) for name in ("job.json", ARCHIVE, "code"))


def _walk(root: Path) -> list[tuple[Path, list[str], list[str]]]:  # Path.walk is Python 3.12's
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


def take(root: Path, folder: Path, outputs: Sequence[Path] = ()) -> None:
    """Writes the code to `folder`, whole or not at all: as one archive, and its shell files. Raises as code_of does.

    Python imports from ARCHIVE as from a directory, and bash reads what is in slurm/. A submission of hundreds of files
    would cost a shared file system more than the run itself does, and each rank would look for each of them.
    """
    files, made = code_of(root, outputs), io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name in files:
            for inside in _below(root, name, files):
                archive.write(root / inside, inside)
    write_atomically(folder / ARCHIVE, made.getvalue())
    for script in (name for name in files if name.match("slurm/*.sh") and len(name.parts) == 2):
        (folder / "slurm").mkdir(exist_ok=True)
        write_atomically(folder / script, (root / script).read_bytes())


def link(taken: Path, folder: Path) -> None:
    """Makes the snapshot in `taken` that in `folder`, too."""
    for file in (taken / ARCHIVE, *(taken / "slurm").glob("*")):
        (folder / file.relative_to(taken)).parent.mkdir(exist_ok=True)
        os.link(file, folder / file.relative_to(taken))


def _below(root: Path, name: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Yields the files that an entry of the checkout stands for: itself, or those of the directory that it links to.

    Of a directory elsewhere these are its modules, if it is one of modules: not of one with data.
    """
    target = (root / name).resolve()
    if not (root / name).is_dir():
        yield name
    elif target.is_relative_to(root.resolve()):
        at = target.relative_to(root.resolve())
        yield from (name / each.relative_to(at) for each in files if each.is_relative_to(at) and each != name)
    elif any(target.glob("*.py")):
        yield from (name / each.relative_to(target) for each in sorted(target.rglob("*.py")))


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
