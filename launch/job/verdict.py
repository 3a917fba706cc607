"""What becomes of a job when one of its starts has ended: it is requeued, or it ends. `verdict` decides.

The first row of this table that holds is the verdict:

    what is known of this start                          decision  outcome    what it means
    ---------------------------------------------------  --------  ---------  --------------------------------------
     1 the ranks wrote `done`                             end       done       all steps are done and saved
     2 SLURM counts more restarts than this one           end       lost       it has requeued the job itself
     3 the controller does not answer                     end       lost       cut off: SLURM decides elsewhere
     4 SLURM ends the job, and not for its time limit     end       cancelled  scancel; whether it saved is said
       or a preemption
     5 stopped by a person's stop file                    cancel    stopped    so that no job that waits for it starts
     6 a fault that no retry mends: bad configuration     end       failed     status 2: named, and started once
       or data, a wrong interpreter, job.setup, `fatal`
     7 restarted job.max_requeues times                   end       stopped    (failed when this start had not saved)
     8 preempted before the ranks had saved               requeue   lost       costs nothing of the budget
     9 suspended, and its ranks missed one another        requeue   lost       costs nothing of the budget
    10 the k-th start in a row without a newer            end       failed     k = job.max_starts_without_progress;
       checkpoint                                                              says what to raise
    11 saved and stopped by the cluster                   requeue   requeued   time limit, preemption, USR2
    12 anything else: a crash, a lost rank, a time        requeue   crashed    from the newest checkpoint
       limit that came before the ranks had saved

A newer checkpoint (a preparation: a further shard) refills the budget of row 10. Each start is written down before its
ranks begin, so that one which leaves no word counts as well. `may_begin` holds the same bounds before a start.

slurm/lib.sh has launch/job/finish.py ask this on the job's first node, outside any container, by whatever Python 3 is
there: both files need nothing but Python 3.6 and its standard library. Where they cannot run, or cannot write down the
outcome, the job is not requeued; where a time limit has requeued it already, its next start does not begin.
"""

import re
from typing import List, NamedTuple, Optional

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75
MAX_STARTS, MAX_REQUEUES = 3, 100
FINAL = ("done", "failed", "stopped", "cancelled")
"""Outcomes after which a job is not requeued."""


class Start(NamedTuple):
    """A start of the job, in the order of starts; the last one is the start that is judged."""

    restart: int
    progress: int
    """The newest checkpoint's step (a preparation: its number of shards) when it began."""
    outcome: str = ""
    """How it ended; empty while it runs, and for one that left no word."""


class Facts(NamedTuple):
    """What is known of a start that has ended."""

    restart: int = 0
    status: int = 0
    """srun's exit status."""
    progress: int = 0
    """The newest checkpoint's step, or the number of shards, now."""
    mark: str = "-"
    """The same as the history names it: step-00000120, or 12 shards."""
    done: Optional[str] = None
    """What the ranks wrote when all was done."""
    stopped: Optional[str] = None
    """`end` or `requeue`, then the reason: what the ranks wrote when they had stopped as asked."""
    cause: str = ""
    """Why it failed."""
    fault: str = "lost"
    """Whose fault that was: usage (no retry mends it), error (an exception), lost (a rank or host)."""
    state: str = ""
    """The job's state as the controller says it; empty when it does not answer."""
    reason: str = ""
    restarts: int = 0
    preempted: bool = False
    """A preemption ends the job just now."""
    suspended: bool = False
    """The job was suspended in this start."""
    max_starts: int = MAX_STARTS
    max_requeues: int = MAX_REQUEUES


class Verdict(NamedTuple):
    """What becomes of the job."""

    decision: str
    """requeue, end, or cancel (end it so that SLURM's books say CANCELLED)."""
    outcome: str
    words: str
    status: int = EXIT_STOPPED
    """The exit status of the batch script."""


def verdict(facts: Facts, history: List[Start]) -> Verdict:
    """Returns what becomes of the job, by the table above. `history` has all starts; the last one has just ended."""
    failed = facts.status or EXIT_FAILED
    saved = None if facts.stopped is None else _saved(facts.stopped.partition(" ")[2])
    if facts.done is not None:  # 1
        return Verdict("end", "done", facts.done, 0)
    if facts.restarts > facts.restart:  # 2
        return Verdict("end", "lost", "SLURM requeued the job: " + (saved or facts.cause))
    if not facts.state:  # 3
        return Verdict("end", "lost", "SLURM's controller does not answer from here", failed)
    time_limit = facts.reason == "TimeLimit"
    if facts.state not in ("RUNNING", "SUSPENDED") and not time_limit and not facts.preempted:  # 4
        if saved:
            return Verdict("end", "cancelled", saved)
        return Verdict("end", "cancelled", f"SLURM ended the job ({facts.state}) before the ranks had saved", failed)
    why = facts.cause
    if facts.stopped is not None:
        what, _, why = facts.stopped.partition(" ")
        if what == "end":  # 5
            return Verdict("cancel", "stopped", why)
    elif time_limit:
        why = "the time limit came before the ranks had saved; raise slurm.signal_lead_s"
    elif facts.fault == "usage":  # 6
        return Verdict("end", "failed", why, EXIT_USAGE)
    if facts.restart >= facts.max_requeues:  # 7
        words = f"requeued {facts.restart} times (job.max_requeues)"
        if facts.stopped is not None:
            return Verdict("end", "stopped", words + "; submit it again to go on")
        return Verdict("end", "failed", f"{words}, the last one: {why}", EXIT_FAILED)
    if facts.stopped is None and facts.preempted and facts.state != "RUNNING":  # 8
        return Verdict("requeue", "lost", "preempted before the ranks had saved")
    if facts.stopped is None and facts.suspended and facts.fault == "lost" and not time_limit:  # 9
        return Verdict("requeue", "lost", "suspended for longer than its ranks wait for one another: " + why)
    starts = without_progress(facts.progress, history)
    if starts >= facts.max_starts:  # 10
        return Verdict("end", "failed", _no_progress(facts, starts, why), EXIT_FAILED)
    if facts.stopped is not None:  # 11
        return Verdict("requeue", "requeued", why)
    return Verdict("requeue", "crashed", why)  # 12


def may_begin(history: List[Start], progress: int, restart: int, max_starts: int, max_requeues: int) -> Optional[str]:
    """Returns why a start must not begin, or None: starts that left no word have used up the bounds of the table."""
    starts = without_progress(progress, history)
    if starts >= max_starts:
        return f"no newer checkpoint in {starts} starts, and the last of them ended without a word (its node died?)"
    if restart > max_requeues:
        return f"SLURM has restarted the job {restart} times (job.max_requeues)"
    return None


def without_progress(progress: int, history: List[Start]) -> int:
    """Returns how many of the last starts have added nothing to `progress`, without those that others cut short."""
    count = 0
    for start in reversed(history):
        if start.progress < progress:
            break
        count += start.outcome != "lost"
    return count


def _saved(why: str) -> str:
    return ("stopped by " if "while data were fetched" in why else "saved and stopped by ") + why


def _no_progress(facts: Facts, starts: int, why: str) -> str:
    if facts.stopped is not None:
        advice = "raise slurm.time or lower slurm.signal_lead_s"
        return f"no step in {starts} starts; {advice} (still at {facts.mark}, stopped by {why})"
    advice = ""
    if re.search("no space left|quota|disk full", why, re.I):
        advice = "; free some space or raise the quota, then submit it again"
    elif facts.reason == "TimeLimit":
        advice = " or slurm.time"
    return f"no newer checkpoint in {starts} starts (still at {facts.mark}), the last one: {why}{advice}"
