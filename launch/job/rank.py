"""One rank of a job: finds the others, trains, and writes how it ended to a file in the attempt's directory.

    srun ... python -m launch.job.rank train CONFIG [section.key=value ...] --run-dir DIR     (slurm/train.sbatch)
    srun ... python -m launch.job.rank submitit FOLDER                                        (python -m launch submit)

The batch script decides by these files, not by exit statuses, what becomes of the job: `done`, `stopped` (what to do,
reason), `failed-RANK` (time, status, kind, rank, host, reason; separated by tabs). A rank that stopped as asked ends
with status 0: otherwise srun would kill the others while they still save.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gan_dist.utils.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, GanDistError, UserError, exit_at_once
from gan_dist.utils.files import write_atomically
from gan_dist.utils.stop import StopRequest
from launch.job.addresses import Task, agree_on_master, read_task

ATTEMPT = "GAN_DIST_ATTEMPT"
"""Environment variable: the directory of this start of the job, where ranks write how they ended."""
RUNNING = "running"
"""A file of the attempt: a rank has begun, so that what fails now is no fault of the interpreter or the container."""
REPORTED, REPORT_S = "reported", 1800
"""A file of the attempt: rank 0 has made its report; and how long the others wait for it."""
LOG = "GAN_DIST_LOG"
"""Environment variable: the path of the logs of torchrun's ranks, up to the host. srun logs its own tasks itself."""
MASTER_TIMEOUT_S = 300.0
STOP = StopRequest()
"""The stop that signals to this process ask for; the trainer checks it after each step."""
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def block_signals() -> None:
    """Keeps these signals pending until `handle_signals`, whatever handlers others install in between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def handle_signals() -> None:
    """Makes SIGUSR2 (time limit, preemption), SIGTERM (cancel, preemption) and SIGINT set STOP and do nothing else.

    Replaces Submitit's handlers, which would requeue the job from within the rank and ignore SIGTERM. A preemption that
    sends CONT and then TERM is covered too.
    """

    def on_signal(number: int, frame: object) -> None:
        STOP.ask(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore_signals() -> None:
    """Makes this process ignore these signals on its way out: a rank that has saved must not count as killed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class TrainJob:
    """What `srun` starts on every rank: picklable, tiny, and importing the trainer only when it runs.

    It has no state of its own: every start continues from the run directory.
    """

    config: str
    overrides: tuple[str, ...]
    run_dir: str
    planned: int | None = None
    """Number of ranks that SLURM was asked for."""
    max_steps: int | None = None
    from_run: str | None = None

    def __call__(self) -> None:
        """Trains as one rank of the job. Raises SystemExit with the status for srun when it fails."""
        handle_signals()
        note_begun()
        logging.getLogger("submitit").setLevel(logging.WARNING)  # it reports a stop as a success
        status = self.run()
        if status:
            raise SystemExit(status)

    def run(self) -> int:
        """Returns 0 when this rank is done or has stopped as asked, otherwise the status of its failure."""
        attempt = Path(os.environ[ATTEMPT])
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_ranks(os.environ)))
        task: Task | None = None
        try:
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                task = read_task(os.environ, self.planned)
                variables, _reserved = agree_on_master(task, attempt, os.environ, MASTER_TIMEOUT_S)
                os.environ.update(variables)
            outcome = self.train()
        except GanDistError as error:
            stopped = error.exit_status == EXIT_STOPPED  # before there was anything to save
            if not error.reported_elsewhere:
                print(f"gan-dist: {error}", file=sys.stderr, flush=True)
                if stopped:
                    reason = STOP.reason or "a signal to another rank"
                    write_atomically(attempt / "stopped", f"requeue {reason}, while data were fetched\n".encode())
                else:
                    kind = "lost" if type(error).__name__ in ("RankLost", "DeviceHangs") else "error"
                    write_failure(attempt, task, error.exit_status, kind, str(error))
            exit_at_once(error)
            return 0 if stopped else error.exit_status
        except Exception as error:
            traceback.print_exc()
            # What cannot be imported now cannot be imported in the next start either.
            status = EXIT_USAGE if isinstance(error, ImportError | SyntaxError) else EXIT_FAILED
            write_failure(attempt, task, status, "error", f"{type(error).__name__}: {error}")
            return status
        finally:
            ignore_signals()
        is_first = int(os.environ.get("RANK") or 0) == 0
        if is_first:
            self._write_outcome(attempt, outcome)
        if outcome.stopped is None:
            self.report(attempt) if is_first else await_report(attempt)
        return 0

    def report(self, attempt: Path) -> None:
        """Makes the run's page, however long it takes: the run counts as done, and the group of ranks has ended."""
        from gan_dist.training.trainer import report

        try:
            report(Path(self.run_dir))
        finally:
            (attempt / REPORTED).touch()

    def train(self) -> Any:
        """Returns the trainer's Outcome; the report is left to `report`."""
        from gan_dist.training.trainer import train

        how = "submit" if "SLURM_JOB_ID" in os.environ else "local"
        return train(
            self.config,
            list(self.overrides),
            run_dir=self.run_dir,
            from_run=self.from_run,
            max_steps=self.max_steps,
            stop=STOP,
            report_at_end=False,
            command=["python", "-m", "launch", how, self.config, *self.overrides],
        )

    def _write_outcome(self, attempt: Path, outcome: Any) -> None:
        if outcome.stopped is None:
            write_atomically(attempt / "done", f"{outcome.step}\n".encode())
            print(f"done: step {outcome.step} of {outcome.total_steps}", flush=True)
            return
        # A stop file comes from a person and ends the run; a signal comes from the cluster and ends this start.
        what = "end" if str(Path(self.run_dir) / "stop") in outcome.stopped else "requeue"
        write_atomically(attempt / "stopped", f"{what} {outcome.stopped}\n".encode())
        print(f"stopped by {outcome.stopped}: step {outcome.step} of {outcome.total_steps} is saved", flush=True)


