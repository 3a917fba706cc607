"""Calls of SLURM's own commands, and what their answers mean. None of them needs accounting.

A job is known by more than its id, which other clusters on the same file system and later jobs have as well: by the
cluster's name, its own name, its working directory and the time at which SLURM took it.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache

from gan_dist.utils.errors import GanDistError, UserError
from launch.job.environment import of_other_jobs

SBATCH_S = 120
UNHEARD_S = (0.5, 1, 2, 4, 8)
"""Seconds between looks into the queue for a job of which sbatch has not heard."""
SEPARATOR = "|"
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


FILTERS = re.compile("(SQUEUE|SACCT|SCONTROL|SCANCEL|SINFO)_.*|SLURM_(TIME_FORMAT|BITSTR_LEN|CLUSTERS)")
"""Variables by which a person changes what SLURM's commands show, and how; our calls do without them."""
CELLS = ("%i", "%T", "%L", "%N", "%R", "%S", "%V", "%j", "%Z")
LATE = "timed out|unable to contact|zero bytes|connection (refused|reset)|communication|no route|transport endpoint"
"""Matches what sbatch prints when it does not know whether the controller has taken the job."""
CLOCKS_S = 600
"""Seconds by which the clocks of the controller and of this machine may differ."""


@dataclass(frozen=True)
class Job:
    """A job, or an element of an array (17_3), as it was submitted.

    What is None was not recorded, by an earlier version or for want of an answer.
    """

    id: str
    """Its number; ARRAY_ELEMENT for an element that is a run of its own."""
    cluster: str | None = None
    name: str | None = None
    directory: str | None = None
    """Its working directory."""
    submitted: str | None = None
    """When SLURM took it, by its own clock; a requeued job has the time at which it was requeued."""
    user: str | None = None
    time: float | None = None
    """When it was recorded, by the clock of the machine that submitted."""
    began: bool = False
    """Whether it has ever run, so that it may have been requeued."""

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts jobs by age."""
        return tuple(map(int, self.id.split("_")))

    def is_at(self, name: str, directory: str, submitted: str) -> bool:
        """Returns whether the job of this id that SLURM tells of is this one, and not another's."""
        if (self.name or name) != name or (self.directory or directory) != directory:
            return False
        try:
            told = datetime.fromisoformat(submitted)
        except ValueError:
            return True
        if self.submitted:
            mine = datetime.fromisoformat(self.submitted)
            return told == mine or (self.began and told > mine)
        late = told.timestamp() - self.time if self.time else 0.0
        return abs(late) <= CLOCKS_S or (self.began and late > 0)


@dataclass(frozen=True)
class Queued:
    """One line of squeue."""

    job: str
    state: str
    time_left: str
    nodes: str
    reason: str
    starts: str
    submitted: str = ""
    name: str = ""
    directory: str = ""

    def is_of(self, job: Job) -> bool:
        """Returns whether this line is about `job`, or about an element of its array."""
        if job.id not in (self.job, self.job.partition("_")[0]):
            return False
        return not self.name or job.is_at(self.name, self.directory, self.submitted)

    @property
    def why(self) -> str:
        """Why the job waits, as SLURM says it; nothing where it does not."""
        known = self.reason.startswith("(") and self.reason != "(None)"
        return self.reason.strip("()") if known else ""

    def started_after(self, moment: float) -> bool | None:
        """Returns whether this start of the job began after `moment`, in seconds since 1970; None where unknown."""
        try:
            return datetime.fromisoformat(self.starts).timestamp() > moment
        except ValueError:
            return None

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else ""
        reason = f" ({self.why})" if self.why else ""
        left = f", {self.time_left} left" if self.state == "RUNNING" else ""
        starts = f", starts {self.starts}" if self.state == "PENDING" and self.starts not in ("", "N/A") else ""
        return f"{self.state}{where}{reason}{left}{starts}"


@dataclass(frozen=True)
class View:
    """What SLURM shows of some jobs."""

    lines: tuple[Queued, ...] = ()
    elsewhere: frozenset[Job] = frozenset()
    """Jobs of other clusters, which this machine does not ask."""
    hidden: frozenset[Job] = frozenset()
    """Jobs of others, of which SLURM says nothing because it shows jobs to their owners only (PrivateData)."""

    def of(self, job: Job) -> list[Queued]:
        """Returns the lines of one job: one for each element of an array."""
        return [line for line in self.lines if line.is_of(job)]


