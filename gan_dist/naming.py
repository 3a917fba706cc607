"""Where runs lie and what they are called: the same for every command, on every node, at every restart."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gan_dist.errors import UserError
from gan_dist.settings import expand_path


def runs_home(runs: str | None = None) -> Path:
    """Returns the directory that holds runs known by name: `runs`, $GAN_DIST_RUNS, or ./runs."""
    return Path(expand_path(runs or os.environ.get("GAN_DIST_RUNS") or "runs"))


def run_path(run: str | Path, runs: str | None = None) -> Path:
    """Returns what a RUN argument means: a path, or a name where runs lie."""
    direct, named = Path(expand_path(str(run))), runs_home(runs) / str(run)
    here = direct.is_dir() or (direct.is_file() and not named.is_dir())
    return direct if here or os.sep in str(run) else named


def choose_run_dir(source: object, name: str | None, run_dir: str | Path | None, runs: str | None = None) -> Path:
    """Returns the directory of the run that is made or continued; its name is the config file's stem unless given.

    Raises UserError for a name that is no name of a directory.
    """
    if name is not None and run_dir:
        raise UserError("--name and --run-dir both say where the run lies; give one of them")
    if run_dir:
        return Path(expand_path(str(run_dir)))
    if name is None and not isinstance(source, str | Path):
        raise UserError("a configuration that is not a file gives the run no name; pass name= or run_dir=")
    if name is not None and not re.fullmatch(r"[^\s/.-]([^/\x00-\x1f]*[^\s/])?", name):
        raise UserError(f"--name: expected a plain name such as monet-2, found {name!r}; --run-dir takes a path")
    return runs_home(runs) / (Path(str(source)).stem if name is None else name)
