"""The step that ends a start of a job, or lets it begin: gathers the facts, asks `verdict`, writes down, requeues.

    finish finish ATTEMPT      after srun: decides, and writes `requeue|end|cancel STATUS` to ATTEMPT/verdict
    finish requeue ATTEMPT     asks SLURM to requeue the job; exits with 0 when it will
    finish begin ATTEMPT       before it: `begin 0`, or `end 1` where earlier starts have used up the bounds
    finish term ATTEMPT PID SINCE    on a TERM at SINCE: requeues at once a job that ends before srun, PID, could, then
                               decides as `finish` does; exits with 1 when the TERM needs no action

Run by slurm/lib.sh as `python3 -I launch/job finish ...`, outside any container. Needs nothing but Python 3.6 and its
standard library.
"""

import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from launch.job.verdict import (
    EXIT_FAILED,
    EXIT_USAGE,
    FINAL,
    MAX_REQUEUES,
    MAX_STARTS,
    Facts,
    Start,
    Verdict,
    may_begin,
    verdict,
)

BOUNDS = ("max_starts", "max_crashes", "max_requeues")
"""What a person sets for plain sbatch, as GAN_DIST_MAX_STARTS and so on."""
REFUSALS = 3
KILL_WAIT_S, MARGIN_S, NOTIFY_S = 30, 5, 60
PATIENCE = 20
"""How often a controller that does not answer is asked again, a second later each time: minutes in all."""
KILLED = "Killed|Aborted|Segmentation fault|Bus error|Illegal instruction|Out Of Memory"


def read_known(attempt: Path) -> Dict[str, str]:
    """Returns what the batch script wrote about this start."""
    return dict(line.partition("=")[::2] for line in _text(attempt / "facts").splitlines())


def ask(job: str, tries: int = PATIENCE) -> str:
    """Returns what the controller says of a job, in one line; nothing when it does not answer.

    The job of an array's element is named ARRAY_TASK: the id of the last element is that of the whole array.
    """
    for number in range(1, tries + 1):  # it may be restarting; a cancelled job ends here anyway
        answer = _output(["scontrol", "show", "job", "-o", job])
        if answer or number == tries:
            return answer
        time.sleep(number)
    return ""


def is_preempted(job: str) -> bool:
    """Returns whether a preemption ends the job just now: in its grace time, and when cancelled then, it ends later."""
    ended, preempted = _time(_field(job, "EndTime")), _time(_field(job, "PreemptTime"))
    return preempted is not None and (ended is None or (ended - preempted).total_seconds() <= 1)


def read_facts(attempt: Path, job: str) -> Tuple[Facts, List[Start]]:
    """Returns (what is known of the start whose files are in `attempt`, all starts of its job).

    `job` is the controller's line.
    """
    known = read_known(attempt)
    progress, mark = read_progress(Path(known.get("run", "")), known.get("output", ""))
    status = int(known.get("status") or 0)
    fault, words = cause(attempt, known.get("log", ""), status)
    began, suspended = _time(_field(job, "StartTime")), _time(_field(job, "SuspendTime"))
    stopped, by_hand = _words(attempt / "stopped"), Path(known.get("run", "")) / "stop"
    if stopped is not None and stopped.startswith("requeue") and by_hand.exists():  # asked for, and not yet seen
        stopped = f"end the file {by_hand}"
    facts = Facts(
        restart=int(known.get("restart") or 0),
        status=status,
        progress=progress,
        mark=mark,
        done=_words(attempt / "done"),
        stopped=stopped,
        cause=words,
        fault=fault,
        state=_field(job, "JobState"),
        reason=_field(job, "Reason"),
        restarts=int(_field(job, "Restarts") or 0),
        preempted=is_preempted(job),
        suspended=suspended is not None and (began is None or suspended >= began),
        max_starts=max_starts(known),
        max_requeues=int(known.get("max_requeues") or MAX_REQUEUES),
    )
    return facts, read_history(attempt.parent)


def max_starts(known: Dict[str, str]) -> int:
    """Returns k of the table; GAN_DIST_MAX_CRASHES, its older name, counted restarts."""
    if known.get("max_starts"):
        return max(1, int(known["max_starts"]))
    return int(known["max_crashes"]) + 1 if known.get("max_crashes") else MAX_STARTS


def read_progress(run: Path, output: str) -> Tuple[int, str]:
    """Returns how far a run is, or the preparation of the dataset in `output`, as a number and as the history says."""
    if output:
        shards = len(list(Path(output).glob("shard-*.tar")))
        return shards, "%d shards" % shards if shards else "-"
    mark = _text(run / "checkpoints" / "latest").strip() or "-"
    return _number(mark), mark


