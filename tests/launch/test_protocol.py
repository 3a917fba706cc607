"""The batch script's half of the protocol, slurm/lib.sh, among programs that answer as SLURM's do."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """
echo "$*" >>"$PLAY/srun"
env >"$PLAY/environment"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """
echo "$*" >>"$PLAY/scontrol"
case $1 in
  ping) [[ -z $DOWN ]] ;;
  requeue)
    if [[ -s $PLAY/refusals ]]; then sed -i 1d "$PLAY/refusals"; echo "scontrol: error" >&2; exit 1; fi
    kill -TERM $PPID ;;
  show) [[ $2 == config ]] && echo "KillWait                = ${KILL_WAIT:-6} sec" || echo "JobId=7 $JOB" ;;
esac
"""
SEGV = "echo 'srun: error: node2: task 1: Segmentation fault (core dumped)' >&2; doze 0.2; exit 139"
OVER = "JobState=COMPLETING Reason=TimeLimit Restarts=0"


@dataclass
class Play:
    """A job of which everything but the batch script is played."""

    at: Path
    env: dict[str, str] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    """Process groups of what was started."""

    def program(self, name: str, text: str) -> None:
        """Puts a program on the job's PATH."""
        file = self.at / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}")
        file.chmod(0o755)

    def start(self, body: str, before: str = "") -> subprocess.Popen[bytes]:
        """Returns the batch script's process; `before` is what the cluster file's job.setup would be."""
        run, submission = shlex.quote(str(self.at / "run")), shlex.quote(str(self.at / "run" / "launch" / "s"))
        lines = (before, f"source {ROOT}/slurm/lib.sh", f"gan_dist_begin {run} {submission}", body)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "GAN_DIST_"))}
        env = {
            "PATH": f"{self.at / 'bin'}:{os.environ['PATH']}",
            "PLAY": str(self.at),
            "JOB": "JobState=RUNNING Reason=None Restarts=0",
            "SLURM_JOB_ID": "7",
            "pid": "1",  # whatever a user's environment holds
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "node2",
        }
        with (self.at / "log").open("ab") as log:
            words = ("bash", "-c", "\n".join(lines))
            env = kept | env | self.env
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
        self.groups.append(process.pid)
        return process

    def run(self, ranks: str, before: str = "") -> int:
        """Returns the status of a batch script whose ranks run `ranks`; a requeue ends it as SLURM does, by TERM."""
        return self.start(f"gan_dist_srun bash -c {shlex.quote(ranks)}\ngan_dist_finish $?", before).wait(30)

    def history(self) -> list[list[str]]:
        """Returns the cells of what became of each start."""
        file = self.at / "run" / "launch" / "s" / "attempts" / "7" / "history"
        return [line.split("\t") for line in file.read_text().splitlines()]

    def asked(self, word: str) -> int:
        """Returns how often scontrol was asked for `word`."""
        return [line.split()[0] for line in (self.at / "scontrol").read_text().splitlines()].count(word)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """A job on two nodes; whatever it leaves behind ends with the test."""
    made = Play(tmp_path)
    made.program("srun", SRUN)
    made.program("scontrol", SCONTROL)
    made.program("sleep", "exec doze 0.05")  # waiting is patience here, not time
    (tmp_path / "bin" / "doze").symlink_to(shutil.which("sleep") or "/bin/sleep")
    yield made
    for group in made.groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_srun_ends_all_ranks_with_one_and_gives_each_its_processors(play: Play) -> None:
    play.env["SLURM_CPUS_PER_TASK"] = "3"
    play.env["SLURM_EXPORT_ENV"] = "NONE"  # what sbatch --export=NONE leaves behind
    assert play.run('echo 20 >"$GAN_DIST_ATTEMPT/done"') == 0
    words = (play.at / "srun").read_text().split()
    assert {"--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=3", "--unbuffered"} <= set(words), words
    log = f"--output={play.at}/run/logs/7-0-%N-%t.log"
    assert log in words and play.history() == [["0", "done", "-", "20"]]
    assert "SLURM_EXPORT_ENV=ALL" in (play.at / "environment").read_text().splitlines()


