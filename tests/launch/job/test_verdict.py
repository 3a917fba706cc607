"""Every row of the verdict's table, which row comes first, and what no history can get past."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.job import environment, finish, verdict
from launch.job.verdict import Facts, Start, may_begin

JOB = Path(verdict.__file__).parent
RUNNING = Facts(state="RUNNING", status=1, progress=20, mark="step-00000020", cause="rank 1 on b: Killed")
STUCK = [Start(number, 20, "crashed") for number in range(3)]
"""Three starts from the same checkpoint, the last of which is judged."""
FRESH = [Start(0, 0, "crashed"), Start(1, 10)]
LIMIT = RUNNING._replace(reason="TimeLimit", state="COMPLETING")
SAVED = RUNNING._replace(stopped="requeue SIGUSR2", status=0)
BY_HAND = RUNNING._replace(stopped="end the file /r/stop", status=0)
GRACE = RUNNING._replace(preempted=True, state="COMPLETING")
SEVENTH = RUNNING._replace(restart=7, restarts=7, max_requeues=7)
TABLE = [
    (1, RUNNING._replace(done="120", restarts=9), STUCK, ("end", "done", "120", 0)),
    (2, RUNNING._replace(restarts=1), STUCK, ("end", "lost", "SLURM requeued the job: rank 1 on b: Killed", 75)),
    (2, SAVED._replace(restarts=1), FRESH, ("end", "lost", "SLURM requeued the job: saved and stopped by SIGUSR2", 75)),
    (
        3,
        RUNNING._replace(state="", status=3),
        FRESH,
        ("end", "lost", "SLURM's controller does not answer from here", 3),
    ),
    (
        4,
        RUNNING._replace(state="CANCELLED"),
        FRESH,
        ("end", "cancelled", "SLURM ended the job (CANCELLED) before the ranks had saved", 1),
    ),
    (4, SAVED._replace(state="CANCELLED"), FRESH, ("end", "cancelled", "saved and stopped by SIGUSR2", 75)),
    (5, BY_HAND, STUCK, ("cancel", "stopped", "the file /r/stop", 75)),
    (6, RUNNING._replace(fault="usage"), FRESH, ("end", "failed", "rank 1 on b: Killed", 2)),
    (7, SEVENTH, FRESH, ("end", "failed", "requeued 7 times (job.max_requeues), the last one: rank 1 on b: Killed", 1)),
    (
        7,
        SEVENTH._replace(stopped="requeue SIGUSR2"),
        FRESH,
        ("end", "stopped", "requeued 7 times (job.max_requeues); submit it again to go on", 75),
    ),
    (8, GRACE, STUCK, ("requeue", "lost", "preempted before the ranks had saved", 75)),
    (9, RUNNING._replace(suspended=True), STUCK, ("requeue", "lost", "suspended for longer than its ranks wait", 75)),
    (
        10,
        RUNNING,
        STUCK,
        ("end", "failed", "no newer checkpoint in 3 starts (still at step-00000020), the last one: rank 1 on b: K", 1),
    ),
    (10, SAVED, STUCK, ("end", "failed", "no step in 3 starts; raise slurm.time or lower slurm.signal_lead_s", 1)),
    (10, LIMIT, STUCK, ("end", "failed", "no newer checkpoint in 3 starts", 1)),
    (
        10,
        RUNNING._replace(cause="rank 0 on a: No space left on device", max_starts=2),
        STUCK[1:],
        ("end", "failed", "no newer checkpoint in 2 starts", 1),
    ),
    (11, SAVED, FRESH, ("requeue", "requeued", "SIGUSR2", 75)),
    (11, SAVED._replace(state="COMPLETING", reason="TimeLimit"), FRESH, ("requeue", "requeued", "SIGUSR2", 75)),
    (11, SAVED._replace(state="COMPLETING", preempted=True), FRESH, ("requeue", "requeued", "SIGUSR2", 75)),
    (12, RUNNING, FRESH, ("requeue", "crashed", "rank 1 on b: Killed", 75)),
    (12, RUNNING, [Start(0, 20, "lost"), *STUCK[:2]], ("requeue", "crashed", "rank 1 on b: Killed", 75)),
    (
        12,
        LIMIT._replace(fault="usage"),
        FRESH,
        ("requeue", "crashed", "the time limit came before the ranks had saved; raise slurm.signal_lead_s", 75),
    ),
]


@pytest.mark.parametrize(("row", "facts", "history", "expected"), TABLE)
def test_every_row_of_the_table(
    row: int, facts: Facts, history: list[Start], expected: tuple[str, str, str, int]
) -> None:
    decision, outcome, words, status = verdict.verdict(facts, history)
    assert (decision, outcome, status) == (expected[0], expected[1], expected[3]) and words.startswith(expected[2])
    # The row of the docstring says the same.
    found = re.search(rf"(?m)^ +{row} .*? (requeue|end|cancel) +(\w+) ", verdict.__doc__ or "")
    assert found and found[1] == decision and (found[2] == outcome or row == 7)


def test_the_table_names_every_row_once_and_each_is_tested() -> None:
    rows = [int(number) for number in re.findall(r"(?m)^ +(\d+) ", verdict.__doc__ or "")]
    source = (JOB / "verdict.py").read_text()
    coded = [int(number) for number in re.findall(r"# (\d+)$", source, re.MULTILINE)]
    assert rows == sorted(set(coded)) == sorted({row for row, *_ in TABLE}) == list(range(1, 13))
    assert coded == sorted(coded)  # the first row that holds is the first that is asked


def test_a_full_disk_says_what_to_free() -> None:
    facts = RUNNING._replace(cause="rank 0 on a: cannot save: [Errno 28] No space left on device")
    assert verdict.verdict(facts, STUCK).words.endswith(
        "device; free some space or raise the quota, then submit it again"
    )
    staged = SAVED._replace(stopped="requeue SIGUSR2, while data were fetched")
    assert "while data were fetched" in verdict.verdict(staged, STUCK).words


STARTS = st.tuples(
    st.integers(0, 1),  # checkpoints it adds
    st.sampled_from(["RUNNING", "COMPLETING"]),
    st.sampled_from(["None", "TimeLimit"]),
    st.sampled_from([None, "requeue SIGUSR2", "requeue SIGUSR2, while data were fetched"]),
    st.sampled_from(["lost", "error"]),
    st.booleans(),  # it leaves no word: its node died
)


@given(st.lists(STARTS, min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 20))
def test_no_history_goes_on_for_ever(
    starts: list[tuple[int, str, str, str | None, str, bool]], k: int, most: int
) -> None:
    """However its starts end, a job makes at most k of them in a row without a newer checkpoint, and so many in all."""
    history: list[Start] = []
    progress = idle = 0
    for restart, (steps, state, reason, stopped, fault, silent) in enumerate(starts):
        if may_begin(history, progress, restart, k, most) is not None:
            return
        history.append(Start(restart, progress))
        assert restart <= most and idle < k
        progress += steps
        idle = 0 if steps else idle + 1
        if silent:
            continue
        facts = Facts(restart, 1, progress, "-", None, stopped, "it broke", fault, state, reason, restart)
        ending = verdict.verdict(facts._replace(max_starts=k, max_requeues=most), history)
        history[-1] = history[-1]._replace(outcome=ending.outcome)
        if ending.decision != "requeue":
            return


# What finish.py reads.


def attempt(tmp_path: Path, **files: str) -> Path:
    """Returns the directory of a start with these files."""
    made = tmp_path / "attempts" / "7" / "0"
    made.mkdir(parents=True)
    for name, text in files.items():
        (made / name.replace("__", "-").replace("srun_err", "srun.err")).write_text(text)
    return made


@pytest.mark.parametrize(
    ("files", "fault", "words"),
    [
        (
            {"failed__0": "2\t1\terror\t0\ta\tlate\n", "failed__1": "1\t1\terror\t1\tb\tfirst\n"},
            "error",
            "rank 1 on b: first",
        ),
        ({"failed__0": "1\t2\terror\t0\ta\tno set\n"}, "usage", "rank 0 on a: no set"),
        ({"failed__preflight": "1\t2\terror\t-\ta\tno Python\n"}, "usage", "no Python"),
        (
            {
                "failed__0": "1\t1\tlost\t0\ta\trank 1 on b was lost\n",
                "srun_err": "srun: error: b: task 1: Killed\nsrun: Terminating job step 7.0\n",
            },
            "lost",
            "rank 1 on b: Killed",
        ),
        ({"failed__0": "1\t1\tlost\t0\ta\trank 1 on b was lost\n"}, "lost", "rank 1 on b was lost"),
        ({"srun_err": "srun: fatal: SLURM_MEM_PER_CPU, x\n"}, "usage", "srun: fatal: SLURM_MEM_PER_CPU, x"),
        ({"srun_err": "srun: error: Unable to create step\n"}, "lost", "srun: error: Unable to create step"),
        ({}, "lost", "srun ended with status 3"),
        (
            {"srun_err": "srun: error: a.b.c: tasks 1-2: Exited with exit code 1\n", "running": ""},
            "lost",
            "rank 1 on a.b.c ended, its last line: no libcuda",
        ),
        (
            {"srun_err": "srun: error: a.b.c: task 1: Exited with exit code 1\n"},
            "usage",
            "rank 1 on a.b.c ended before it began (job.python, job.container, job.setup): no libcuda",
        ),
        (
            {"srun_err": "slurmstepd: error: execve(): x\nsrun: error: a: task 4: Exited with exit code 2\n"},
            "usage",
            "rank 4 on a ended before it began (job.python, job.container, job.setup): slurmstepd: error: execve(): x",
        ),
    ],
)
def test_the_cause_is_named_by_who_knows_best(files: dict[str, str], fault: str, words: str, tmp_path: Path) -> None:
    at = attempt(tmp_path, **files)
    (tmp_path / "7-0-a-1.log").write_text("hello\nno libcuda\n\n")  # of a.b.c: srun shortens the host's name
    found = finish.cause(at, str(tmp_path / "7-0"), 3)
    assert (found[0], found[1][: len(words)]) == (fault, words)


LINE = "JobId=7 JobName=x JobState=FAILED UserId=u(0) GroupId=g JobState=RUNNING Reason=None Restarts=2 "


def test_facts_are_what_the_controller_and_the_files_say(tmp_path: Path) -> None:
    at = attempt(tmp_path, facts=f"job=7\nrestart=2\nstatus=0\nrun={tmp_path}\noutput=\nlog=\nmax_crashes=4\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000120\n")
    (at / "stopped").write_text("requeue SIGUSR2\n")
    (at.parent / "began").write_text("0\t-\t1\ta\n1\tstep-00000100\t2\ta\n2\tstep-00000120\t3\ta\n")
    (at.parent / "history").write_text("0\tcrashed\tstep-00000100\tx\tlost\n")
    facts, history = finish.read_facts(at, LINE + "StartTime=2026-11-25T18:00:00 SuspendTime=2026-11-25T17:00:00 S=0")
    assert facts[:4] == (2, 0, 120, "step-00000120") and facts.stopped == "requeue SIGUSR2" and facts.done is None
    assert (facts.state, facts.reason, facts.restarts, facts.max_starts) == ("RUNNING", "None", 2, 5)
    assert history == [Start(0, 0, "crashed"), Start(1, 100), Start(2, 120)]
    assert not facts.preempted and not facts.suspended  # an earlier start was
    facts, _ = finish.read_facts(at, LINE + "StartTime=2026-11-25T18:00:00 SuspendTime=2026-11-25T18:00:09 S=0")
    assert facts.suspended
    (tmp_path / "stop").touch()  # a person asked for an end while the cluster stopped the start
    assert finish.read_facts(at, LINE)[0].stopped == f"end the file {tmp_path / 'stop'}"
    (tmp_path / "shard-00000.tar").touch()
    assert finish.read_progress(tmp_path, str(tmp_path)) == (1, "1 shards")


def test_a_controller_that_is_down_is_asked_again_and_one_that_refuses_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, asked = attempt(tmp_path, facts=f"job=7\nrestart=0\nrun={tmp_path}\noutput=\n"), [""]
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def call(words: list[str], **more: object) -> int:
        asked.append(words[1])
        return int(asked.count("requeue") < 7 if words[1] == "requeue" else down)

    monkeypatch.setattr("subprocess.call", call)
    down = True
    assert finish.requeue(at) and asked.count("requeue") == 7 and waits == [1, 2, 3, 4, 5, 6]
    down, asked[:] = False, []
    assert not finish.requeue(at) and asked.count("requeue") == 3
    assert "SLURM refused to requeue" in (at.parent / "history").read_text()


@pytest.mark.parametrize("name", ["verdict", "finish", "environment"])
def test_the_steps_run_on_an_old_python_without_anything_else(name: str) -> None:
    tree = ast.parse((JOB / f"{name}.py").read_text(), feature_version=(3, 6))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert all(
        f"{module}".split(".")[0] in sys.stdlib_module_names or module == "launch.job.verdict" for module in modules
    )
    words = [sys.executable, "-ISB", str(JOB / f"{name}.py"), "term", "/nowhere", "1"]
    if name != "finish":
        assert subprocess.run(words, check=False, capture_output=True).returncode == 0


def test_a_variable_is_dropped_or_corrected_by_what_the_controller_says() -> None:
    env = {
        "SLURM_ARRAY_JOB_ID": "1",
        "SLURM_ARRAY_TASK_ID": "9",
        "SLURM_GPUS_PER_TASK": "1",
        "SLURM_GPUS_PER_NODE": "2",
    }
    env |= {"SLURM_HINT": "nomultithread", "SLURM_JOB_ID": "8", "HOME": "/h", "SLURM_CPUS_PER_TASK": "4"}
    line = "JobId=8 ArrayJobId=5 ArrayTaskId=2 JobName=a TresPerNode=gpu:3 UserId=u(0) JobState=RUNNING Restarts=0 "
    element = environment.corrections(env, line + "CPUs/Task=4 TRES=cpu=4,gres/gpu=2 TresPerNode=gres:gpu:2")
    assert element == {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_GPUS_PER_TASK": None}
    plain = environment.corrections(env, "JobId=8 JobName=gpu ArrayTaskId=2 UserId=u(0) JobState=RUNNING TRES=cpu=4")
    assert plain == dict.fromkeys(name for name in env if name.startswith(("SLURM_ARRAY", "SLURM_GPU")))
    assert environment.corrections(env, "") == {}  # sbatch's own --hint, for all that is known
    assert environment.corrections({**env, "SLURM_STEP_ID": "0"}, "") == {"SLURM_STEP_ID": None, "SLURM_HINT": None}
    shares = {"SLURM_CPUS_PER_GPU": "6", "SLURM_TRES_PER_TASK": "cpu:6", "SLURM_CPUS_PER_TASK": "4"}
    assert environment.corrections(shares, line + "CPUs/Task=4") == {
        "SLURM_CPUS_PER_GPU": None,
        "SLURM_TRES_PER_TASK": None,
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "2",
    }
    mine = "JobId=8 JobName=a UserId=u(0) CPUs/Task=4 CpusPerTres=gpu:6 TresPerTask=cpu:6"
    assert environment.corrections(shares, mine) == {}
    assert environment.of_other_jobs("SLURM_CPU_BIND") and environment.of_other_jobs("PET_NNODES")
    assert not environment.of_other_jobs("SLURM_CONF") and not environment.of_other_jobs("RANKED")


@pytest.mark.parametrize(
    ("key", "found"), [("max_starts", "three"), ("max_requeues", "-1"), ("max_crashes", "2.5"), ("max_crashes", "2")]
)
def test_a_bound_that_is_no_number_is_named_before_anything_starts(tmp_path: Path, key: str, found: str) -> None:
    at = attempt(tmp_path, facts=f"job=7\nrestart=0\nrun={tmp_path}\noutput=\n{key}={found}\n")
    ending = finish.begin(at)
    assert (ending.decision == "begin") == found.isdigit()
    if ending.decision != "begin":
        assert (ending.decision, ending.status) == ("end", 2)
        line = f"0\tfailed\t-\tGAN_DIST_{key.upper()}: expected a number, found {found}\n"
        assert (at.parent / "history").read_text() == line
