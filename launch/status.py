"""The state of a run: from its own directory, then the queue, then what SLURM still remembers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gan_dist.runs.naming import run_path, runs_home
from gan_dist.runs.study import OBJECTIVE, RECORD, Sweep, Trial, is_sweep, read_sweep, trial_path, workers_of
from gan_dist.utils.errors import GanDistError, UserError
from launch import slurm
from launch.job.verdict import FINAL
from launch.submit import Submission, jobs_of, submissions

LAUNCH_FAILED = ("FAILED", "NODE_FAIL", "BOOT_FAIL")
"""SLURM's states of a job whose batch script could not start; other jobs with these states have left files."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""SLURM's states of a job that will start, or start again."""
SKEW_S = 60
"""A run's files may be this much younger than the record of its end: they lie on other servers, with other clocks."""
NO_STEP = "no step is logged yet"
ENDING = {"done": "all steps are done; the job makes the report", "stopped": "all is saved; the job ends"}
"""What a job still does when its run has recorded an end."""


@dataclass(frozen=True)
class Attempt:
    """How one start of a job ended, as its batch script recorded it."""

    job: str
    restart: int
    outcome: str
    checkpoint: str
    reason: str
    at: float = float("inf")
    """When the last line of its job was recorded, in seconds since 1970."""


def find_run(run: str, runs: str | None = None) -> Path:
    """Returns the directory of a run, given its path or its name. Raises UserError when there is no run."""
    path = run_path(run, runs)
    if not (path / "launch").is_dir() and not (path / "config.yaml").is_file() and not is_sweep(path):
        raise UserError(f"no run at {path}; expected a run directory, or a name under $GAN_DIST_RUNS (default ./runs)")
    return path


def all_runs(runs: str | None = None) -> list[Path]:
    """Returns all submitted runs and sweeps, the latest submission last. Raises UserError when there is none."""
    home = runs_home(runs)
    folders = [*home.glob("[!.]*/launch"), *(path.parent / "workers" for path in home.glob(f"[!.]*/{RECORD}"))]
    submitted = [path.parent for path in sorted(folders, key=lambda path: path.stat().st_mtime)]  # no .tensorboard
    if not submitted:
        raise UserError(f"no run was submitted in {home}; name one, or say where runs are (--cluster, $GAN_DIST_RUNS)")
    return submitted


def attempts_of(run: Path, submission: Submission) -> list[Attempt]:
    """Returns how each start of a submission's jobs ended, in order, without those that still run."""
    attempts: dict[tuple[str, int], Attempt] = {}  # the last word on a start is the one that holds
    for file in sorted((run / "launch" / submission.id / "attempts").glob("*/history")):
        at = file.stat().st_mtime
        for line in file.read_text(errors="replace").splitlines():
            cells = line.split("\t")
            if len(cells) >= 4 and cells[0].isdigit():
                made = Attempt(file.parent.name, int(cells[0]), cells[1], cells[2], cells[3], at)
                attempts.pop((made.job, made.restart), None)
                attempts[made.job, made.restart] = made
    return list(attempts.values())


def last_word(attempts: Sequence[Attempt]) -> Attempt | None:
    """Returns how a submission ended, or None while it may go on; of an array, a failed element speaks for all."""
    if not attempts or attempts[-1].outcome not in FINAL:
        return None
    return next((attempt for attempt in attempts if attempt.outcome == "failed"), attempts[-1])


def ending_of(run: Path, made: Sequence[Submission]) -> Attempt | None:
    """Returns how the last of a run's submissions ended, or None while it may go on.

    A stage of a pipeline that could not run has the end of the one that it waited for.
    """
    if not made:
        return None
    ending = last_word(attempts_of(run, made[-1]))
    if ending is None and (before := _waited_for(made[-1], made)):
        ending = ending_of(run, before)
        return None if ending and ending.outcome == "done" else ending
    return ending


def _waited_for(each: Submission, made: Sequence[Submission]) -> list[Submission]:
    """Returns the submissions up to the one that a submission waits or waited for; nothing where it is not known."""
    ids = (each.after or "").split(":")
    return next((list(made[: place + 1]) for place, other in enumerate(made) if other.job in ids), [])


@dataclass(frozen=True)
class Queue:
    """What SLURM shows of the jobs of some runs, or why it shows nothing."""

    view: slurm.View
    unknown: str | None = None

    def why_unseen(self, job: slurm.Job) -> str | None:
        """Returns why SLURM says nothing of a job that may be there all the same; None where it would."""
        if job in self.view.hidden:
            return f"cannot be seen: SLURM shows jobs to their owners only (PrivateData); ask {job.user}"
        if job in self.view.elsewhere:
            return f"not known here: a job of cluster {job.cluster}, and this is {slurm.cluster_name()}"
        return self.unknown


def look(runs: Sequence[Path]) -> Queue:
    """Returns what SLURM shows of all jobs of these runs, by one call of squeue."""
    try:
        return Queue(slurm.look([job for run in runs for job in jobs_of(run)]))
    except GanDistError as error:
        return Queue(slurm.View(), f"not known: {error}")


