"""The batch script's half of the protocol, slurm/lib.sh, among programs that answer as SLURM's do."""

from __future__ import annotations

import os
import re
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
    read -r _ _ _ shell _ </proc/$PPID/stat # the step's parent is the batch script
    kill -TERM $shell ;;
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
    code: Path = ROOT
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
        setup = ("gan_dist_setup", before, "gan_dist_ready") if before else ()
        lines = (f"source {self.code}/slurm/lib.sh", f"gan_dist_begin {run} {submission}", *setup, body)
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


def start(play: Play, restart: int, ranks: str) -> int:
    """Returns the status of the job's start of this number."""
    play.env |= {"SLURM_RESTART_COUNT": str(restart), "JOB": f"JobState=RUNNING Reason=None Restarts={restart}"}
    return play.run(ranks)


def checkpoint(play: Play, step: int) -> str:
    """Returns the line by which ranks save a step."""
    folder = play.at / "run" / "checkpoints"
    return f"mkdir -p {folder}; echo step-{step:08d} >{folder}/latest"


STOPPED = 'echo requeue SIGUSR2 >"$GAN_DIST_ATTEMPT/stopped"'


def test_requeues_are_counted(play: Play) -> None:
    play.env["GAN_DIST_MAX_REQUEUES"] = "1"
    assert [start(play, number, STOPPED) for number in (0, 1)] == [-signal.SIGTERM, 75]
    assert [line[1:] for line in play.history()] == [
        ["requeued", "-", "SIGUSR2"],
        ["stopped", "-", "requeued 1 times (job.max_requeues); submit it again to go on"],
    ]


def test_starts_without_a_newer_checkpoint_end_the_run_and_progress_begins_the_count_anew(play: Play) -> None:
    ranks = [SEGV, SEGV, f"{checkpoint(play, 5)}; {SEGV}", STOPPED, SEGV, SEGV]
    assert [start(play, number, lines) for number, lines in enumerate(ranks)] == [-signal.SIGTERM] * 5 + [1]
    assert [line[1] for line in play.history()] == ["crashed"] * 3 + ["requeued", "crashed", "failed"]
    assert play.history()[-1][2:] == [
        "step-00000005",
        "no newer checkpoint in 3 starts (still at step-00000005), the last one: rank 1 on node2: Segmentation fault",
    ]
    began = (play.at / "run" / "launch" / "s" / "attempts" / "7" / "began").read_text().splitlines()
    assert [line.split("\t")[:2] for line in began[1:4]] == [["1", "-"], ["2", "-"], ["3", "step-00000005"]]


def test_starts_that_leave_no_word_are_counted_by_the_next_one(play: Play) -> None:
    """A node that dies takes the batch script with it; SLURM requeues the job, a hundred times if need be."""
    for number in range(3):
        play.env |= {"SLURM_RESTART_COUNT": str(number), "JOB": f"JobState=RUNNING Reason=None Restarts={number}"}
        process = play.start("touch $PLAY/up; exec doze 30")
        while not (play.at / "up").exists():
            time.sleep(0.02)
        (play.at / "up").unlink()
        process.kill()
        process.wait()
    assert start(play, 3, "touch $PLAY/began") == 1 and not (play.at / "began").exists()
    ((last, what, _, why),) = play.history()
    assert (last, what) == ("3", "failed") and why.startswith("no newer checkpoint in 3 starts, and the last of them")


def test_nothing_starts_where_it_cannot_be_written_down(play: Play) -> None:
    attempts = play.at / "run" / "launch" / "s" / "attempts"
    attempts.mkdir(parents=True)
    (attempts / "7").touch()
    assert play.run("touch $PLAY/ran") == 1 and not (play.at / "ran").exists()
    assert f"cannot write {attempts}/7" in (play.at / "log").read_text()
    (attempts / "7").unlink()
    (attempts / "7" / "history").mkdir(parents=True)  # so that the end cannot be written
    assert play.run("exit 3") == 1 and (play.at / "scontrol").read_text().count("requeue") == 0
    assert "cannot write down what becomes of the job" in (play.at / "log").read_text()


