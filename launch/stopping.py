"""Asks runs to save and end, or cancels their jobs: those of a run, and of the trials of a sweep wherever they run."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from gan_dist.runs.lease import seems_held
from gan_dist.runs.study import is_sweep, read_sweep, workers_of
from gan_dist.utils.errors import GanDistError, UserError
from launch import slurm
from launch.submit import has_ended, jobs_of, submissions

STOP = "stop"
"""The file in a run's directory that asks it to save and end, and in a sweep's that asks its workers to."""


class NoJob(UserError):
    """A run has no job in the queue."""


def stop(directory: Path) -> list[str]:
    """Returns what is done about each job of a run or a sweep, and about what runs here without a job, a line each.

    Raises UserError where nothing of it runs.
    """
    if not is_sweep(directory):
        return _stop_anywhere(directory)
    lines: list[str] = []
    touch(directory / STOP)  # its workers are to start no more
    for trial in read_sweep(directory).trials:
        try:
            lines += _stop_anywhere(trial.path) if trial.state == "running" else []
        except NoJob:
            continue
        except UserError:
            raise
        except GanDistError as error:  # SLURM is silent; the run's own file reaches it all the same
            touch(trial.path / STOP)
            lines.append(f"{trial.name} is asked to save and end; of its job nothing is known: {error}")
    working = workers_of(directory)
    if not lines and not working:
        (directory / STOP).unlink(missing_ok=True)
        raise UserError(f"{directory}: no trial and no worker runs; nothing to stop")
    return [*lines, _of_workers(working)]


def cancel(directory: Path) -> list[str]:
    """Returns a line for each job of a run or a sweep that is cancelled. Raises UserError where there is none."""
    if not is_sweep(directory):
        return cancel_run(directory)
    trials = [trial for trial in read_sweep(directory).trials if trial.state == "running"]
    was_asked = (directory / STOP).exists()
    touch(directory / STOP)  # or its workers would go on to the next trials
    lines: list[str] = []
    errors: list[GanDistError] = []
    for trial in trials:
        try:
            lines += cancel_run(trial.path)
        except NoJob:
            continue
        except GanDistError as error:
            errors.append(error)
    if not lines:
        if not was_asked:
            (directory / STOP).unlink(missing_ok=True)
        if errors:
            raise errors[0]
        raise NoJob(
            f"{directory}: no trial has a job in the queue; nothing to cancel; what runs without one is asked to save "
            f"and end by: python -m launch stop {shlex.quote(str(directory))}"
        )
    return [*lines, *map(str, errors), _of_workers(workers_of(directory))]


def _of_workers(working: list[str]) -> str:
    return f"{len(working)} worker(s) asked to end; the same `launch sweep` continues"


def _stop_anywhere(run: Path) -> list[str]:
    """Returns what is done about each job of a run, or about its process where it is none."""
    try:
        return stop_run(run)
    except NoJob:
        if not seems_held(run):
            raise
        touch(run / STOP)
        return [f"{run.name} is asked to save and end"]


def cancel_run(run: Path) -> list[str]:
    """Returns a line for each job of a run that is cancelled. Raises UserError when none is here to be cancelled."""
    jobs = jobs_of(run)
    view = slurm.look(jobs)
    if hidden := [job for job in view.hidden if not has_ended(run, job.id)]:
        raise UserError(
            f"{run} has job {hidden[0].id} of {hidden[0].user}, which cannot be seen from here (PrivateData) and is "
            f"not yours to cancel; python -m launch stop {shlex.quote(str(run))} asks it to save and end"
        )
    if not view.lines:
        raise NoJob(f"{run} has no job in the queue; nothing to cancel")
    going = sorted((job for job in jobs if view.of(job)), key=lambda job: job.order)
    for job in going:
        slurm.cancel(job)
    return [f"job {job.id} is cancelled" for job in going]


def stop_run(run: Path) -> list[str]:
    """Returns what is done about each job of a run, a line each. Raises NoJob when it has none in the queue."""
    jobs = dict(zip(jobs_of(run), (each.kind for each in submissions(run)), strict=True))
    deadline = time.monotonic() + 40
    while (view := slurm.look(list(jobs))).lines:
        if time.monotonic() > deadline or all(line.state != "COMPLETING" for line in view.lines):
            break
        time.sleep(1)  # between two starts: soon the job is pending again, or gone
    hidden = [job for job in view.hidden if not has_ended(run, job.id)]
    if not view.lines and not hidden:
        raise NoJob(f"{run} has no job in the queue; nothing to stop")
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
