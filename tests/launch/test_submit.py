"""Submitting against programs that stand in for SLURM's: what sbatch is given, and what is left when it goes wrong."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import socket
import stat
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import write_atomically
from launch import slurm, snapshot, submit
from launch.cli import cancel, pipeline, status_command, stop, tensorboard
from launch.cli import submit as submit_command
from launch.options import load_cluster
from launch.status import all_runs, status_lines
from launch.submit import prepare_array, submissions, submit_pipeline, submit_training
from launch.tensorboard import how_to_reach, serve


@dataclass
class Slurm:
    """A PATH that begins with programs of ours."""

    bin: Path

    def program(self, name: str, body: str) -> None:
        """Makes a program that writes its arguments down and then runs `body`, in this directory."""
        file = self.bin / name
        file.write_text(f'#!/bin/bash\ncd {self.bin} && echo "$*" >>{name}.calls\n{body}\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def calls(self, name: str) -> list[str]:
        """Returns the arguments of each call of a program."""
        file = self.bin / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []


SBATCH = """
cat >script-$(wc -l <sbatch.calls)
env -0 >environment-$(wc -l <sbatch.calls)
read -r _ _ _ _ _ session _ </proc/self/stat; echo $session >session
echo "7$(wc -l <sbatch.calls)"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A SLURM that takes every job, and a checkout of one file."""
    for name in ("bin", "checkout"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkout" / "code.py").touch()
    monkeypatch.setattr(snapshot, "CHECKOUT", tmp_path / "checkout")
    made = Slurm(tmp_path / "bin")
    for name in ("srun", "scontrol", "scancel", "squeue"):
        made.program(name, "")
    made.program("sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "UNHEARD_S", (0,))
    slurm._config.cache_clear()
    return made


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "art.yaml"
    file.write_text(yaml.safe_dump({"data": {"shards": str(tmp_path / "set")}}))
    return str(file)


def environment(fake: Slurm, number: int) -> dict[str, str]:
    """Returns what the `number`th sbatch found in its environment."""
    text = (fake.bin / f"environment-{number}").read_text()
    return dict(word.split("=", 1) for word in text.split("\0") if word and not word.startswith(("_=", "SHLVL=")))


def test_a_job_submitted_from_within_another_is_as_one_from_outside(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit_training(config, [], load_cluster(None), tmp_path / "a")
    foreign = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "9"}
    foreign |= {"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "8", "SLURM_EXPORT_ENV": "NONE", "SUBMITIT_FOLDER": "/x"}
    foreign |= {"SBATCH_MEM_BIND_TYPE": "local", "RANK": "3", "MASTER_PORT": "1", "GAN_DIST_ATTEMPT": "/x"}
    for key, value in foreign.items():
        monkeypatch.setenv(key, value)
    submit_training(config, [], load_cluster(None), tmp_path / "b")
    assert environment(fake, 1) == environment(fake, 2) and environment(fake, 1)["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_what_a_person_sets_for_sbatch_stands_where_the_cluster_file_says_nothing() -> None:
    mine = {"SBATCH_ACCOUNT": "art", "SBATCH_PARTITION": "old", "SBATCH_QOS": "low", "SBATCH_TIMELIMIT": "1"}
    mine |= {"SBATCH_MEM_PER_CPU": "1G", "SBATCH_GPUS": "1", "SBATCH_RESERVATION": "r", "SBATCH_CPUS_PER_GPU": "2"}
    broken = {"SBATCH_ARRAY_INX": "0-9", "SBATCH_NO_REQUEUE": "1", "SBATCH_OUTPUT": "o", "SBATCH_ERROR": "e"}
    broken |= {"SBATCH_WAIT": "1", "SBATCH_EXPORT": "NONE", "SBATCH_OPEN_MODE": "truncate", "SBATCH_SIGNAL": "USR1"}
    cluster = load_cluster(None, ["slurm.partition=new", "slurm.mem=9G", "slurm.gpus_per_node=2"])
    text = submit.training_batch(Path("/r"), Path("/r/launch/i"), cluster, "r")
    kept = {"SBATCH_ACCOUNT": "art", "SBATCH_QOS": "low", "SBATCH_RESERVATION": "r"}
    assert slurm.submission_environment(mine | broken | {"HOME": "/h"}, text) == kept | {"HOME": "/h"}
    text = submit.training_batch(Path("/r"), Path("/r/launch/i"), load_cluster(None), "r")
    named = {"SBATCH_TIMELIMIT", "SBATCH_CPUS_PER_GPU"}
    assert slurm.submission_environment(mine | broken, text).keys() == mine.keys() - named


def full(*words: object, **more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_leaves_no_job(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    line = rf"^cannot write the submission: No space left on device \({run}\); nothing is queued; free some space, or"
    with monkeypatch.context() as patch, pytest.raises(GanDistError, match=line):
        patch.setattr(snapshot, "take", full)
        submit_training(config, [], load_cluster(None), run)
    assert not run.exists() and not fake.calls("sbatch")
    monkeypatch.setattr(
        submit,
        "write_atomically",
        lambda path, text: (full if path.name == "job.json" else write_atomically)(path, text),
    )
    with pytest.raises(GanDistError, match=line):
        submit_training(config, [], load_cluster(None), run)
    assert not run.exists() and fake.calls("scancel") == ["71"]


def test_ctrl_c_in_the_moment_after_sbatch_takes_the_job_back(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("submitit.core.utils.JobPaths.move_temporary_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit_training(config, [], load_cluster(None), tmp_path / "run")
    assert fake.calls("scancel") == ["71"] and not (tmp_path / "run").exists()


INTERRUPTED = "kill -INT $PPID" + SBATCH


@pytest.fixture
def attended() -> Iterator[None]:
    """Signals as a terminal's programs find them: one that nohup or `&` started is deaf to HUP or INT, and rightly."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in slurm.INTERRUPTS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("attended")
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])  # a line that breaks is the last of them
def test_what_ends_a_submission_while_sbatch_works_takes_the_job_back(
    fake: Slurm, config: str, tmp_path: Path, name: str
) -> None:
    fake.program("sbatch", INTERRUPTED.replace("INT", name))
    with pytest.raises(KeyboardInterrupt if name == "INT" else SystemExit) as left:
        submit_training(config, [], load_cluster(None), tmp_path / "run")
    assert name == "INT" or getattr(left.value, "code", 0) == 128 + signal.Signals[f"SIG{name}"]
    assert set(fake.calls("scancel")) == {"71"} and not (tmp_path / "run").exists()
    assert int((fake.bin / "session").read_text()) != os.getsid(0)  # where a terminal's Ctrl-C does not reach


