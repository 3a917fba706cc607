"""Where runs lie and what they are called: the same for every command, on every node, at every restart."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand_directory

LONGEST = 200
"""Bytes of a run's name: file systems take 255, and what is made beside a run adds to it."""


def runs_home(runs: str | None = None) -> Path:
    """Returns the directory that holds runs known by name: `runs`, $GAN_DIST_RUNS, or ./runs."""
    return expand_directory(runs or os.environ.get("GAN_DIST_RUNS") or "runs")


def run_path(run: str | Path, runs: str | None = None) -> Path:
    """Returns what a RUN argument means: a path, or a name where runs lie."""
    direct, named = expand_directory(str(run)), runs_home(runs) / str(run)
    here = direct.is_dir() or (direct.is_file() and not named.is_dir())
    return direct if here or os.sep in str(run) else named


def run_and_step(text: str, runs: str | None = None) -> tuple[Path, int | None]:
    """Returns the directory and the step that RUN[@STEP] names; None where it names none. Raises UserError."""
    name, at, step = text.rpartition("@")
    if not at or os.sep in step:  # me@host may stand in a path
        name, step = text, ""
    elif not re.fullmatch(r"[0-9]+", step):
        name = ""
    if not name:
        raise UserError(f"--from: expected RUN or RUN@STEP, found {text!r}")
    return run_path(name, runs), int(step) if step else None


def choose_run_dir(source: object, name: str | None, run_dir: str | Path | None, runs: str | None = None) -> Path:
    """Returns the directory of the run that is made or continued; its name is the config file's stem unless given.

    Raises UserError for a name that is no name of a directory.
    """
    if name is not None and run_dir:
        raise UserError("--name and --run-dir both say where the run lies; give one of them")
    if run_dir:
        return expand_directory(str(run_dir))
    if name is None:
        if not isinstance(source, str | Path):
            raise UserError("a configuration that is not a file gives the run no name; pass name= or run_dir=")
        return runs_home(runs) / Path(str(source)).stem
    if not re.fullmatch(r"[^\s/.-]([^/\x00-\x1f]*[^\s/])?", name) or len(os.fsencode(name)) > LONGEST:
        raise UserError(f"--name: expected a plain name such as monet-2, found {name!r}; --run-dir takes a path")
    return runs_home(runs) / name
