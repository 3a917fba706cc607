"""SLURM's own commands: what they are asked, and what their answers mean. None of them needs accounting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from gan_dist.errors import GanDistError, UserError

INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GAN_DIST_ATTEMPT", "GAN_DIST_LAUNCH_ID")


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


def submit(script: str, *options: str) -> str:
    """Returns the id of the job that sbatch made of `script`. Raises UserError with sbatch's words verbatim."""
    need("sbatch")
    with submission_environment():
        done = subprocess.run(
            ["sbatch", "--parsable", *options], input=script, capture_output=True, text=True, timeout=120, check=False
        )
    if done.returncode:
        raise refusal(done.stderr)
    return done.stdout.strip().split(";")[0]


def refusal(said: str) -> UserError:
    """Returns sbatch's refusal as one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return UserError(f"sbatch refused the job: {'; '.join(lines)}")


@contextmanager
def submission_environment() -> Iterator[None]:
    """Within it this process has no variables of another job or world that sbatch would pass on to the new one."""
    hidden = {
        key: os.environ.pop(key)
        for key in list(os.environ)
        if key in INHERITED or (key.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) and key != "SLURM_CONF")
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


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