@dataclass(frozen=True)
class State:
    """What a run does now: one answer for `status`, `ls` and `ls --json`."""

    name: str
    """As a listing has it: running, pending, suspended, ... as SLURM says it, else the outcome or what is recorded."""
    words: str
    """The same for a reader: starting; waits to go on (job 7 requeued: Priority)."""
    reason: str | None = None
    """Why it waits or how it ended, as far as SLURM and its jobs tell."""
    job: str | None = None
    """The job in the queue that says so."""
    nodes: str = ""


def state_of(
    recorded: str,
    touched: float,
    jobs: Sequence[tuple[Submission, slurm.Job]] = (),
    queue: Queue | None = None,
    ending: Attempt | None = None,
) -> State:
    """Returns the state of a run: the first row of this table that holds.

    recorded  what SLURM shows of its jobs            state         words
    --------  --------------------------------------  ------------  -----------------------------------------------
    -         prepare or report RUNNING or waiting    SLURM's       as recorded
    empty     RUNNING                                 running       starting
    -         RUNNING, and has written nothing since  running       starting
    done      RUNNING                                 running       done (it makes the report)
    stopped   RUNNING                                 running       stopped (it ends)
    -         RUNNING                                 running       running
    empty     one that waits                          pending       not begun
    -         one that waits                          pending       waits to go on (job 7 requeued: Priority)
    -         another state (SUSPENDED)               suspended     suspended
    -         none; its last job's end is known, and  that outcome  the same
              nothing was written since
    -         nothing that could be known             as recorded   as recorded
    running   none of its jobs                        interrupted   interrupted
    -         none                                    as recorded   as recorded

    `recorded` is the state by the run's own files, which were last written at `touched`, in seconds since 1970;
    `ending` is how the last of `jobs` ended.
    """
    queue = queue or Queue(slurm.View())
    lines = [(made, job, line) for made, job in jobs for line in queue.view.of(job)]
    if lines:
        made, job, line = next((each for each in lines if each[2].state == "RUNNING"), lines[0])
        words, reason = line.state.lower(), line.why or None
        if made.kind != "train":
            words = recorded
        elif line.state == "RUNNING":
            new = line.started_after(touched)
            if new or recorded == "empty" or (new is None and recorded == "stopped"):
                words, reason = "starting", NO_STEP
            elif recorded in ENDING:
                words, reason = recorded, ENDING[recorded]
        elif line.state in WAITING and recorded == "empty":
            words = "not begun"
        elif line.state in WAITING:
            what, cause = "requeued" if job.began else "submitted again", f": {line.why}" if line.why else ""
            words, reason = f"waits to go on (job {line.job} {what}{cause})", f"{what}, waits to go on{cause}"
        return State(line.state.lower(), words, reason, job.id, line.nodes)
    if ending and ending.at >= touched - SKEW_S:
        return State(ending.outcome, ending.outcome, None if ending.outcome == "done" else ending.reason)
    if jobs and (unseen := queue.why_unseen(jobs[-1][1])):
        return State(recorded, recorded, unseen)
    gone = recorded == "running" and bool(jobs) and not ending  # after its end, what writes may be no job
    return State("interrupted", "interrupted") if gone else State(recorded, recorded)


def status_lines(run: Path, queue: Queue | None = None) -> list[str]:
    """Returns the status of a run as lines: its progress, its jobs, their restarts, and why the last start ended.

    Of a sweep: what became of its trials, the best, its workers, and the status of each trial that has not ended.
    """
    if is_sweep(run):
        return list(_sweep_lines(run))
    queue = queue or look([run])
    made, jobs = submissions(run), jobs_of(run)
    pairs = list(zip(made, jobs, strict=True))
    lines = [f"{run.name} at {run}", f"  {_progress(run, pairs, queue)}"]
    for each, job in pairs:
        lines += [f"  {line}" for line in _submission_lines(run, each, job, made, queue)]
    if not made:
        lines.append("  no job of this run was submitted from here")
    return lines


def _sweep_lines(folder: Path) -> Iterator[str]:
    yield f"{folder.name} at {folder}"
    try:
        sweep = read_sweep(folder)
    except GanDistError as error:  # of this sweep alone
        yield f"  {error}"
        return
    yield f"  {sweep.account()}"
    if sweep.best:
        yield f"  best: {_trial_line(sweep.best)}"
    working = workers_of(folder)
    yield f"  {len(working)} worker(s){': ' if working else ''}{', '.join(working)}"
    running = [trial.path for trial in sweep.trials if trial.state == "running"]
    queue = look(running)
    for path in running:
        yield from (f"  {line}" for line in status_lines(path, queue))


def trial_lines(sweep: Sweep) -> list[str]:
    """Returns the account of a sweep: a line for all trials, and one for each, best first."""
    return [sweep.account(), *(f"  {_trial_line(trial)}" for trial in sweep.ranked())]