def test_an_interpreter_that_a_node_lacks_is_reported_before_ranks_start(play: Play) -> None:
    assert play.start("gan_dist_preflight no-such-python\ngan_dist_srun true").wait(30) == 2
    ((_, what, _, why),) = play.history()
    assert what == "failed" and why == "node2 cannot run no-such-python (job.python, job.container)"
    assert "--unbuffered" not in (play.at / "srun").read_text()


@pytest.mark.parametrize("shell", ["set -euo pipefail", "set -fC"])
def test_a_setup_that_is_strict_with_its_shell_changes_nothing(play: Play, shell: str) -> None:
    assert play.run("exit 3", before=shell) == -signal.SIGTERM
    assert play.history() == [["0", "crashed", "-", "srun ended with status 3", "lost"]] and play.asked("requeue") == 1


def test_requeues_are_counted(play: Play) -> None:
    stopped = 'echo requeue SIGUSR2 >"$GAN_DIST_ATTEMPT/stopped"'
    play.env |= {"GAN_DIST_MAX_REQUEUES": "1", "JOB": "JobState=RUNNING Reason=None Restarts=1"}
    for restart, status in (("0", -signal.SIGTERM), ("1", 75)):
        play.env |= {"SLURM_RESTART_COUNT": restart, "JOB": f"JobState=RUNNING Reason=None Restarts={restart}"}
        assert play.run(stopped) == status
    assert [line[1:] for line in play.history()] == [
        ["requeued", "-", "SIGUSR2"],
        ["stopped", "-", "requeued 1 times (job.max_requeues); submit it again to go on"],
    ]


def test_a_killed_rank_has_the_whole_budget_and_an_exception_one_more_try_after_the_same_checkpoint(play: Play) -> None:
    for restart in range(4):
        play.env |= {"SLURM_RESTART_COUNT": str(restart), "JOB": f"JobState=RUNNING Reason=None Restarts={restart}"}
        assert play.run(SEGV) == (1 if restart == 3 else -signal.SIGTERM)
    assert [line[1] for line in play.history()] == ["crashed"] * 3 + ["failed"]
    assert play.history()[-1][3] == ("4 crashes (job.max_crashes=3), the last one: rank 1 on node2: Segmentation fault")
    shutil.rmtree(play.at / "run")
    for restart in range(2):
        play.env |= {"SLURM_RESTART_COUNT": str(restart), "JOB": f"JobState=RUNNING Reason=None Restarts={restart}"}
        word = f"1\\t1\\terror\\t0\\tnode1\\tno disk {restart}\\n"
        assert play.run(f"printf '{word}' >$GAN_DIST_ATTEMPT/failed-0; exit 1") == (1 if restart else -signal.SIGTERM)
    assert play.history()[-1][3] == "failed twice after the same checkpoint (-): rank 0 on node1: no disk 1"


def test_a_controller_that_restarts_is_asked_to_requeue_again_and_a_refusal_is_one(play: Play) -> None:
    (play.at / "refusals").write_text("no\n" * 6)
    play.env["DOWN"] = "yes"
    assert play.run("exit 3") == -signal.SIGTERM and play.asked("requeue") == 7
    (play.at / "refusals").write_text("no\n" * 6)
    play.env["DOWN"] = ""
    assert play.run("exit 3") == 1 and play.asked("requeue") == 7 + 3
    assert play.history()[-1][3] == "SLURM refused to requeue the job; submit it again"


CLOCK = """
unset SECONDS; SECONDS=0 # a clock of the test's own, which goes on where the script sleeps
sleep() { ((SECONDS += $1)); touch "$PLAY/second-$SECONDS"; doze 0.2; }
"""


