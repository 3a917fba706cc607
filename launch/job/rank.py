"""One rank of a job: meets the others, trains, and leaves a word in the attempt's directory about how it ended.

    srun ... python -m launch.job.rank train CONFIG [section.key=value ...] --run-dir DIR     (slurm/train.sbatch)
    srun ... python -m launch.job.rank submitit FOLDER                                        (python -m launch submit)

The batch script decides by these words, not by exit statuses, what becomes of the job: `done`, `stopped` (what to do,
why), `failed-RANK` (when, status, kind, rank, host, why; tabs in between). A rank that stopped as asked ends with
status 0, because srun would otherwise kill the others while they still save.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gan_dist.utils.errors import EXIT_FAILED, EXIT_STOPPED, GanDistError, UserError
from gan_dist.utils.files import publish
from gan_dist.utils.stop import StopRequest
from launch.job.addresses import Task, agree_on_master, read_task

ATTEMPT = "GAN_DIST_ATTEMPT"
"""Environment variable: the directory of this start of the job, where ranks leave their words."""
LOG = "GAN_DIST_LOG"
"""Environment variable: what the logs of torchrun's ranks are called, up to the host; srun logs its own tasks apart."""
MEET_S = 300.0
STOP = StopRequest()
"""What the signals of this process ask for. The trainer looks at it after each step."""
HEARD = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def hold_back() -> None:
    """Keeps what `listen` hears pending until that is called, however many handlers others install in between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)


def listen() -> None:
    """Makes SIGUSR2 (time limit, preemption), SIGTERM (cancel, preemption) and SIGINT set STOP and do nothing else.

    Replaces Submitit's handlers, which would requeue the job from within the rank and ignore SIGTERM. The pair CONT and
    TERM of a preemption needs no more than this.
    """

    def on_signal(number: int, frame: object) -> None:
        STOP.ask(signal.Signals(number).name)

    for number in HEARD:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)


def deafen() -> None:
    """Makes this process ignore what it listened for: it has done what it could, and a signal on its way out would
    turn a rank that has saved into one that was killed."""
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class TrainJob:
    """What `srun` starts on every rank: picklable, tiny, and it imports the trainer only when it runs.

    It holds no state of the run: every start continues from the run directory.
    """

    config: str
    overrides: tuple[str, ...]
    run_dir: str
    planned: int | None = None
    """Ranks that were asked of SLURM."""
    max_steps: int | None = None
    from_run: str | None = None

    def __call__(self) -> None:
        """Trains as one rank of the job. Ends the process with the status that srun is to see."""
        listen()
        logging.getLogger("submitit").setLevel(logging.WARNING)  # what it calls a success may be a stop
        status = self.run()
        if status:
            raise SystemExit(status)

    def run(self) -> int:
        """Returns 0 when this rank is done or has stopped as asked, else the status of its failure."""
        attempt = Path(os.environ[ATTEMPT])
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the same bits whoever starts the ranks
        task: Task | None = None
        try:
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                task = read_task(os.environ, self.planned)
                joined, _reserved = agree_on_master(task, attempt, os.environ, MEET_S)
                os.environ.update(joined)
            outcome = self.train()
        except GanDistError as error:
            stopped = error.exit_status == EXIT_STOPPED  # before there was anything to save
            if not error.reported_elsewhere:
                print(f"gan-dist: {error}", file=sys.stderr, flush=True)
                if stopped:
                    reason = STOP.reason or "a signal to another rank"
                    publish(attempt / "stopped", f"requeue {reason}, while data were fetched\n".encode())
                else:
                    kind = "lost" if type(error).__name__ == "RankLost" else "error"
                    leave_word(attempt, task, error.exit_status, kind, str(error))
            return 0 if stopped else error.exit_status
        except Exception as error:
            traceback.print_exc()
            leave_word(attempt, task, EXIT_FAILED, "error", f"{type(error).__name__}: {error}")
            return EXIT_FAILED
        finally:
            deafen()
        if int(os.environ.get("RANK") or 0) == 0:
            self._tell(attempt, outcome)
        return 0

    def train(self) -> Any:
        """Returns the trainer's Outcome."""
        from gan_dist.training.trainer import train

        how = "submit" if "SLURM_JOB_ID" in os.environ else "local"
        return train(
            self.config,
            list(self.overrides),
            run_dir=self.run_dir,
            from_run=self.from_run,
            max_steps=self.max_steps,
            stop=STOP,
            command=["python", "-m", "launch", how, self.config, *self.overrides],
        )

    def _tell(self, attempt: Path, outcome: Any) -> None:
        if outcome.stopped is None:
            publish(attempt / "done", f"{outcome.step}\n".encode())
            print(f"done: step {outcome.step} of {outcome.total_steps}", flush=True)
            return
        # A stop file is a person's wish for the run, not the cluster's for this job.
        what = "end" if str(Path(self.run_dir) / "stop") in outcome.stopped else "requeue"
        publish(attempt / "stopped", f"{what} {outcome.stopped}\n".encode())
        print(f"stopped by {outcome.stopped}: step {outcome.step} of {outcome.total_steps} is saved", flush=True)


def leave_word(attempt: Path, task: Task | None, status: int, kind: str, why: str) -> None:
    """Writes how this rank failed where the batch script and `status` look."""
    rank = task.rank if task else os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    host = task.host if task else os.uname().nodename
    line = "\t".join([f"{time.time():.3f}", str(status), kind, str(rank), host, " ".join(why.split())])
    try:
        publish(attempt / f"failed-{rank}", f"{line}\n".encode())
    except OSError as error:
        print(f"gan-dist: cannot write {attempt}: {error}", file=sys.stderr, flush=True)


def log_apart(prefix: str) -> None:
    """Sends what this rank prints to PREFIX-HOST-RANK.log, as srun does with the tasks that it starts itself."""
    name = f"{prefix}-{os.environ.get('SLURMD_NODENAME') or os.uname().nodename}-{os.environ['RANK']}.log"
    log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


class Words(argparse.ArgumentParser):
    """A parser that raises UserError: what is wrong with the arguments is a word to leave, like all that goes wrong."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; expected the words of `gan-dist train`")


def job_of(words: list[str]) -> TrainJob:
    """Returns the job that the words after `launch.job.rank` describe. Raises UserError for bad ones."""
    parser = Words(prog="python -m launch.job.rank", description="One rank of a SLURM job.")
    parser.add_argument("command", choices=["train"])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--from", dest="from_run")
    told = parser.parse_intermixed_args(words)
    planned = int(os.environ["GAN_DIST_RANKS"]) if os.environ.get("GAN_DIST_RANKS") else None
    return TrainJob(told.config, tuple(told.overrides), told.run_dir, planned, told.max_steps, told.from_run)


def main() -> None:
    """Runs the rank that the arguments describe."""
    if sys.argv[1:2] == ["submitit"]:
        hold_back()  # until TrainJob listens: Submitit's own handler would requeue the job from within the rank
        from submitit.core.submission import process_job

        process_job(sys.argv[2])
        return
    listen()
    if LOG in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        log_apart(os.environ[LOG])
    try:
        job = job_of(sys.argv[1:])
    except UserError as error:
        print(f"gan-dist: {error}", file=sys.stderr, flush=True)
        leave_word(Path(os.environ[ATTEMPT]), None, error.exit_status, "error", str(error))
        sys.exit(error.exit_status)
    sys.exit(job.run())


if __name__ == "__main__":
    main()