def test_a_full_disk_ends_the_run_and_says_so(play: Play) -> None:
    """It fills up while the ranks run: a line may still fit into a file that is there, and no file can be made."""
    full = "rm -f $GAN_DIST_ATTEMPT/verdict; mkdir $GAN_DIST_ATTEMPT/verdict; exit 3"
    assert play.run(full) == 1 and not play.asked("requeue")
    assert [line[1] for line in play.history()] == ["crashed", "failed"]
    assert (
        play.history()[-1][3].startswith("not requeued: cannot write ") and "free some space" in play.history()[-1][3]
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("python3", "no Python 3 on "), ("verdict", "the step that decides on it ended with status 1 (see this log)")],
)
def test_without_a_python_that_decides_nothing_is_requeued_and_the_log_says_so(
    play: Play, name: str, reason: str
) -> None:
    code = play.at / "code"
    shutil.copytree(ROOT / "launch" / "job", code / "launch" / "job", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm", code / "slurm")
    lib = (code / "slurm" / "lib.sh").read_text()
    if name == "python3":
        (code / "slurm" / "lib.sh").write_text(lib.replace("/usr/bin/python3 /usr/libexec/platform-python", ""))
        for program in ("python3", "python"):
            play.program(program, "exit 127")
    else:
        (code / "launch" / "job" / "verdict.py").write_text("raise RuntimeError('half a file')")
    play.code = code
    assert play.run("exit 3") == 1
    ((_, what, _, why),) = play.history()
    assert what == "failed" and why.startswith(f"not requeued: {reason}")
    assert "gan_dist: failed: not requeued" in (play.at / "log").read_text()
    assert not (play.at / "scontrol").exists() or not play.asked("requeue")


def test_no_signal_for_the_job_ends_a_step_before_it_has_come_to_ignore_it(tmp_path: Path) -> None:
    """A node's failure is told by TERM to all processes of the batch script, in the very moment in which it decides."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    steps = f"""
    source {ROOT}/slurm/lib.sh
    host_python={python} on_term=:
    trap : USR2 TERM
    (trap '' TERM; for n in {{1..20000}}; do kill -TERM 0; sleep 0.001; done) & storm=$!
    for n in {{1..100}}; do gan_dist_step finish; echo "ended $?"; done
    kill -KILL $storm
    """
    done = subprocess.run(["bash", "-c", steps], capture_output=True, text=True, start_new_session=True, timeout=90)
    assert done.stdout.splitlines() == ["ended 0"] * 100


def test_a_refusal_to_requeue_is_one(play: Play) -> None:
    (play.at / "refusals").write_text("no\n" * 6)
    assert play.run("exit 3") == 1 and play.asked("requeue") == 3
    assert play.history()[-1][3] == "SLURM refused to requeue the job; submit it again"


def test_a_setup_that_hides_slurm_and_python_does_not_hide_them_from_the_verdict(play: Play) -> None:
    only = play.at / "bin" / "only"
    only.mkdir(parents=True)
    for name in ("srun", "bash", "sed", "tee", "rm", "cat", "sleep"):
        (only / name).symlink_to(shutil.which(name, path=f"{play.at}/bin:{os.environ['PATH']}") or "")
    assert (
        play.run("exit 3", before=f"export PYTHONHOME=/nowhere LD_LIBRARY_PATH=/nowhere PATH={only}") == -signal.SIGTERM
    )
    assert play.history()[0][1] == "crashed" and play.asked("requeue") == 1


@pytest.mark.parametrize(
    ("setup", "why"),
    [
        ("true\nmodule load cuda/99\ntrue", "job.setup: module load cuda/99: status 127: .*module: command not found"),
        ("set -e\nmodule load cuda/99", "job.setup: module load cuda/99: status 127: .*module: command not found"),
        ("set -u\necho $NOWHERE", "job.setup: the script ended there: status 127: .*NOWHERE: unbound variable"),
        ("module() { echo no cuda/99 >&2; return 1; }\nmodule load cuda/99", "job.setup: .*: status 1: no cuda/99"),
        (
            "echo 'ModuleCmd_Load.c(213):ERROR:105: Unable to locate cuda/99' >&2",
            "job.setup: ModuleCmd_.* locate cuda/99",
        ),
        ("source /no/where.sh", "job.setup: source /no/where.sh: status 1: .*: No such file or directory"),
        ("exit 5", "job.setup: the script ended there: status 5: "),
    ],
)
def test_a_setup_that_fails_is_named_and_started_once(play: Play, setup: str, why: str) -> None:
    assert play.run("touch $PLAY/ran", before=setup) == 2 and not (play.at / "ran").exists()
    ((_, what, _, words),) = play.history()
    assert what == "failed" and re.fullmatch(why, words.strip() + (" " if why.endswith(" ") else "")), words


def test_the_end_is_told_once_and_no_requeue_is(play: Play) -> None:
    play.env["GAN_DIST_NOTIFY"] = 'echo "$GAN_DIST_RUN|$GAN_DIST_OUTCOME|$GAN_DIST_REASON" >>"$PLAY/told"; exit 3'
    assert start(play, 0, STOPPED) == -signal.SIGTERM and not (play.at / "told").exists()
    assert start(play, 1, f"{checkpoint(play, 5)}; echo 9 >$GAN_DIST_ATTEMPT/done") == 0
    assert (play.at / "told").read_text() == f"{play.at}/run|done|9\n"
    assert "gan_dist: job.notify failed: 3" in (play.at / "log").read_text()


def test_what_an_outer_job_left_behind_reaches_no_rank(play: Play) -> None:
    play.program("scontrol", SCONTROL.replace('"JobId=7 $JOB"', '"JobId=7 JobName=x UserId=u $JOB"'))
    play.env["JOB"] = "JobState=RUNNING Restarts=0 NumTasks=2 CPUs/Task=3 NtasksPerN:B:S:C=1:0:*:* TRES=cpu=6"
    stale = {"SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_MEM_PER_CPU": "100", "SLURM_STEP_ID": "3", "PMI_RANK": "1"}
    stale |= {"SLURM_RESTART_COUNT": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "2", "RANK": "3"}
    stale |= {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "SLURM_GPUS_PER_NODE": "4", "PET_NNODES": "2"}
    play.env |= {**stale, "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "64", "SLURM_NTASKS_PER_NODE": "9"}
    assert play.run('echo 20 >"$GAN_DIST_ATTEMPT/done"') == 0
    found = dict(line.split("=", 1) for line in (play.at / "environment").read_text().splitlines() if "=" in line)
    assert not stale.keys() & found.keys()
    names = ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    assert [found[name] for name in names] == ["3", "2", "1"]
    assert play.history() == [["0", "done", "-", "20"]]  # and not of array 4


def ended(play: Play, ranks: str) -> int:
    """Returns the status of a batch script that SLURM tells to end while its ranks run, and again a second later."""
    process = play.start(f"gan_dist_srun bash -c {shlex.quote(f'touch $PLAY/there; {ranks}')}\ngan_dist_finish $?")
    while not (play.at / "there").exists() and process.poll() is None:
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
    return process.wait(60)


def test_ranks_that_overrun_the_time_limit_are_not_waited_for(play: Play) -> None:
    """Of SLURM's KillWait after the first TERM, whatever comes meanwhile, the script keeps five seconds for itself."""
    play.env |= {"JOB": OVER, "KILL_WAIT": "8"}
    began = time.monotonic()
    assert ended(play, "exec doze 250") == 75 and 2 < time.monotonic() - began < 8
    why = "the time limit came before the ranks had saved; raise slurm.signal_lead_s"
    assert play.history() == [["0", "crashed", "-", why, "lost"]] and play.asked("requeue") == 1


def test_ranks_that_save_just_after_the_time_limit_are_waited_for(play: Play) -> None:
    play.env |= {"JOB": OVER, "KILL_WAIT": "6000"}
    assert ended(play, f"doze 3; {STOPPED}") == 75
    assert play.history() == [["0", "requeued", "-", "SIGUSR2"]] and play.asked("requeue") == 1


def test_a_busy_node_requeues_before_anything_else(play: Play) -> None:
    """KillWait may end while ranks are waited for, or before anything is written down: the job goes on all the same."""
    play.env |= {"JOB": OVER, "KILL_WAIT": "6000"}
    process = play.start("gan_dist_srun bash -c 'touch $PLAY/there; exec doze 250'")
    while not (play.at / "there").exists():
        time.sleep(0.02)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):  # the last two at once
        process.send_signal(number)
    while not play.asked("requeue"):
        time.sleep(0.02)
    process.kill()
    process.wait()
    asked = (play.at / "scontrol").read_text().splitlines()
    assert asked[:3] == ["show job -o 7", "show job -o 7", "requeue 7"], asked  # the first is of the script's beginning


