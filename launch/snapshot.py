"""The code as it is at submission, in one archive, so that later edits do not change a job that waits."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path

from gan_dist.utils.errors import UserError
from gan_dist.utils.files import write_atomically
from gan_dist.utils.system import COMMIT, DESCRIBE, git_command

ARCHIVE = "code.zip"
"""The file of a submission that holds its code, for PYTHONPATH."""
UNPACKED = "code"
"""The directory of a submission that holds its code where an archive would not do (job.unpack)."""
CHECKOUT = Path(str(package_files("launch"))).resolve().parent
_COMMIT = f"gan_dist/{COMMIT}"
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
    text = _git(root, *DESCRIBE) if is_tracked(root) else None
    return text.strip() if text else None


def is_tracked(root: Path) -> bool:
    """Returns whether git is there to say what belongs to the checkout."""
    if (root / ".git").exists() and shutil.which("git") is None:
        _note(f"no git on PATH: .gitignore and the commit of {root} are not known")
        return False
    return (root / ".git").exists()


def code_of(root: Path, outputs: Sequence[Path] = (), unpacked: bool = False) -> list[Path]:
    """Returns the files of a snapshot, relative to `root`: those of files_of, and what links to directories stand for.

    Prints a note on those that an archive would break, unless it is to be `unpacked`. Raises UserError when the files
    are too large to be code only.
    """
    given = files_of(root, outputs)
    files = [inside for name in given for inside in _below(root, name, given)]
    sizes = {name: (root / name).stat().st_size for name in files}
    if sum(sizes.values()) > MAX_MIB * 2**20:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the checkout {root} holds {sum(sizes.values()) / 2**20:,.0f} MiB, {largest} most of all; expected at "
            f"most {MAX_MIB} MiB of code: move data elsewhere or name it in .gitignore"
        )
    if not unpacked and (lost := lost_in_archive(root, files)):
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        _note(
            f"jobs import their code from an archive, in which this will fail: {', '.join(lost[:3])}{more}; read such "
            "files by importlib.resources, install extensions in the environment, or submit with job.unpack=true"
        )
    return files


def lost_in_archive(root: Path, files: Sequence[Path]) -> list[str]:
    """Returns what does not work from an archive: extensions, and modules that look for files beside themselves.

    Tests and documentation are no part of a job.
    """
    lost = []
    for name in files:
        if any(part in ("tests", "docs") or part.startswith(".") for part in name.parts[:-1]):
            continue
        if name.suffix in (".so", ".pyd", ".dylib"):
            lost.append(f"{name} (a compiled extension)")
        elif name.suffix == ".py" and (where := _looks_beside_itself(root / name)):
            lost.append(f"{name} ({where})")
    return lost


def _looks_beside_itself(file: Path) -> str | None:
    """Returns the name by which a module asks where it is: __file__, or a package's __path__; None when it does not."""
    try:
        text = file.read_bytes()
        if b"__file__" not in text and b"__path__" not in text:
            return None
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    except (OSError, SyntaxError, ValueError):
        return None
    return next((name for name in ("__file__", "__path__") if name in names), None)


def take(root: Path, folder: Path, outputs: Sequence[Path] = (), unpacked: bool = False) -> None:
    """Writes the code to `folder`, whole or not at all, and its commit with it. Raises as code_of does.

    It becomes one archive, with the shell files beside it: Python imports from ARCHIVE as from a directory, and bash
    reads what is in slurm/. A submission of hundreds of files would cost a shared file system more than the run itself
    does, and each rank would look for each of them. `unpacked` makes it the directory UNPACKED after all.
    """
    files = code_of(root, outputs, unpacked)
    commit = f"{commit_of(root) or ''}\n"
    if unpacked:
        for name in files:
            (folder / UNPACKED / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / UNPACKED / name)
        write_atomically(folder / UNPACKED / _COMMIT, commit.encode(), make_folder=True)
        return
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name in files:
            archive.write(root / name, name)
        archive.writestr(_COMMIT, commit)
    write_atomically(folder / ARCHIVE, made.getvalue())
    for script in (name for name in files if name.match("slurm/*.sh") and len(name.parts) == 2):
        (folder / "slurm").mkdir(exist_ok=True)
        write_atomically(folder / script, (root / script).read_bytes())


def commit_in(folder: Path) -> str | None:
    """Returns the commit of the snapshot in `folder`, as commit_of did that of its checkout."""
    if (folder / UNPACKED).is_dir():
        return (folder / UNPACKED / _COMMIT).read_text().strip() or None
    with zipfile.ZipFile(folder / ARCHIVE) as archive:
        return archive.read(_COMMIT).decode().strip() or None


def link(taken: Path, folder: Path) -> None:
    """Makes the snapshot in `taken` that in `folder`, too."""
    kept = (taken / ARCHIVE, *(taken / "slurm").rglob("*"), *(taken / UNPACKED).rglob("*"))
    for file in filter(Path.is_file, kept):
        (folder / file.relative_to(taken)).parent.mkdir(parents=True, exist_ok=True)
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
    """Returns what git prints, or None, with a line on stderr, when it fails."""
    command = git_command(root, *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
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
