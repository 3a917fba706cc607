"""Calls of SLURM's own commands, and what their answers mean. None of them needs accounting."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from gan_dist.utils.errors import GanDistError, UserError
from launch.job.environment import of_other_jobs

SBATCH_S = 120
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESERVED = {"ARRAY_INX", "ERROR", "EXPORT", "GET_USER_ENV", "WAIT"}
"""SBATCH_ variables that are never passed on: saving, requeueing and status would break."""
VARIABLE_NAMES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "switches": "REQ_SWITCH"}
"""Options of sbatch whose SBATCH_ variable has another name."""
ALTERNATIVES = (
    {"MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"},
    {"GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"},
    {"CPUS_PER_TASK", "CPUS_PER_GPU"},
    {"REQUEUE", "NO_REQUEUE"},
)
"""Options that exclude each other, or mean the same."""


@dataclass(frozen=True)
class Queued:
    """One line of squeue."""

    job: str
    state: str
    time_left: str
    nodes: str
    reason: str
    starts: str

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else ""
        known = self.reason.startswith("(") and self.reason != "(None)"
        reason = f" ({self.reason.strip('()')})" if known else ""
        left = f", {self.time_left} left" if self.state == "RUNNING" else ""
        starts = f", starts {self.starts}" if self.state == "PENDING" and self.starts not in ("", "N/A") else ""
        return f"{self.state}{where}{reason}{left}{starts}"


def require(*programs: str) -> None:
    """Raises UserError unless SLURM's commands are on PATH."""
    for program in programs:
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on PATH: this machine cannot submit to SLURM; log in to the cluster's login node, "
                "or train here with `python -m launch local`"
            )


def run(*words: str, limit_s: float = 60) -> str:
    """Returns what a command printed. Raises GanDistError with its error message when it fails."""
    require(words[0])
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise GanDistError(f"{words[0]} did not answer within {limit_s:g} s; is the SLURM controller up?") from None
    if done.returncode:
        raise GanDistError(f"{words[0]} failed: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


def submit(script: str, record: Callable[[str], object] = str) -> str:
    """Returns the id of the job that sbatch made of `script`, after `record(id)` has written it down.

    When `record` fails, or Ctrl-C was pressed meanwhile, the job is cancelled: nobody would know of it. Raises
    UserError with sbatch's own message when it refuses, and GanDistError when it does not answer.
    """
    require("sbatch")
    job = ""
    try:
        with _delayed_interrupts():
            job = _sbatch(script)
            record(job)
    except BaseException:
        if job:
            with suppress(GanDistError):
                run("scancel", job)
        raise
    return job


def _sbatch(script: str) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            capture_output=True,
            text=True,
            timeout=SBATCH_S,
            check=False,
            env=submission_environment(os.environ, script),
            start_new_session=True,  # Ctrl-C at the terminal must not reach sbatch
        )
    except subprocess.TimeoutExpired:
        raise GanDistError(
            f"sbatch did not answer within {SBATCH_S} s; is the SLURM controller up? If `squeue --me` shows the job "
            "later, cancel it: its files are gone"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"sbatch refused the job: {'; '.join(lines)}")
    return done.stdout.strip().split(";")[0]


@contextmanager
def _delayed_interrupts() -> Iterator[None]:
    """Delays Ctrl-C and the end of a session to the end of the block: the answer of sbatch is always read."""
    received: list[signal.Signals] = []

    def wait(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        print("waiting for sbatch to answer", file=sys.stderr, flush=True)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, wait) for number in INTERRUPTS if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if received and (before[received[0]] or signal.SIG_DFL) == signal.SIG_DFL:
            raise SystemExit(128 + received[0])  # the default would end this process before anything is undone
        if received:
            signal.raise_signal(received[0])


def submission_environment(env: Mapping[str, str], script: str) -> dict[str, str]:
    """Returns the part of `env` for sbatch, which passes it on to the job: nothing of another job or world.

    A user's defaults (SBATCH_ACCOUNT) are kept only for options that `script` does not set, because sbatch would let
    them override it.
    """
    named = {
        VARIABLE_NAMES.get(key, key.upper().replace("-", "_")) for key in re.findall(r"(?m)^#SBATCH --([\w-]+)", script)
    }
    hidden = named.union(RESERVED, *(group for group in ALTERNATIVES if named & group))
    return {
        key: value for key, value in env.items() if not of_other_jobs(key) and key.removeprefix("SBATCH_") not in hidden
    }


def queue(jobs: Sequence[str]) -> list[Queued]:
    """Returns the lines of squeue for these jobs, without those that have ended; none where there is no squeue.

    Raises GanDistError when squeue fails: that does not mean that the jobs have ended.
    """
    if not jobs or shutil.which("squeue") is None:
        return []
    try:
        answer = run("squeue", "-h", "-r", "-o", "%i|%T|%L|%N|%R|%S", "-j", ",".join(jobs))
    except GanDistError as error:
        if "Invalid job id" in str(error):  # the controller has forgotten all of them
            return []
        raise
    rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 5]
    return [Queued(*(cell.strip() for cell in row)) for row in rows]


def final_state(job: str) -> str:
    """Returns the state in which a job ended (COMPLETED, TIMEOUT, ...), or "" when SLURM no longer knows it.

    The controller remembers a job for some minutes; sacct, where it has a database, for longer.
    """
    for words in (("scontrol", "show", "job", "-o", job), ("sacct", "-nPX", "-o", "State", "-j", job)):
        with suppress(GanDistError):  # not installed, or the job is unknown
            answer = run(*words)
            states = re.findall(r"\bJobState=(\S+)", answer) if words[0] == "scontrol" else answer.split("\n")
            if states and states[0].strip():
                return states[0].strip()
    return ""