@pytest.mark.parametrize(
    ("word", "outcome", "status"),
    [("9 >$GAN_DIST_ATTEMPT/done", "done", 0), ("end a stop file >$GAN_DIST_ATTEMPT/stopped", "stopped", 75)],
)
def test_a_requeue_that_came_too_early_is_taken_back(play: Play, word: str, outcome: str, status: int) -> None:
    play.program("scancel", 'echo "$*" >>"$PLAY/scancel"')
    play.env |= {"JOB": OVER, "KILL_WAIT": "6000"}
    assert ended(play, f"doze 3; echo {word}") == status and play.asked("requeue") == 1
    assert play.history()[0][1] == outcome and (play.at / "scancel").read_text() == "7\n"


def test_a_time_of_grace_is_the_ranks(play: Play) -> None:
    """A preemption with GraceTime sends TERM long before the end: there is more time than KillWait."""
    assert ended(play, f"doze 4; {STOPPED}") == -signal.SIGTERM
    assert play.history() == [["0", "requeued", "-", "SIGUSR2"]]


@pytest.mark.parametrize(
    ("end", "what", "status"),
    [("18:00:29", "requeued", 75), ("18:00:35", "cancelled", 75)],
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
    assert ended(play, "exec doze 250") == 75
    assert play.history() == [["0", "lost", "-", "preempted before the ranks had saved"]]


def test_torchrun_is_one_task_a_node(play: Play) -> None:
    play.env |= {"SLURM_NTASKS": "4", "GAN_DIST_CODE": str(ROOT), "GAN_DIST_PYTHON": "true"}
    words = ["bash", str(ROOT / "slurm/train_torchrun.sbatch"), str(play.at / "run"), "small.yaml"]
    assert play.start(f"exec {shlex.join(words)}").wait(30) == 2
    log = (play.at / "log").read_text()
    assert "gan_dist: failed at -: " in log and "expected one task a node, found 4 on 2 node(s): torchrun" in log
    assert not (play.at / "srun").exists()
