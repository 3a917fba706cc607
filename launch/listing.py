"""All runs of a home at one look: what each does, how far and how good it is, where, and why it waits or ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gan_dist.runs.naming import runs_home
from gan_dist.runs.record import read_run
from gan_dist.runs.study import JOURNAL, is_sweep, read_sweep, workers_of
from gan_dist.utils.errors import GanDistError, UserError
from launch.status import NO_STEP, Queue, ending_of, look, state_of
from launch.submit import jobs_of, submissions

FIGURES = {
    "images_per_second": "throughput/images_per_second",
    "gpu_utilization": "throughput/gpu_utilization",
    "data_wait": "throughput/data_wait_fraction",
}
"""Columns that a run's newest point has, and their tags."""


@dataclass(frozen=True)
class Row:
    """One run. What is not known is None; the words and figures are those of `launch ls --json`."""

    name: str
    run: str
    state: str
    """running, pending, suspended, ... as SLURM says it; else done, stopped, failed, cancelled, interrupted, empty."""
    job: str | None
    step: int
    total_steps: int
    images_per_second: float | None
    gpu_utilization: float | None
    """Share of time in which rank 0's GPU ran a kernel, 0 to 1, where its driver tells."""
    data_wait: float | None
    """Share of the time in which the device waited for data, 0 to 1."""
    best_swd: float | None
    node: str | None
    reason: str | None
    """Why it waits, or how it ended."""
    updated_s: float | None
    """Seconds since it last wrote a file."""


def list_runs(runs: str | None = None) -> list[Row]:
    """Returns a row for each run and sweep of the home, the latest written last; SLURM is asked once.

    Raises UserError when there is no run.
    """
    home = runs_home(runs)
    folders = [path for path in home.glob("[!.]*") if (path / "config.yaml").is_file() or (path / "launch").is_dir()]
    sweeps = [path for path in home.glob("[!.]*") if is_sweep(path)]
    if not folders and not sweeps:
        raise UserError(f"no run in {home}; say where runs are (--cluster, $GAN_DIST_RUNS)")
    queue = look(folders)
    rows = [make_row(run, queue) for run in folders] + [sweep_row(path) for path in sweeps]
    return sorted(rows, key=lambda row: (-(row.updated_s if row.updated_s is not None else float("inf")), row.name))


def make_row(run: Path, queue: Queue) -> Row:
    """Returns the row of one run."""
    known: dict[str, Any] = dict.fromkeys((*FIGURES, "job", "best_swd", "node", "reason"))
    recorded, step, total, updated, touched = "empty", 0, 0, None, 0.0
    newest: dict[str, Any] = {}
    if (run / "config.yaml").is_file():
        record = read_run(run)
        newest = record.points[-1] if record.points else {}
        recorded, step, total, touched = record.state, record.step, record.total, record.touched
        updated = max(time.time() - touched, 0) if touched else None
        known |= {key: newest.get(tag) for key, tag in FIGURES.items()}
        known["best_swd"] = min((row["swd"] for row in record.evaluations if row.get("swd") is not None), default=None)
        known["node"] = record.environment.get("host") if recorded == "running" else None
        known["reason"] = record.why or None
    made, jobs = submissions(run), jobs_of(run)
    ending = ending_of(run, made)
    state = state_of(recorded, touched, list(zip(made, jobs, strict=True)), queue, ending)
    if made:
        known["job"] = made[-1].job
    if state.job or state.reason:
        known["reason"] = state.reason
    if state.job:
        known["job"], known["node"] = state.job, state.nodes or None
    if state.words == "running" and not newest:
        known["reason"] = NO_STEP
    return Row(name=run.name, run=str(run), state=state.name, step=step, total_steps=total, updated_s=updated, **known)


def sweep_row(folder: Path) -> Row:
    """Returns the row of a sweep: its steps are trials."""
    journal = folder / JOURNAL
    updated = max(time.time() - journal.stat().st_mtime, 0) if journal.exists() else None
    known: dict[str, Any] = dict.fromkeys((*FIGURES, "job", "best_swd", "node"))
    known |= {"name": folder.name, "run": str(folder), "updated_s": updated}
    try:
        sweep = read_sweep(folder)
    except GanDistError as error:
        return Row(**known, state="sweep", step=0, total_steps=0, reason=str(error))
    ended = sum(trial.state != "running" for trial in sweep.trials)
    done = ended == len(sweep.trials) >= sweep.total
    known["best_swd"] = sweep.best.value if sweep.best else None
    state = "running" if workers_of(folder) else "done" if done else "stopped"
    return Row(**known, state=state, step=ended, total_steps=sweep.total, reason=f"sweep: {sweep.account()}")


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Returns the rows as the lines of a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    figures = ("images/s", "gpu", "data wait", "best swd")
    for heading in ("run", "state", "step", *figures, "node", "job", "why"):
        table.add_column(heading, justify="right" if heading in figures else "left")
    for row in rows:
        table.add_row(
            row.name,
            row.state,
            f"{row.step}/{row.total_steps}" if row.total_steps else "",
            _number(row.images_per_second, ",.0f"),
            _number(row.gpu_utilization, ".0%"),
            _number(row.data_wait, ".0%"),
            _number(row.best_swd, ".4g"),
            row.node or "",
            row.job or "",
            row.reason or "",
        )
    # A file or a pipe gets whole lines.
    width = None if sys.stdout.isatty() else 100_000
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
