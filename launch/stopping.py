"""Asks runs to save and end: those that are jobs, and the trials of a sweep wherever they run."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from gan_dist.runs.lease import seems_held
from gan_dist.runs.study import read_sweep
from gan_dist.utils.errors import GanDistError, UserError
from launch import slurm
from launch.submit import has_ended, jobs_of, submissions

STOP = "stop"
"""The file in a run's directory that asks it to save and end, and in a sweep's that asks its workers to."""


def stop_sweep(sweep: Path) -> list[str]:
    """Returns what is done about each trial, a line each, after asking the workers to start no more.

    Raises UserError where nothing of the sweep runs.
    """
    lines: list[str] = []
    touch(sweep / STOP)
    for trial in read_sweep(sweep).trials:
        if trial.state != "running":
            continue
        try:
            lines += stop_run(trial.path)
        except UserError:
            if seems_held(trial.path):
                touch(trial.path / STOP)
                lines.append(f"{trial.name} is asked to save and end")
        except GanDistError as error:  # SLURM is silent; the run's own file reaches it all the same
            touch(trial.path / STOP)
            lines.append(f"{trial.name} is asked to save and end; of its job nothing is known: {error}")
    working = [folder for folder in (sweep / "workers").glob("*") if seems_held(folder)]
    if not lines and not working:
        (sweep / STOP).unlink(missing_ok=True)
        raise UserError(f"{sweep}: no trial and no worker runs; nothing to stop")
    return [*lines, f"{len(working)} worker(s) asked to end; the same `launch sweep` continues"]


def stop_run(run: Path) -> list[str]:
    """Returns what is done about each job of a run, a line each. Raises UserError when it has none in the queue."""
    jobs = dict(zip(jobs_of(run), (each.kind for each in submissions(run)), strict=True))
    deadline = time.monotonic() + 40
    while (view := slurm.look(list(jobs))).lines:
        if time.monotonic() > deadline or all(line.state != "COMPLETING" for line in view.lines):
            break
        time.sleep(1)  # between two starts: soon the job is pending again, or gone
    hidden = [job for job in view.hidden if not has_ended(run, job.id)]
    if not view.lines and not hidden:
        raise UserError(f"{run} has no job in the queue; nothing to stop")
    status = f"see: python -m launch status {shlex.quote(str(run))}"
    lines = []
    for job, kind in sorted(jobs.items(), key=lambda each: each[0].order, reverse=True):  # dependent jobs first
        states = {line.state for line in view.of(job)}
        if job in hidden:
            owner = f"job {job.id} ({kind}) of {job.user} cannot be seen from here (PrivateData)"
            if kind == "train":
                touch(run / STOP)
                lines.append(f"{owner}; if it runs, it saves and ends now: {status}")
            else:
                lines.append(f"{owner}; ask {job.user} to stop it")
        elif not states:
            continue
        elif kind != "train":  # only training reads the stop file
            slurm.cancel(job)
            lines.append(f"job {job.id} ({kind}) is cancelled; finished work is kept")
        elif states == {"PENDING"}:
            slurm.cancel(job, "--state=PENDING")
            lines.append(f"job {job.id} was pending and is cancelled; the last checkpoint is kept")
        else:
            touch(run / STOP)
            when = ", once it is resumed" if "SUSPENDED" in states else ""
            lines.append(f"job {job.id} is asked to save and end{when}; {status}")
    return lines


def touch(file: Path) -> None:
    """Makes a stop file. Raises UserError where it cannot be made."""
    try:
        file.touch()
    except OSError as error:
        raise UserError(f"cannot ask the run to stop: {file}: {error.strerror}; ask its owner") from None
