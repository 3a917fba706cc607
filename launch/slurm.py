"""SLURM's own commands: what they are asked, and what their answers mean. None of them needs accounting."""

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

SBATCH_S = 120
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GAN_DIST_ATTEMPT", "GAN_DIST_LAUNCH_ID")
FOREIGN = ("SLURM_", "SUBMITIT_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
"""How variables begin that a job exports; one that is submitted from within it is another."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
PROTOCOLS = {"ARRAY_INX", "ERROR", "EXPORT", "GET_USER_ENV", "WAIT"}
"""What SBATCH_ variables may not say of any job: saving, requeueing and telling would break."""
SPELT = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "switches": "REQ_SWITCH"}
"""sbatch's options whose SBATCH_ variable is called otherwise."""
EITHER = (
    {"MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"},
    {"GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"},
    {"CPUS_PER_TASK", "CPUS_PER_GPU"},
    {"REQUEUE", "NO_REQUEUE"},
)
"""Options that exclude one another, or say the same."""


@dataclass(frozen=True)
class Queued:
    """One line of squeue."""

    job: str
    state: str
    left: str
    nodes: str
    why: str
    starts: str

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else ""
        why = f" ({self.why.strip('()')})" if self.why and self.why.startswith("(") and self.why != "(None)" else ""
        left = f", {self.left} left" if self.state == "RUNNING" else ""
        starts = f", starts {self.starts}" if self.state == "PENDING" and self.starts not in ("", "N/A") else ""
        return f"{self.state}{where}{why}{left}{starts}"


def need(*programs: str) -> None:
    """Returns if SLURM's commands are here. Raises UserError when one is not."""
    for program in programs:
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on PATH: this is no machine that submits to SLURM; log in to the cluster's login "
                "node, or train here with `python -m launch local`"
            )


def ask(*words: str, limit_s: float = 60) -> str:
    """Returns what a command printed. Raises GanDistError with its own words when it fails."""
    need(words[0])
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise GanDistError(f"{words[0]} did not answer within {limit_s:g} s; is the SLURM controller up?") from None
    if done.returncode:
        raise GanDistError(f"{words[0]} said: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


def submit(script: str, keep: Callable[[str], object] = str) -> str:
    """Returns the id of the job that sbatch made of `script`, after `keep(id)` has written it down.

    When that fails, or Ctrl-C came meanwhile, the job is cancelled: nobody would know it. Raises UserError with the
    words of sbatch verbatim, and GanDistError when it does not answer.
    """
    need("sbatch")
    job = ""
    try:
        with _unbroken():
            job = _sbatch(script)
            keep(job)
    except BaseException:
        if job:
            with suppress(GanDistError):
                ask("scancel", job)
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
            start_new_session=True,  # a terminal's Ctrl-C is not sbatch's
        )
    except subprocess.TimeoutExpired:
        raise GanDistError(
            f"sbatch did not answer within {SBATCH_S} s; is the SLURM controller up? Should `squeue --me` show the job "
            "later on, cancel it: its files are gone"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"sbatch refused the job: {'; '.join(lines)}")
    return done.stdout.strip().split(";")[0]


@contextmanager
def _unbroken() -> Iterator[None]:
    """Within it Ctrl-C, and the end of a session, wait: once it is asked, sbatch is heard out."""
    came: list[signal.Signals] = []

    def wait(number: int, frame: object) -> None:
        came.append(signal.Signals(number))
        print("waiting for sbatch to answer", file=sys.stderr, flush=True)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, wait) for number in ENDING if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came and (before[came[0]] or signal.SIG_DFL) == signal.SIG_DFL:
            raise SystemExit(128 + came[0])  # the default would end this process before anything is undone
        if came:
            signal.raise_signal(came[0])


def submission_environment(env: Mapping[str, str], script: str) -> dict[str, str]:
    """Returns what sbatch, which passes it on to the job, may see of `env`: nothing of another job or world.

    Of the defaults that a person sets (SBATCH_ACCOUNT), those stand of which `script` says nothing: sbatch would prefer
    them.
    """
    named = {SPELT.get(key, key.upper().replace("-", "_")) for key in re.findall(r"(?m)^#SBATCH --([\w-]+)", script)}
    hidden = named.union(PROTOCOLS, *(group for group in EITHER if named & group))
    return {
        key: value
        for key, value in env.items()
        if key not in INHERITED
        and (key in KEPT or not key.startswith(FOREIGN))
        and key.removeprefix("SBATCH_") not in hidden
    }


def queue(jobs: Sequence[str]) -> list[Queued]:
    """Returns what squeue says of these jobs; ended ones are not in it. Nothing where there is no squeue.

    Raises GanDistError when squeue cannot tell: a job that nobody can ask for has not ended.
    """
    if not jobs or shutil.which("squeue") is None:
        return []
    try:
        told = ask("squeue", "-h", "-r", "-o", "%i|%T|%L|%N|%R|%S", "-j", ",".join(jobs))
    except GanDistError as error:
        if "Invalid job id" in str(error):  # it has forgotten them all
            return []
        raise
    rows = [line.split("|") for line in told.splitlines() if line.count("|") == 5]
    return [Queued(*(cell.strip() for cell in row)) for row in rows]


def ended(job: str) -> str:
    """Returns how a job that squeue no longer lists ended (COMPLETED, TIMEOUT, ...), or nothing when none knows.

    The controller remembers for some minutes; sacct, where there is one with a database, for longer.
    """
    for words in (("scontrol", "show", "job", "-o", job), ("sacct", "-nPX", "-o", "State", "-j", job)):
        with suppress(GanDistError):  # not here, or it knows nothing
            told = ask(*words)
            states = re.findall(r"\bJobState=(\S+)", told) if words[0] == "scontrol" else told.split("\n")
            if states and states[0].strip():
                return states[0].strip()
    return ""