def test_ctrl_c_before_sbatch_is_asked_leaves_nothing(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path) -> None:
        assert not fake.calls("sbatch")  # or a job would be queued and in no book
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "commit_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit_training(config, [], load_cluster(None), tmp_path / "run")
    assert not fake.calls("sbatch") and not (tmp_path / "run").exists()


def test_sbatch_that_does_not_answer_is_one_line(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.program("sbatch", "exec sleep 300")
    monkeypatch.setattr(slurm, "SBATCH_S", 0.3)
    with pytest.raises(GanDistError, match=r"^sbatch did not answer within 0\.3 s; is the SLURM controller up\?"):
        submit_training(config, [], load_cluster(None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_submission_that_nohup_protects_is_made(fake: Slurm, config: str, tmp_path: Path) -> None:
    fake.program("sbatch", INTERRUPTED.replace("INT", "HUP"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        submit_training(config, [], load_cluster(None), tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not fake.calls("scancel") and (tmp_path / "run").exists()


def test_a_job_that_was_queued_although_sbatch_did_not_hear_of_it_is_found(
    fake: Slurm, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, directory and time: an earlier job of the run, and others' jobs, are not it."""
    run = tmp_path / "run"
    submit_training(config, [], load_cluster(None), run)
    fake.program(
        "sbatch", "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv' >&2; exit 1"
    )
    now, old = (time.strftime("%FT%T", time.localtime(time.time() - ago)) for ago in (0, 9000))
    rows = [f"71|{now}|run|{run}", f"80|{now}|other|{run}", f"81|{now}|run|/else", f"82|{old}|run|{run}"]
    fake.program("squeue", "\n".join(f"[[ $* == *%F* ]] && echo '{row}'" for row in [*rows, f"79|{now}|run|{run}"]))
    assert submit_training(config, [], load_cluster(None), run, alone=False).job == "79"
    assert submissions(run)[-1].submitted == now and "the queue has it as 79" in capsys.readouterr().err
    fake.program("squeue", "\n".join(f"[[ $* == *%F* ]] && echo '{row}'" for row in rows))
    with pytest.raises(
        GanDistError, match=r"whether the job is queued: .*Socket timed out.*; the queue does not have it"
    ):
        submit_training(config, [], load_cluster(None), run, alone=False)
    assert len(submissions(run)) == 2


def test_a_queue_that_does_not_answer_just_after_sbatch_takes_no_job_back(
    fake: Slurm, config: str, tmp_path: Path
) -> None:
    fake.program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    made = submit_training(config, [], load_cluster(None), tmp_path / "run", alone=False)
    assert (made.job, made.submitted) == ("71", None) and not fake.calls("scancel")


CLUSTER = "[[ $2 == config ]] && printf 'ClusterName = alpha\\nPrivateData = jobs,usage\\n'"


@pytest.mark.parametrize(
    ("row", "is_mine"),
    [
        ("71|RUNNING|1:00|n1|(None)|N/A|{now}|run|{run}", True),
        ("71|RUNNING|1:00|n1|(None)|N/A|{now}|other|{run}", False),
        ("71|RUNNING|1:00|n1|(None)|N/A|{now}|run|/elsewhere", False),
        ("71|RUNNING|1:00|n1|(None)|N/A|{old}|run|{run}", False),
        ("71|RUNNING|1:00|n1|(None)|N/A|{later}|run|{run}", False),
    ],
)
def test_a_job_of_the_same_id_is_another_unless_all_agree(
    fake: Slurm, config: str, tmp_path: Path, row: str, is_mine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fake.program("scontrol", CLUSTER)
    times = {
        f: time.strftime("%FT%T", time.localtime(time.time() + n)) for f, n in (("now", 0), ("old", -9), ("later", 9))
    }
    fake.program("squeue", f"echo '71|PENDING|1:00||(None)|N/A|{times['now']}|run|{run}'")
    submit_training(config, [], load_cluster(None), run, alone=False)
    assert (submissions(run)[0].cluster, submissions(run)[0].submitted) == ("alpha", times["now"])
    fake.program("squeue", f"echo '{row.format(run=run, **times)}'")
    if is_mine:
        with pytest.raises(UserError, match="has job 71 already"):
            submit_training(config, [], load_cluster(None), run)
        cancel(str(run))
    else:
        with pytest.raises(UserError, match="no job in the queue; nothing to cancel"):
            cancel(str(run))
        with pytest.raises(UserError, match="no job in the queue; nothing to stop"):
            stop(str(run))
        if "later" in row:  # once it has run, it may have been requeued, which gives it another time
            (run / "launch" / submissions(run)[0].id / "attempts").mkdir()
            cancel(str(run))
    assert bool(fake.calls("scancel")) == (is_mine or "later" in row)
    fake.program("scontrol", CLUSTER.replace("alpha", "beta"))  # the same directory, seen from another cluster
    slurm._config.cache_clear()
    before = len(fake.calls("scancel"))
    with pytest.raises(UserError, match="nothing to cancel"):
        cancel(str(run))
    assert "a job of cluster alpha, and this is beta" in "\n".join(status_lines(run))
    assert len(fake.calls("scancel")) == before


def test_what_slurm_shows_to_owners_only_is_not_taken_for_nothing(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fake.program("scontrol", CLUSTER)
    submit_training(config, [], load_cluster(None), run)
    fake.program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    monkeypatch.setattr(slurm, "user_name", lambda uid=None: "bob")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    owner = submissions(run)[0].user
    assert f"cannot be seen: SLURM shows jobs to their owners only (PrivateData); ask {owner}" in "\n".join(
        status_lines(run)
    )
    with pytest.raises(UserError, match=rf"has job 71 of {owner}, which SLURM shows to its owner only"):
        submit_training(config, [], load_cluster(None), run)
    with pytest.raises(UserError, match="cannot be seen from here"):
        cancel(str(run))
    stop(str(run))
    assert (run / "stop").exists() and "if it runs, it saves and ends now" in capsys.readouterr().out
    attempts = run / "launch" / submissions(run)[0].id / "attempts" / "71"
    attempts.mkdir(parents=True)
    (attempts / "history").write_text("0\tdone\tstep-00000009\t9\n")
    with pytest.raises(UserError, match="nothing to stop"):
        stop(str(run))
    submit_training(config, [], load_cluster(None), run)  # its end is written down
    fake.program("scontrol", CLUSTER.replace("jobs", "usage"))
    slurm._config.cache_clear()
    assert "without a recorded outcome" in "\n".join(status_lines(run))


def test_a_job_that_was_sent_to_another_cluster_is_asked_for_there_if_clusters_know_one_another(
    fake: Slurm, config: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fake.program(
        "scontrol", CLUSTER.replace("jobs,usage", "none\\nAccountingStorageType = accounting_storage/slurmdbd")
    )
    fake.program("sbatch", "echo '71;beta'")
    submit_training(config, [], load_cluster(None), run, alone=False)
    assert (submissions(run)[0].job, submissions(run)[0].cluster) == ("71", "beta")
    fake.program("squeue", "[[ $2 == beta ]] && echo 'CLUSTER: beta' && echo '71|RUNNING|1:00|n1|(None)|N/A'")
    assert "RUNNING on n1" in "\n".join(status_lines(run))
    cancel(str(run))
    assert fake.calls("scancel") == ["-M beta 71"] and fake.calls("squeue")[-1].startswith("-M beta -h -r -a")


def test_one_call_of_squeue_asks_for_all_runs_and_no_filter_of_a_person_reaches_it(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        submit_training(config, [], load_cluster(None), tmp_path / "runs" / name)
    for key in ("SQUEUE_STATES", "SQUEUE_PARTITION", "SCANCEL_STATE", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(key, "R")
    fake.program("squeue", "env >environment; echo '72|PENDING|1:00||(Priority)|N/A'")
    before = len(fake.calls("squeue"))
    status_command([str(tmp_path / "runs" / name) for name in ("a", "b", "c")])
    (call,) = fake.calls("squeue")[before:]
    assert call.endswith(" -j 71,72,73") and capsys.readouterr().out.count("PENDING (Priority)") == 1
    found = (fake.bin / "environment").read_text()
    assert not re.search(r"(?m)^(SQUEUE|SCANCEL)_", found) and "SLURM_TIME_FORMAT=standard\n" in found


@pytest.mark.usefixtures("attended")
@pytest.mark.parametrize("third", [INTERRUPTED, "echo no such partition >&2; exit 1", "exec sleep 300"])
def test_a_pipeline_that_cannot_be_submitted_whole_is_taken_back(
    fake: Slurm, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, third: str
) -> None:
    fake.program("sbatch", f"if (($(wc -l <sbatch.calls) > 2)); then\n{third}\nfi\n{SBATCH}")
    ask = slurm._sbatch

    def impatient_with_the_third(script: str) -> str:
        if len(fake.calls("sbatch")) == 2 and third.endswith("sleep 300"):
            monkeypatch.setattr(slurm, "SBATCH_S", 0.3)
        return ask(script)

    monkeypatch.setattr(slurm, "_sbatch", impatient_with_the_third)
    with pytest.raises((GanDistError, KeyboardInterrupt)):
        submit_pipeline(config, [], ["a.zip"], 2, load_cluster(None), tmp_path / "run")
    assert [job for job in fake.calls("scancel") if job != "73"] == ["71", "72"]


def test_a_pipeline_and_a_preparation_are_queued_once(fake: Slurm, config: str, tmp_path: Path) -> None:
    made = submit_pipeline(config, [], ["a.zip"], 2, load_cluster(None), tmp_path / "run")
    assert [(each.kind, each.job, each.after) for each in made] == [
        ("prepare", "71", None),
        ("train", "72", "71"),
        ("report", "73", "72"),
    ]
    assert [each.id for each in submissions(tmp_path / "run")] == [each.id for each in made]
    prepare_array(["a.zip"], tmp_path / "set", 2, load_cluster(None))
    fake.program("squeue", 'for job in 71 74; do echo "${job}_0|PENDING|1:00||(Priority)|N/A"; done')
    with pytest.raises(UserError, match=r"/run has job 71_0 already \(PENDING \(Priority\)\); wait for it, or end it"):
        submit_pipeline(config, [], ["a.zip"], 2, load_cluster(None), tmp_path / "run")
    with pytest.raises(UserError, match=r"/set\.launch has job 74_0 already"):
        prepare_array(["a.zip"], tmp_path / "set", 2, load_cluster(None))
    assert len(fake.calls("sbatch")) == 4


def test_paths_that_slurm_would_read_as_patterns_are_refused(fake: Slurm, config: str, tmp_path: Path) -> None:
    for out in ("100%job", "%N"):
        with pytest.raises(UserError, match="in a path is a pattern to SLURM and Submitit; choose another name"):
            prepare_array(["a.zip"], tmp_path / out, 2, load_cluster(None))
    submit_training(config, [], load_cluster(None), tmp_path / "100% art")
    assert len(fake.calls("sbatch")) == 1 and not list(tmp_path.glob("*%[jN]*"))


def test_printed_commands_can_be_pasted(
    fake: Slurm, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_command(config, run_dir=str(tmp_path / "my run"), unchecked=True)
    result = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[1:]]
    run = str(tmp_path / "my run")
    assert result == [["python", "-m", "launch", "status", run], ["python", "-m", "launch", "logs", "-f", run]]
    pipeline(config, source=["a.zip"], run_dir=str(tmp_path / "my pipe"), tasks=1)
    assert capsys.readouterr().out.endswith(f"launch status '{tmp_path / 'my pipe'}'\n")
    queue(fake, "71|RUNNING")
    stop(run)
    assert capsys.readouterr().out.endswith(f"launch status '{run}'\n")
    with pytest.raises(UserError, match=f"or end it: python -m launch stop '{run}'"):
        submit_command(config, run_dir=run, unchecked=True)


def test_runs_in_the_checkout_are_no_code(fake: Slurm, config: str, tmp_path: Path) -> None:
    home = tmp_path / "checkout" / "home"
    home.mkdir()
    (home / "words").touch()
    for run in (home / "a", tmp_path / "checkout" / "b", home / "a"):
        (run / "samples").mkdir(parents=True, exist_ok=True)
        (run / "samples" / "1.png").touch()
        made = submit_training(config, [], load_cluster(None, [f"job.runs={home}"]), run)
        assert zipfile.ZipFile(run / "launch" / made.id / "code.zip").namelist() == ["code.py", "gan_dist/COMMIT"]


def queue(fake: Slurm, *lines: str) -> None:
    fake.program("squeue", "\n".join(f"echo '{line}|1:00|node1|(None)|N/A'" for line in lines))


def test_stop_asks_training_and_cancels_what_does_not_train(
    fake: Slurm, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside, _ = prepare_array(["a.zip"], tmp_path / "set", 2, load_cluster(None))
    queue(fake, "71_0|RUNNING", "71_1|PENDING")
    stop(str(beside))
    assert capsys.readouterr().out == "job 71 (prepare) is cancelled; finished work is kept\n"
    assert fake.calls("scancel") == ["71"] and not (beside / "stop").exists()
    fake.program("squeue", "")
    run = tmp_path / "run"
    submit_pipeline(config, [], ["a.zip"], 2, load_cluster(None), run)
    queue(fake, "72_0|RUNNING", "73|PENDING", "74|PENDING")
    stop(str(run))
    assert fake.calls("scancel")[1:] == ["74", "--state=PENDING 73", "72"] and not (run / "stop").exists()
    queue(fake, "73|RUNNING", "74|PENDING")
    stop(str(run))
    assert fake.calls("scancel")[4:] == ["74"] and (run / "stop").exists()
    assert "job 73 is asked to save and end" in capsys.readouterr().out


def test_tensorboard_asks_for_little_of_what_training_asks_for() -> None:
    extra = "{gpus-per-task: 1, exclusive: true, mem-per-cpu: 9G, exclude: n7, reservation: art}"
    training = ["slurm.constraint=h100", "slurm.mem=200G", f"slurm.extra={extra}", "slurm.gres=gpu:4", "slurm.nodes=9"]
    cluster = load_cluster(None, [*training, "slurm.partition=gpu", "slurm.cpus_per_task=8", "slurm.qos=low"])
    open_keys = {"extra": {"exclude": "n7", "reservation": "art"}, "mem": None, "constraint": None, "gres": None}
    result = cluster.stage("tensorboard").model_dump()
    result_extra = result["extra"]
    assert open_keys.items() <= result.items() and (result["partition"], result["qos"]) == ("gpu", "low")
    assert (result["nodes"], result["cpus_per_task"], result["tasks_per_node"], result["gpus_per_node"]) == (1, 1, 1, 0)
    result = cluster.stage("tensorboard", {"slurm.mem", "slurm.cpus_per_task", "slurm.extra"}).model_dump()
    assert (result["mem"], result["cpus_per_task"], result["constraint"]) == ("200G", 8, None) and len(
        result["extra"]
    ) == 5
    stage = cluster.stage("report")
    assert (stage.constraint, stage.cpus_per_task, stage.mem) == ("h100", 8, None) and stage.extra == result_extra


def test_tensorboard_as_a_job_says_how_to_reach_it_or_why_it_ended(
    fake: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, file = tmp_path / "runs", tmp_path / "cluster.yaml"
    runs.mkdir()
    file.write_text("slurm: {partition: gpu}")
    way = how_to_reach(runs, 6007, "node1", "login", "ada")
    output = "\n".join(["loading module", "gan_dist: start 0", "and another", *way, "TensorBoard 2.21 at ..."])
    log = runs / ".tensorboard" / "logs" / "71-batch.log"
    fake.program("squeue", f"echo '71|RUNNING|1:00|node1|(None)|N/A'; cat >{log} <<'EOF'\n{output}\nEOF")
    tensorboard(str(runs), ["slurm.partition=cpu"], port=6007, cluster=str(file))
    assert capsys.readouterr().out.splitlines() == ["job 71; end it with: scancel 71", *way]
    script = (fake.bin / "script-1").read_text()
    assert script.endswith(f"-u -m launch tensorboard {runs} --port 6007\n") and "--partition=cpu\n" in script
    fake.program("squeue", "")
    fake.program("scontrol", "echo ' JobState=FAILED '")
    log.with_name("72-batch.log").write_text("gan_dist: start 0\nno module named tensorboard\n\n")
    with pytest.raises(GanDistError, match=r"job 72 has ended \(FAILED\): no module named tensorboard; see ") as caught:
        tensorboard(str(runs), cluster=str(file))
    assert caught.value.exit_status == 1
    with pytest.raises(UserError, match="no run was submitted in"):
        all_runs(str(runs))


def test_tensorboard_says_when_its_port_is_taken(tmp_path: Path) -> None:
    with (
        socket.socket() as other,
        pytest.raises(UserError, match=r"--port \d+ on .*: .*in use; leave it out for a free"),
    ):
        other.bind(("127.0.0.1", 0))
        other.listen()
        serve(tmp_path, other.getsockname()[1])


@pytest.mark.parametrize(
    ("scontrol", "sacct", "state"),
    [
        ("echo 'JobId=7 JobState=TIMEOUT Reason=TimeLimit'", "echo FAILED", "TIMEOUT"),
        ("echo 'Invalid job id' >&2; exit 1", "echo NODE_FAIL; echo", "NODE_FAIL"),
        ("exit 1", "echo 'CANCELLED by 0'", "CANCELLED by 0"),
        ("exit 1", "echo 'Slurm accounting storage is disabled' >&2; exit 1", ""),
        ("exit 1", "echo", ""),
        ("exit 1", None, ""),
    ],
)
def test_an_ended_job_is_asked_for_wherever_it_may_be_known(
    fake: Slurm, monkeypatch: pytest.MonkeyPatch, scontrol: str, sacct: str | None, state: str
) -> None:
    monkeypatch.setenv("PATH", str(fake.bin))
    fake.program("scontrol", scontrol)
    if sacct:
        fake.program("sacct", sacct)
    assert slurm.final_state(slurm.Job("7")) == state
    assert fake.calls("scontrol") == ["show job -o 7"]
    assert len(fake.calls("sacct")) == (state != "TIMEOUT" and sacct is not None)