def _trial_line(trial: Trial) -> str:
    value = f"{OBJECTIVE} {trial.value:.4g}" if trial.value is not None else "-"
    settings = " ".join(f"{key}={_shown(one)}" for key, one in trial.settings.items())
    return f"{trial.name} {trial.state:<8} {value}  {settings}" + (f"  ({trial.reason})" if trial.reason else "")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).replace(" ", "")


def _progress(run: Path, jobs: Sequence[tuple[Submission, slurm.Job]], queue: Queue) -> str:
    """Returns what a run does now, and how far it is."""
    from gan_dist.runs.record import read_run
    from gan_dist.telemetry.console import status_line

    try:
        record = read_run(run)
    except GanDistError:
        return "starting" if state_of("empty", 0, jobs, queue).words == "starting" else "not begun"
    ending = ending_of(run, [made for made, _ in jobs])
    state = state_of(record.state, record.touched, jobs, queue, ending)
    line = status_line(run, state.words).removeprefix(f"{run.name} ")
    updated = f", updated {max(time.time() - record.touched, 0):,.0f} s ago" if record.touched else ""
    return line + updated


def _submission_lines(
    run: Path, each: Submission, job: slurm.Job, made: Sequence[Submission], queue: Queue
) -> Iterator[str]:
    attempts, lines = attempts_of(run, each), queue.view.of(job)
    title = f"job {each.job} ({each.kind}, {each.ranks} {'element' if each.kind == 'prepare' else 'rank'}(s))"
    if len(lines) == 1:
        yield f"{title}: {lines[0]}"
    elif lines:
        states = [line.state for line in lines]
        yield f"{title}: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    elif ending := last_word(attempts):
        yield f"{title}: {ending.outcome}: {ending.reason}"
    else:
        yield f"{title}: {queue.why_unseen(job) or _last_known(run, each, job, made)}"
    restarted = [attempt for attempt in attempts if attempt.outcome in ("requeued", "crashed", "lost")]
    if restarted:
        last = restarted[-1]
        yield f"  {len(restarted)} restart(s); the last one: {last.outcome} at {last.checkpoint}: {last.reason}"


def _last_known(run: Path, each: Submission, job: slurm.Job, made: Sequence[Submission]) -> str:
    """Returns what is known of a job that is not queued and recorded no end."""
    for other in _waited_for(each, made)[-1:]:
        attempts = attempts_of(run, other)
        failed = next((attempt for attempt in attempts if attempt.outcome in ("failed", "cancelled")), None)
        if failed:
            return f"cancelled, because {other.kind} (job {other.job}) {failed.outcome}: {failed.reason}"
    state = slurm.final_state(job)
    if state.startswith("CANCELLED") and each.after:
        return f"CANCELLED, because what it waited for ({each.after}) did not end well"
    if state.startswith(LAUNCH_FAILED) and not _began(run, each):
        return (
            f"{state} before its script began: the first node could not write {run / 'logs'}; put runs on a file "
            "system that all nodes share (job.runs)"
        )
    return f"{state or 'ended'}, without a recorded outcome; see {run / 'logs'}"


def _began(run: Path, each: Submission) -> bool:
    """Returns whether a job's batch script has written anything that this machine can see."""
    logs = (run / "logs").glob("*-batch.log")
    return (run / "launch" / each.id / "attempts").is_dir() or any(
        log.name.startswith((f"{each.job}-", f"{each.job}_")) for log in logs
    )


def rank_logs(run: Path, rank: str) -> list[Path]:
    """Returns the logs of a rank, or of the batch script for `batch`, over all jobs and restarts, oldest first."""
    pattern = "*-batch.log" if rank == "batch" else f"*-*-*-{rank}.log"
    files = [file for file in (run / "logs").glob(pattern) if not (rank != "batch" and file.name.endswith("batch.log"))]
    return sorted(files, key=lambda file: file.stat().st_mtime)


def why_no_log(run: Path, rank: str) -> str:
    """Returns why there is no log of a rank, as a message."""
    if is_sweep(run):
        return f"{run} is a sweep, and its trials have logs; for example: python -m launch logs {trial_path(run, 0)}"
    if submissions(run) or not (run / "config.yaml").is_file():
        return f"no log of rank {rank} in {run / 'logs'} yet"
    return f"{run} was not started as a job: its output went to a terminal; `gan-dist report` shows its history"


def follow(run: Path, rank: str, every_s: float = 0.5, limit_s: float | None = None) -> Iterator[str]:
    """Yields what is appended to the latest log of a rank, through restarts; endless without `limit_s`."""
    offsets: dict[Path, int] = {}
    deadline = time.monotonic() + limit_s if limit_s else None
    while deadline is None or time.monotonic() < deadline:
        latest = rank_logs(run, rank)[-1:]
        for file in latest:
            if file not in offsets:
                yield f"==> {file.name}\n"
            with file.open(errors="replace") as stream:
                stream.seek(offsets.get(file, 0))
                if text := stream.read():
                    yield text
                offsets[file] = stream.tell()
        time.sleep(every_s)
