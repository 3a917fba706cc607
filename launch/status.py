"""What became of a run: its own directory first, then the queue, then whatever SLURM still remembers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gan_dist.runs.naming import run_path, runs_home
from gan_dist.utils.errors import GanDistError, UserError
from launch import slurm
from launch.submit import Submission, submissions

FINAL = ("done", "failed", "stopped", "cancelled")
LAUNCH_FAILED = ("FAILED", "NODE_FAIL", "BOOT_FAIL")
"""What SLURM calls a job whose batch script could not be started; also others, which have left something behind."""


@dataclass(frozen=True)
class Start:
    """What became of one start of a job, as its batch script wrote it down."""

    job: str
    restart: int
    what: str
    checkpoint: str
    why: str


def find_run(run: str, runs: str | None = None) -> Path:
    """Returns the directory of a run that was submitted: a path, or a name where runs lie.

    Raises UserError when nothing was ever submitted there.
    """
    found = run_path(run, runs)
    if not (found / "launch").is_dir() and not (found / "config.yaml").is_file():
        raise UserError(f"no run at {found}; expected a run directory, or a name under $GAN_DIST_RUNS (default ./runs)")
    return found


def all_runs(runs: str | None = None) -> list[Path]:
    """Returns every run that was submitted, the newest submission at the end. Raises UserError when there is none."""
    home = runs_home(runs)
    made = home.glob("[!.]*/launch")  # TensorBoard's is no run
    found = sorted((path.parent for path in made), key=lambda run: (run / "launch").stat().st_mtime)
    if not found:
        raise UserError(f"no run was submitted in {home}; name one, or say where runs lie (--cluster, $GAN_DIST_RUNS)")
    return found


def starts_of(run: Path, submission: Submission) -> list[Start]:
    """Returns what became of each ended start of a submission's jobs, in order."""
    found = []
    for file in sorted((run / "launch" / submission.id / "attempts").glob("*/history")):
        for line in file.read_text(errors="replace").splitlines():
            cells = line.split("\t")
            if len(cells) >= 4 and cells[0].isdigit():
                found.append(Start(file.parent.name, int(cells[0]), *cells[1:4]))
    return found


def status_lines(run: Path) -> list[str]:
    """Returns a run's status for a person: where it stands, its jobs, their restarts, and why the last one ended."""
    made = submissions(run)
    silent = None
    try:
        queued = slurm.queue([each.job for each in made])
    except GanDistError as error:
        queued, silent = [], f"not known: {error}"
    live = silent is not None or any(line.state == "RUNNING" for line in queued)
    lines = [f"{run.name} at {run}", f"  {_progress(run, live)}"]
    for each in made:
        lines += [f"  {line}" for line in _submission_lines(run, each, queued, made, silent)]
    if not made:
        lines.append("  no job of this run was submitted from here")
    return lines


def _progress(run: Path, running: bool) -> str:
    from gan_dist.runs.record import read_run, status_line

    try:
        told = status_line(run).removeprefix(f"{run.name} ")
        age = time.time() - read_run(run).touched
    except GanDistError:
        return "not begun"
    if not running and told.startswith("running "):
        told = re.sub(r" left=\S+", "", told.replace("running", "interrupted", 1))
    return f"{told}, told {max(age, 0):,.0f} s ago"


def _submission_lines(
    run: Path, each: Submission, queued: Sequence[slurm.Queued], made: Sequence[Submission], silent: str | None
) -> Iterator[str]:
    mine = [line for line in queued if line.job.partition("_")[0] == each.job]
    starts = starts_of(run, each)
    title = f"job {each.job} ({each.kind}, {each.ranks} rank(s))"
    if len(mine) == 1:
        yield f"{title}: {mine[0]}"
    elif mine:
        states = [line.state for line in mine]
        yield f"{title}: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    elif starts and starts[-1].what in FINAL:
        worst = next((start for start in starts if start.what == "failed"), starts[-1])
        yield f"{title}: {worst.what}: {worst.why}"
    else:
        yield f"{title}: {silent or _forgotten(run, each, made)}"
    again = [start for start in starts if start.what in ("requeued", "crashed", "lost")]
    if again:
        last = again[-1]
        yield f"  {len(again)} restart(s); the last one: {last.what} at {last.checkpoint}: {last.why}"


def _forgotten(run: Path, each: Submission, made: Sequence[Submission]) -> str:
    """Returns what can be said of a job that is in no queue and left no last word."""
    before = (each.after or "").split(":")
    for other in made:
        if other.job in before:
            failed = next((start for start in starts_of(run, other) if start.what in ("failed", "cancelled")), None)
            if failed:
                return f"cancelled, because {other.kind} (job {other.job}) {failed.what}: {failed.why}"
    state = slurm.final_state(each.job)
    if state.startswith("CANCELLED") and each.after:
        return f"CANCELLED, because what it waited for ({each.after}) did not end well"
    if state.startswith(LAUNCH_FAILED) and not _began(run, each):
        return (
            f"{state} before its script began: the first node could not write {run / 'logs'}; put runs on a file "
            "system that all nodes share (job.runs)"
        )
    return f"{state or 'ended'}, without a last word; see {run / 'logs'}"


def _began(run: Path, each: Submission) -> bool:
    """Returns whether a job's batch script has written anything where this machine sees it."""
    logs = (run / "logs").glob("*-batch.log")
    return (run / "launch" / each.id / "attempts").is_dir() or any(
        re.split("[-_]", log.name)[0] == each.job for log in logs
    )


def logs_of(run: Path, rank: str) -> list[Path]:
    """Returns the logs of one rank (or of the batch script, by `batch`) over all jobs and restarts, oldest first."""
    pattern = "*-batch.log" if rank == "batch" else f"*-*-*-{rank}.log"
    found = [file for file in (run / "logs").glob(pattern) if not (rank != "batch" and file.name.endswith("batch.log"))]
    return sorted(found, key=lambda file: file.stat().st_mtime)


def no_log(run: Path, rank: str) -> str:
    """Returns why there is no log of a rank, for a person."""
    if submissions(run) or not (run / "config.yaml").is_file():
        return f"no log of rank {rank} in {run / 'logs'} yet"
    return f"{run} was not started as a job: what it said went to its terminal; `gan-dist report` tells its history"


def follow(run: Path, rank: str, every_s: float = 0.5, over: float | None = None) -> Iterator[str]:
    """Yields what is appended to the newest log of a rank, going on with the next restart's; without end by itself."""
    at: dict[Path, int] = {}
    deadline = time.monotonic() + over if over else None
    while deadline is None or time.monotonic() < deadline:
        newest = logs_of(run, rank)[-1:]
        for file in newest:
            if file not in at:
                yield f"==> {file.name}\n"
            with file.open(errors="replace") as stream:
                stream.seek(at.get(file, 0))
                if text := stream.read():
                    yield text
                at[file] = stream.tell()
        time.sleep(every_s)