def user_name(uid: int | None = None) -> str:
    """Returns the name of a user, by default of this process's, whatever the environment says."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


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
    env = {key: value for key, value in os.environ.items() if not FILTERS.fullmatch(key)}
    env["SLURM_TIME_FORMAT"] = "standard"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False, env=env)
    except subprocess.TimeoutExpired:
        raise GanDistError(f"{words[0]} did not answer within {limit_s:g} s; is the SLURM controller up?") from None
    if done.returncode:
        raise GanDistError(f"{words[0]} failed: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


class Unheard(GanDistError):
    """sbatch does not know whether the controller has taken the job."""


def submit(script: str, record: Callable[[Job], object] = str, known: Collection[str] = ()) -> Job:
    """Returns the job that sbatch made of `script`, after `record(job)` has written it down.

    When `record` fails, or Ctrl-C was pressed meanwhile, the job is cancelled: nobody would know of it. `known` are ids
    of earlier jobs, for an sbatch that does not learn the id of its own. Raises UserError with sbatch's own message
    when it refuses, and GanDistError when it does not answer and the queue has no such job.
    """
    require("sbatch")
    options = dict(re.findall(r"(?m)^#SBATCH --(job-name|chdir)=(.*)", script))
    words = {key: (shlex.split(value) or [""])[0] for key, value in options.items()}
    job = Job("", cluster_name(), words.get("job-name"), words.get("chdir"), None, user_name(), time.time())
    try:
        with _delayed_interrupts():
            try:
                number, _, cluster = _sbatch(script).partition(";")
                job = replace(job, id=number, cluster=cluster or job.cluster)
            except Unheard as error:
                job = _queued_unheard(job, known, error)
            record(job)  # at once; then with the time that SLURM has for it
            shown: list[Queued] = []
            with suppress(GanDistError):  # then it is known by what is recorded already
                shown = [] if job.submitted else queue([job])
            if shown and shown[0].submitted:
                job = replace(job, submitted=shown[0].submitted)
                record(job)
    except BaseException:
        if job.id:
            with suppress(GanDistError):
                cancel(job)
        raise
    return job


def _sbatch(script: str) -> str:
    """Returns what sbatch prints: the id of the job, or `id;cluster`."""
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
        raise Unheard(
            f"sbatch did not answer within {SBATCH_S} s; is the SLURM controller up? If `squeue --me` shows the job "
            "later, cancel it: its files are gone"
        ) from None
    printed = done.stdout.strip()
    if done.returncode == 0 and printed.partition(";")[0].isdigit():
        return printed
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    message = "; ".join(lines) or f"status {done.returncode}, without an id or a message"
    if done.returncode <= 0 or re.search(LATE, message, re.IGNORECASE):
        raise Unheard(f"sbatch does not know whether the job is queued: {message}; the queue does not have it")
    raise UserError(f"sbatch refused the job: {message}")


def _queued_unheard(job: Job, known: Collection[str], error: Unheard) -> Job:
    """Returns the job that the controller has taken although sbatch did not hear of it: by name, directory and time.

    Raises `error` when the queue has none that is not `known`.
    """
    for wait_s in UNHEARD_S:
        time.sleep(wait_s)
        with suppress(GanDistError):
            answer = run("squeue", "-h", "-a", "-u", job.user or "", "-o", SEPARATOR.join(("%F", "%V", "%j", "%Z")))
            rows = [line.split(SEPARATOR, 2) for line in answer.splitlines() if line.count(SEPARATOR) >= 3]
            mine = {
                number: submitted
                for number, submitted, named in rows
                if number not in known
                and named == f"{job.name}{SEPARATOR}{job.directory}"
                and job.is_at(job.name or "", job.directory or "", submitted)
            }
            if mine:
                number = max(mine, key=int)
                print(
                    f"note: {str(error).partition(';')[0]}; the queue has it as {number}", file=sys.stderr, flush=True
                )
                return replace(job, id=number, submitted=mine[number])
    raise error


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


def look(jobs: Sequence[Job]) -> View:
    """Returns what SLURM shows of these jobs, by one call of squeue; nothing of those that have ended.

    Raises GanDistError when squeue fails: that does not mean that the jobs have ended.
    """
    if not jobs or shutil.which("squeue") is None:
        return View()
    asked, elsewhere, lines = [], set[Job](), list[Queued]()
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_far(job), []).append(job)
    for cluster, theirs in groups.items():
        if cluster and "slurmdbd" not in config("AccountingStorageType"):  # which is what clusters know one another by
            elsewhere.update(theirs)
            continue
        ids = ",".join(dict.fromkeys(job.id for job in theirs))
        words = (
            "squeue",
            *(("-M", cluster) if cluster else ()),
            "-h",
            "-r",
            "-a",
            "-o",
            SEPARATOR.join(CELLS),
            "-j",
            ids,
        )
        try:
            answer = run(*words)
        except GanDistError as error:
            if cluster:
                elsewhere.update(theirs)
                continue
            if "Invalid job id" not in str(error):  # the controller has forgotten all of them, or shows none of them
                raise
            answer = ""
        asked += theirs
        lines += [_read_line(text, theirs) for text in answer.splitlines() if text.count(SEPARATOR) >= 5]
    mine = tuple(line for line in lines if any(line.is_of(job) for job in asked))
    unseen = (job for job in asked if job.user not in (None, user_name()) and not any(line.is_of(job) for line in mine))
    hidden = frozenset(unseen)
    if not hidden or os.geteuid() == 0 or "jobs" not in config("PrivateData"):
        hidden = frozenset()
    return View(mine, frozenset(elsewhere), hidden)


def _far(job: Job) -> str:
    """Returns the cluster to name (-M) when asking about a job; nothing for this machine's own."""
    here = cluster_name()
    return job.cluster if job.cluster and here and job.cluster != here else ""