def ended(play: Play, ranks: str, again_at: int = 1) -> int:
    """Returns the status of a batch script that SLURM tells to end while its ranks run, and again a second later."""
    ranks = shlex.quote(f"touch $PLAY/there; {ranks}")
    process = play.start(f"gan_dist_srun bash -c {ranks}\ngan_dist_finish $?", CLOCK)
    for sign in ("there", f"second-{again_at}"):
        while not (play.at / sign).exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    return process.wait(250)


def test_ranks_that_overrun_the_time_limit_are_not_waited_for(play: Play) -> None:
    """Of SLURM's KillWait after the first TERM, whatever comes meanwhile, the script keeps four seconds for itself."""
    play.env |= {"JOB": OVER, "KILL_WAIT": "9"}
    assert ended(play, "exec doze 250", again_at=4) == -signal.SIGTERM
    assert (play.at / "second-5").exists() and not (play.at / "second-6").exists()
    why = "the time limit came before the ranks had saved; raise slurm.signal_lead_s"
    assert play.history() == [["0", "crashed", "-", why, "lost"]] and play.asked("requeue") == 1


def test_ranks_that_save_just_after_the_time_limit_are_waited_for(play: Play) -> None:
    play.env |= {"JOB": OVER, "KILL_WAIT": "6000"}
    assert ended(play, 'doze 1; echo requeue SIGUSR2 >"$GAN_DIST_ATTEMPT/stopped"') == -signal.SIGTERM
    assert play.history() == [["0", "requeued", "-", "SIGUSR2"]]


def test_a_time_of_grace_is_the_ranks(play: Play) -> None:
    """A preemption with GraceTime sends TERM long before the end: there is more time than KillWait."""
    ranks = 'until [[ -e $PLAY/second-2 ]]; do doze 0.1; done; doze 1; echo requeue TERM >"$GAN_DIST_ATTEMPT/stopped"'
    assert ended(play, ranks) == -signal.SIGTERM
    assert play.history() == [["0", "requeued", "-", "TERM"]]


@pytest.mark.parametrize(
    ("end", "what", "status"),
    [("18:00:29", "requeued", -signal.SIGTERM), ("18:00:35", "cancelled", 75)],
    ids=["preempted", "cancelled while it saved for a preemption"],
)
def test_a_preemption_that_cancels_is_no_cancellation(play: Play, end: str, what: str, status: int) -> None:
    at = "2026-11-25T"
    play.env["JOB"] = (
        f"JobState=COMPLETING Reason=None Restarts=0 EndTime={at}{end} Deadline=N/A PreemptTime={at}18:00:28 S=None"
    )
    assert ended(play, 'echo requeue SIGTERM >"$GAN_DIST_ATTEMPT/stopped"; doze 0.5') == status
    assert [line[1] for line in play.history()] == [what]


def test_a_preemption_that_leaves_no_time_to_save_costs_no_crash(play: Play) -> None:
    at = "2026-11-25T18:00:28"
    play.env["JOB"] = f"JobState=COMPLETING Reason=None Restarts=0 EndTime={at} Deadline=N/A PreemptTime={at} S=None"
    assert ended(play, "exec doze 250") == -signal.SIGTERM
    assert play.history() == [["0", "lost", "-", "preempted before the ranks had saved"]]


def test_torchrun_is_one_task_a_node(play: Play) -> None:
    play.env |= {"SLURM_NTASKS": "4", "GAN_DIST_CODE": str(ROOT), "GAN_DIST_PYTHON": "true"}
    words = ["bash", str(ROOT / "slurm/train_torchrun.sbatch"), str(play.at / "run"), "small.yaml"]
    assert play.start(f"exec {shlex.join(words)}").wait(30) == 2
    log = (play.at / "log").read_text()
    assert "gan_dist: failed at -: " in log and "expected one task a node, found 4 on 2 node(s): torchrun" in log
    assert not (play.at / "srun").exists()