def threads_of_ranks(env: Mapping[str, str], ranks: int = 1) -> int:
    """Returns the threads of each of a task's ranks: its share of slurm.cpus_per_task, or 1, as under torchrun."""
    processors = env.get("SLURM_CPUS_PER_TASK", "")
    return max(1, int(processors) // ranks) if processors.isdigit() else 1


def await_report(attempt: Path) -> None:
    """Waits until rank 0 has made the report: srun would end it a minute after the first rank has left (--wait)."""
    deadline = time.monotonic() + REPORT_S
    while not (attempt / REPORTED).exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def note_begun() -> None:
    """Notes that the first rank, task or agent of this start runs."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        attempt = Path(os.environ[ATTEMPT])
        try:
            (attempt / RUNNING).touch()
        except OSError as error:
            print(f"gan-dist: cannot write {attempt}: {error}", file=sys.stderr, flush=True)


def write_failure(attempt: Path, task: Task | None, status: int, kind: str, reason: str) -> None:
    """Writes to `attempt` how this rank failed; the batch script decides by it."""
    rank = task.rank if task else os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    host = task.host if task else os.uname().nodename
    line = "\t".join([f"{time.time():.3f}", str(status), kind, str(rank), host, " ".join(reason.split())])
    try:
        write_atomically(attempt / f"failed-{rank}", f"{line}\n".encode())
    except OSError as error:
        print(f"gan-dist: cannot write {attempt}: {error}", file=sys.stderr, flush=True)


def redirect_output(prefix: str) -> None:
    """Sends what this rank prints to PREFIX-HOST-RANK.log, as srun does for the tasks that it starts itself."""
    name = f"{prefix}-{os.environ.get('SLURMD_NODENAME') or os.uname().nodename}-{os.environ['RANK']}.log"
    log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError, so that wrong arguments are reported like any other failure."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; expected the arguments of `gan-dist train`")


def parse_job(words: list[str]) -> TrainJob:
    """Returns the job that the arguments of `launch.job.rank` describe. Raises UserError for wrong ones."""
    parser = _Parser(prog="python -m launch.job.rank", description="One rank of a SLURM job.")
    parser.add_argument("command", choices=["train"])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--from", dest="from_run")
    args = parser.parse_intermixed_args(words)
    planned = int(os.environ["GAN_DIST_RANKS"]) if os.environ.get("GAN_DIST_RANKS") else None
    return TrainJob(args.config, tuple(args.overrides), args.run_dir, planned, args.max_steps, args.from_run)


def main() -> None:
    """Runs the rank that the arguments describe."""
    if sys.argv[1:2] == ["submitit"]:
        block_signals()  # until TrainJob handles them: Submitit's own handler would requeue the job from the rank
        from submitit.core.submission import process_job

        process_job(sys.argv[2])
        return
    handle_signals()
    if LOG in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        redirect_output(os.environ[LOG])
    try:
        job = parse_job(sys.argv[1:])
    except UserError as error:
        print(f"gan-dist: {error}", file=sys.stderr, flush=True)
        write_failure(Path(os.environ[ATTEMPT]), None, error.exit_status, "error", str(error))
        sys.exit(error.exit_status)
    note_begun()
    sys.exit(job.run())


if __name__ == "__main__":
    main()