def read_history(attempts: Path) -> List[Start]:
    """Returns all starts of a job, in order: those written down as begun, with the outcomes of those that ended."""
    outcomes = {}
    for line in _text(attempts / "history").splitlines():
        cells = line.split("\t")
        if len(cells) > 1 and cells[0].isdigit():
            outcomes[int(cells[0])] = cells[1]
    began = {}
    for line in _text(attempts / "began").splitlines():
        cells = line.split("\t")
        if len(cells) > 1 and cells[0].isdigit():
            began[int(cells[0])] = _number(cells[1])
    return [Start(restart, began[restart], outcomes.get(restart, "")) for restart in sorted(began)]


def cause(attempt: Path, log: str, status: int) -> Tuple[str, str]:
    """Returns (whose fault, why) a start failed: by a rank's own report, else by srun's, else by other ranks' guess."""
    reports = []
    for file in attempt.glob("failed-*"):
        cells = _text(file).strip("\n").split("\t")  # time, status, kind, rank, host, reason
        if len(cells) >= 6:
            reports.append((cells[0], cells))
    for _, (_, code, kind, rank, host, why) in sorted(reports):
        if kind == "error":
            return "usage" if code == str(EXIT_USAGE) else "error", why if rank == "-" else _rank(rank, host) + why
    printed = _text(attempt / "srun.err")
    found = re.search(r"^srun: error: ([^:]+): tasks? ([0-9,-]+): (%s).*" % KILLED, printed, re.M)
    if found:
        return "lost", _rank(found.group(2), found.group(1)) + found.group(3)
    found = re.search(r"^srun: fatal: .*", printed, re.M)
    if found:
        return "usage", found.group()
    if reports:
        return "lost", sorted(reports)[0][1][5]
    found = re.search(r"^srun: error: ([^:]+): tasks? (\d+).*: Exited ", printed, re.M)
    said = re.search(r"^(srun|slurmstepd): .*error.*", printed, re.M)
    if found:
        host, rank = found.groups()
        last = _last_line(log, host, rank) or (said.group() if said else "nothing")
        if (attempt / "running").exists():
            return "lost", "rank %s on %s ended, its last line: %s" % (rank, host, last)
        return "usage", "rank %s on %s ended before it began (job.python, job.container, job.setup): %s" % (
            (rank, host, last)
        )
    return "lost", said.group() if said else "srun ended with status %d" % status


def _number(mark: str) -> int:
    """Returns the number in step-00000120, or in a count of shards; 0 where there is none yet."""
    found = re.search(r"\d+", mark)
    return int(found.group()) if found else 0


def _rank(rank: str, host: str) -> str:
    return "rank %s on %s: " % (rank, host)


def _last_line(log: str, host: str, rank: str) -> str:
    """Returns the last line of a rank's log, whose name holds the host as SLURM shortens it; torchrun's, if it is that.

    `log` is the beginning of the logs' names.
    """
    start = Path(log)
    ends = ("-%s-torchrun.log" % host.split(".")[0], "-%s.log" % rank)
    names = [file.name for file in start.parent.iterdir()] if log and start.parent.is_dir() else []
    mine = [name for end in ends for name in names if name.startswith(start.name + "-") and name.endswith(end)]
    lines = [line.strip() for name in mine[:1] for line in _text(start.parent / name).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _field(job: str, name: str) -> str:
    """Returns a field of a line of scontrol's. The job's name, which may hold anything, comes before JobState."""
    found = re.search(r"\b%s=(\S*)" % name, re.sub(r"^JobId=\S+ (ArrayJobId=.*?)?JobName=.* UserId=", "", job))
    return found.group(1) if found else ""


def _time(text: str) -> Optional[datetime]:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _output(words: List[str]) -> str:
    env = dict(os.environ, SLURM_TIME_FORMAT="standard")
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, env=env)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _words(file: Path) -> Optional[str]:
    return " ".join(_text(file).split()) if file.exists() else None


