"""Asks runs to save and end, or cancels their jobs: those of a run, and of the trials of a sweep wherever they run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
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
    touch(directory / STOP)  # its workers are to start no more
    runs = _running_trials(directory)
    lines: list[str] = []
    try:
        view = _settled([job for run in runs for job in jobs_of(run)])
    except UserError:
        raise
    except GanDistError as error:  # SLURM is silent; the runs' own files reach them all the same
        for run in (run for run in runs if jobs_of(run) or seems_held(run)):
            touch(run / STOP)
            lines.append(f"{run.name} is asked to save and end" + (f"; its job: {error}" if jobs_of(run) else ""))
        runs = []
    for run in runs:
        try:
            lines += _stop_anywhere(run, view)
        except NoJob:
            continue
        except UserError:
            raise
        except GanDistError as error:
            touch(run / STOP)
            lines.append(f"{run.name} is asked to save and end; its job: {error}")
    working = workers_of(directory)
    if not lines and not working:
        (directory / STOP).unlink(missing_ok=True)
        raise UserError(f"{directory}: no trial and no worker runs; nothing to stop")
    return [*lines, _of_workers(working)]


def cancel(directory: Path) -> Iterator[str]:
    """Yields a line for each job of a run or a sweep that is cancelled.

    Raises UserError where there is none. Where jobs could not be cancelled, it yields why, and raises the first error.
    """
    if not is_sweep(directory):
        yield from cancel_run(directory)
        return
    runs = _running_trials(directory)
    view = slurm.look([job for run in runs for job in jobs_of(run)])
    was_asked = (directory / STOP).exists()
    touch(directory / STOP)  # or its workers would go on to the next trials
    cancelled: list[str] = []
    errors: list[GanDistError] = []
    for run in runs:
        try:
            cancelled += cancel_run(run, view)  # keeps what came before an error
        except NoJob:
            continue
        except GanDistError as error:
            errors.append(error)
    if cancelled:
        yield from cancelled
        yield _of_workers(workers_of(directory))
    elif not was_asked:
        (directory / STOP).unlink(missing_ok=True)
    if errors:
        yield from map(str, errors[1:])
        raise errors[0]
    if not cancelled:
        raise NoJob(
            f"{directory}: no trial has a job in the queue; nothing to cancel; what runs without one is asked to save "
            f"and end by: python -m launch stop {shlex.quote(str(directory))}"
        )


def _running_trials(folder: Path) -> list[Path]:
    return [trial.path for trial in read_sweep(folder).trials if trial.state == "running"]


def _of_workers(working: list[str]) -> str:
    return f"{len(working)} worker(s) asked to end; the same `launch sweep` continues"


def _stop_anywhere(run: Path, view: slurm.View | None = None) -> list[str]:
    """Returns what is done about each job of a run, or about its process where it is none."""
    try:
        return stop_run(run, view)
    except NoJob:
        if not seems_held(run):
            raise
        touch(run / STOP)
        return [f"{run.name} is asked to save and end"]


def cancel_run(run: Path, view: slurm.View | None = None) -> Iterator[str]:
    """Yields a line for each job of a run that is cancelled. Raises UserError when none is here to be cancelled, and
    the first error of those that could not be, after the others.

    `view` is what SLURM shows, of other jobs too; None asks it."""
    jobs = jobs_of(run)
    view = view or slurm.look(jobs)
    if hidden := [job for job in jobs if job in view.hidden and not has_ended(run, job.id)]:
        raise UserError(
            f"{run} has job {hidden[0].id} of {hidden[0].user}, which cannot be seen from here (PrivateData) and is "
            f"not yours to cancel; python -m launch stop {shlex.quote(str(run))} asks it to save and end"
        )
    going = sorted((job for job in jobs if view.of(job)), key=lambda job: job.order)
    if not going:
        raise NoJob(f"{run} has no job in the queue; nothing to cancel")
    errors: list[GanDistError] = []
    for job in going:
        try:
            slurm.cancel(job)
            yield f"job {job.id} is cancelled"
        except GanDistError as error:
            errors.append(error)
    if errors:
        yield from map(str, errors[1:])
        raise errors[0]


def _settled(jobs: Sequence[slurm.Job]) -> slurm.View:
    """Returns what SLURM shows of jobs once none of them is between two starts: soon it is pending again, or gone."""
    deadline = time.monotonic() + 40
    while True:
        view = slurm.look(jobs)
        completing = any(line.state == "COMPLETING" for job in jobs for line in view.of(job))
        if not completing or time.monotonic() > deadline:
            return view
        time.sleep(1)


def stop_run(run: Path, view: slurm.View | None = None) -> list[str]:
    """Returns what is done about each job of a run, a line each. Raises NoJob when it has none in the queue.

    `view` is what SLURM shows, of other jobs too; None asks it."""
    jobs = dict(zip(jobs_of(run), (each.kind for each in submissions(run)), strict=True))
    view = view or _settled(list(jobs))
    hidden = [job for job in jobs if job in view.hidden and not has_ended(run, job.id)]
    if not hidden and not any(view.of(job) for job in jobs):
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