def cancel(job: Job, *options: str) -> None:
    """Cancels a job, on whichever cluster it is. Raises GanDistError with scancel's message when it refuses."""
    far = _far(job)
    run("scancel", *(("-M", far) if far else ()), *options, job.id)


def _read_line(text: str, asked: Sequence[Job]) -> Queued:
    cells = [cell.strip() for cell in text.split(SEPARATOR, 7)]
    rest = cells[7] if len(cells) > 7 else ""  # name and directory, both of which may hold the separator
    known = [(f"{job.name}", f"{job.directory}") for job in asked if job.id in (cells[0], cells[0].partition("_")[0])]
    named = next((names for names in known if SEPARATOR.join(names) == rest), tuple(rest.split(SEPARATOR, 1)))
    return Queued(*cells[:7], *named)


def queue(jobs: Sequence[Job]) -> list[Queued]:
    """Returns the lines of squeue for these jobs, without those that have ended; none where there is no squeue.

    Raises GanDistError when squeue fails: that does not mean that the jobs have ended.
    """
    return list(look(jobs).lines)


@cache
def _config() -> str:
    try:
        return run("scontrol", "show", "config")
    except GanDistError:
        return ""


def config(key: str) -> str:
    """Returns a setting of this machine's cluster, in lower case; nothing where the controller does not say."""
    found = re.search(rf"(?m)^{key} *= *(.*)$", _config())
    return found[1].strip().lower() if found else ""


def cluster_name() -> str | None:
    """Returns the name of the cluster that SLURM's commands talk to here, or None where nobody says it."""
    return config("ClusterName") or None


def final_state(job: Job) -> str:
    """Returns the state in which a job ended (COMPLETED, TIMEOUT, ...), or "" when SLURM no longer knows it.

    The controller remembers a job for some minutes; sacct, where it has a database, for longer.
    """
    if job.cluster and (here := cluster_name()) and job.cluster != here:
        return ""
    with suppress(GanDistError):  # not installed, or the job is unknown
        answer = run("scontrol", "show", "job", "-o", job.id)
        fields = [re.search(rf"\b{name}=(.*?)(?: \w+=|$)", answer) for name in ("JobName", "WorkDir", "SubmitTime")]
        state = re.search(r"\bJobState=(\S+)", answer)
        name, directory, submitted = (found[1] if found else "" for found in fields)
        if state and (not name or job.is_at(name, directory, submitted)):
            return state[1]
    with suppress(GanDistError):
        answer = run("sacct", "-nPX", "-o", "State,Submit,JobName,WorkDir", "-j", job.id)
        for line in answer.splitlines():
            state_of, submitted, name, directory = (*line.split("|", 3), "", "", "")[:4]
            if state_of.strip() and (not name or job.is_at(name, directory, submitted)):
                return state_of.strip()
    return ""