def record(attempts: Path, restart: int, mark: str, ending: Verdict, fault: str) -> None:
    """Appends to the job's history how a start ended. Raises OSError where that cannot be written."""
    words = " ".join(ending.words.split())
    cells = [str(restart), ending.outcome, mark, words] + ([fault] if ending.outcome == "crashed" else [])
    with (attempts / "history").open("ab") as file:
        file.write(("\t".join(cells) + "\n").encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    said = words.encode("ascii", "backslashreplace").decode()
    print("gan_dist: %s at %s: %s" % (ending.outcome, mark, said), flush=True)


def notify(command: str, run: str, ending: Verdict) -> None:
    """Runs the user's command about a job that has ended for good; whatever becomes of it, it changes nothing."""
    words = {"GAN_DIST_RUN": run, "GAN_DIST_OUTCOME": ending.outcome, "GAN_DIST_REASON": ending.words}
    try:
        status = subprocess.call(["bash", "-c", command], env=dict(os.environ, **words), timeout=NOTIFY_S)
    except (OSError, subprocess.SubprocessError) as error:
        status = str(error)  # type: ignore[assignment]
    if status:
        print("gan_dist: job.notify failed: %s" % status, flush=True)


def requeue(attempt: Path) -> bool:
    """Returns whether SLURM will requeue the job. One that is down is asked again; one that refuses, three times."""
    known, refused = read_known(attempt), 0
    for number in range(1, PATIENCE + 1):
        if subprocess.call(["scontrol", "requeue", known["job"]]) == 0:
            return True
        if subprocess.call(["scontrol", "ping"], stdout=subprocess.DEVNULL) == 0:  # it answers: this is a refusal
            refused += 1
            if refused == REFUSALS:
                break
        time.sleep(number)
    _, mark = read_progress(Path(known["run"]), known["output"])
    ending = Verdict("end", "failed", "SLURM refused to requeue the job; submit it again", EXIT_FAILED)
    record(attempt.parent, int(known["restart"]), mark, ending, "")
    return False


def finish(attempt: Path, job: str) -> Verdict:
    """Returns what becomes of the job, of which the controller says `job`, once that is written down."""
    facts, history = read_facts(attempt, job)
    ending = verdict(facts, history)
    record(attempt.parent, facts.restart, facts.mark, ending, facts.fault)
    return ending


def begin(attempt: Path) -> Verdict:
    """Returns whether a start may begin; if not, why is written down."""
    known = read_known(attempt)
    wrong = [key for key in BOUNDS if not re.match(r"\d*$", known.get(key, ""))]
    if wrong:
        words = "GAN_DIST_%s: expected a number, found %s" % (wrong[0].upper(), known[wrong[0]])
        ending = Verdict("end", "failed", words, EXIT_USAGE)
        record(attempt.parent, int(known.get("restart") or 0), "-", ending, "usage")
        return ending
    facts, history = read_facts(attempt, "")
    earlier = [start for start in history if start.restart != facts.restart]
    refused = may_begin(earlier, facts.progress, facts.restart, facts.max_starts, facts.max_requeues)
    if refused is None:
        return Verdict("begin", "", "", 0)
    ending = Verdict("end", "failed", refused, EXIT_FAILED)
    record(attempt.parent, facts.restart, facts.mark, ending, facts.fault)
    return ending


def term(attempt: Path, pid: int, since: float) -> Optional[Verdict]:
    """Returns what becomes of a job that SLURM ends before srun, process `pid`, could: a time limit, a preemption.

    None when srun has ended, and when the job has more time. KillWait counts from `since`, and on a busy node little of
    it may be left: so the job is requeued before its ranks are waited for. That ends nothing sooner, and is taken back
    when they turn out to be done, or stopped by a person.
    """
    name = read_known(attempt)["job"]
    job = ask(name)
    if not _lives(pid) or not (_field(job, "Reason") == "TimeLimit" or is_preempted(job)):
        return None
    wanted = verdict(*read_facts(attempt, job)).decision == "requeue"
    requeued = wanted and subprocess.call(["scontrol", "requeue", name]) == 0
    found = re.search(r"KillWait *= *(\d+)", _output(["scontrol", "show", "config"]))
    until = since + (int(found.group(1)) if found else KILL_WAIT_S) - MARGIN_S
    while _lives(pid) and time.time() < until:
        time.sleep(0.2)
    ending = finish(attempt, job)
    if requeued:
        return ending._replace(decision="end" if ending.decision == "requeue" else "cancel")
    return ending


def main() -> None:
    """Runs the step that the arguments name."""
    when, attempt = sys.argv[1], Path(sys.argv[2])
    if when == "requeue":
        sys.exit(not requeue(attempt))
    try:
        if when == "begin":
            ending = begin(attempt)
        elif when == "term":
            ended = term(attempt, int(sys.argv[3]), float(sys.argv[4]))
            if ended is None:
                sys.exit(1)
            ending = ended
        else:
            ending = finish(attempt, "" if (attempt / "done").exists() else ask(read_known(attempt)["job"]))
        (attempt / "verdict").write_text("%s %d\n" % (ending.decision, ending.status))
    except OSError as error:  # then nothing is requeued
        sys.exit("gan_dist: cannot write down what becomes of the job: %s" % error)
    if ending.outcome in FINAL and os.environ.get("GAN_DIST_NOTIFY"):
        notify(os.environ["GAN_DIST_NOTIFY"], read_known(attempt).get("run", ""), ending)


if __name__ == "__main__":
    main()
