"""Batch scripts against recorded text; what options refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gan_dist.config.schema import load_config, to_yaml
from gan_dist.utils.errors import UserError
from launch.batch_script import Batch, batch_script, interpreter
from launch.options import SlurmOptions, load_cluster, split_overrides
from launch.submit import refuse_changes, resolve_parent, training_batch

RECORDED = Path(__file__).parent / "recorded"
ROOT = Path(__file__).parents[2]
GPUS = """
slurm:
  account: art
  partition: gpu
  constraint: "a100|h100"
  nodes: 2
  gpus_per_node: 4
  cpus_per_task: 8
  mem: 200G
  time: "1-00:00:00"
  signal_lead_s: 300
  extra: {exclude: "node7,node9", exclusive: true}
job:
  python: /opt/env/bin/python
  setup: ["module load cuda/12.8"]
  env: {NCCL_SOCKET_IFNAME: ib0, GREETING: "it's fine"}
  container: apptainer exec --nv image.sif
  max_requeues: 7
"""


def cluster_file(tmp_path: Path, text: str = GPUS) -> str:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return str(file)


def test_the_batch_script_is_the_recorded_one(tmp_path: Path) -> None:
    run = Path("/scratch/runs/100% art")
    text = training_batch(
        run, run / "launch" / "20261123-120000-abcdef", load_cluster(cluster_file(tmp_path)), run.name
    )
    recorded = RECORDED / "train.sh"
    if os.environ.get("RECORD"):
        recorded.write_text(text)
    assert text == recorded.read_text()


def test_code_that_is_to_be_unpacked_is_that_of_its_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "launch" / "1"
    scripts = [
        training_batch(tmp_path / "run", folder, load_cluster(None, words), "run")
        for words in ([], ["job.unpack=true"])
    ]
    packed, unpacked = (
        {line for line in script.splitlines() if "lib.sh" in line or "PYTHONPATH" in line} for script in scripts
    )
    assert packed == {
        f"source {folder}/slurm/lib.sh",
        f"export PYTHONPATH={folder}/code.zip${{PYTHONPATH:+:$PYTHONPATH}}",
    }
    code = folder / "code"  # as in a checkout, lib.sh finds the steps of launch/job two folders above itself
    assert unpacked == {f"source {code}/slurm/lib.sh", f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"}


def test_the_dry_run_prints_the_batch_script_and_makes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "art.yaml"
    config.write_text(yaml.safe_dump({"data": {"shards": str(tmp_path / "set")}}))
    words = ["submit", str(config), "slurm.nodes=3", "--dry-run", "--cluster", cluster_file(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    (name,) = set(re.findall(r"launch/(\d{8}-\d{6}-[0-9a-f]{6})", done.stdout))
    options = load_cluster(cluster_file(tmp_path), ["slurm.nodes=3"])
    assert done.stdout == training_batch(tmp_path / "run", tmp_path / "run" / "launch" / name, options, "run")
    assert "#SBATCH --nodes=3\n" in done.stdout and not (tmp_path / "run").exists()


def test_arrays_and_dependencies_are_in_the_header(tmp_path: Path) -> None:
    batch = Batch("prepare", Path("/r"), Path("/r/launch/i"), ("true",), array=8, after="12:13")
    text = batch_script(batch, load_cluster(None))
    assert "#SBATCH --array=0-7\n" in text and "#SBATCH --output=/r/logs/%A_%a-batch.log\n" in text
    assert "#SBATCH --dependency=afterok:12:13\n" in text and "#SBATCH --kill-on-invalid-dep=yes\n" in text


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (90, 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("24:00:00", 86400),  # of which YAML 1.1 would make 86400, here minutes
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-00:00:01", 86401),
    ],
)
def test_times_mean_what_slurm_means(time: str | int, seconds: int) -> None:
    assert SlurmOptions(time=time, signal_lead_s=10).seconds == seconds
    assert load_cluster(None, [f"slurm.time={time}", "slurm.signal_lead_s=10"]).slurm.time == time


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["slurm.partion=gpu"], "unknown key slurm.partion; did you mean slurm.partition?"),
        (["slurm.nodes=many"], "slurm.nodes: expected integer, or a range such as 2-4, found 'many'"),
        (["prepare.slurm.tim=3"], "unknown key prepare.slurm.tim; did you mean prepare.slurm.time?"),
        (["report.slurm.time=x"], "report.slurm.time: expected minutes or [days-]hours:minutes:seconds, found 'x'"),
        (["slurm.extra.signal=3"], "slurm.extra: signal is reserved for saving and requeueing; leave it out"),
        (["slurm.nodes=4-2"], "slurm.nodes: expected integer, or a range such as 2-4, found '4-2'"),
        (
            ["slurm.gpus_per_node=a100"],
            "slurm.gpus_per_node: expected integer, or a type with its number (a100:4), found",
        ),
        (
            ["slurm.extra={ntasks: 8}"],
            "slurm.extra: ntasks leaves open how many ranks there are; set slurm.tasks_per_node",
        ),
        (["slurm.nodes=0"], "slurm.nodes: expected greater than or equal to 1, found 0"),
        (["slurm.time=tomorrow"], "slurm.time: expected minutes or [days-]hours:minutes:seconds, found 'tomorrow'"),
        (["slurm.time=1", "slurm.signal_lead_s=60"], "slurm.signal_lead_s: 60 s is all of slurm.time (60 s); lower it"),
        (["slurm.gres=gpu:4", "slurm.gpus_per_node=4"], "slurm.gres: slurm.gpus_per_node requests GPUs already"),
        (["slurm.extra={requeue: true}"], "slurm.extra: requeue is reserved for saving and requeueing"),
        (["slurm.time=1.5"], "slurm.time: expected minutes or [days-]hours:minutes:seconds, found 1.5"),
        (["slurm.time="], "slurm.time: expected minutes or [days-]hours:minutes:seconds, found None"),
        (["job.env={A: 1}"], "job.env.A: expected string, found 1"),
        (["job.env={A B: x}"], "job.env: expected names of variables such as NCCL_DEBUG, found 'A B'"),
        (["job.env.A=x"], "unknown key job.env.A; job.env is one key and set whole"),
        (
            ["job.python=$NOT_SET/python"],
            "job.python: the environment variable NOT_SET is not set; set it or write $NOT",
        ),
        (["job.container=run ${NOT_SET}/i.sif"], "job.container: the environment variable NOT_SET is not set; set it"),
        (["job.container=apptainer exec 'x"], "job.container: expected words as for a shell, found"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_cluster(None, words)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("python", "container", "words"),
    [
        (".venv/bin/python", None, ["HERE/.venv/bin/python"]),
        ("~/x/bin/python", None, ["/home/ada/x/bin/python"]),
        ("$ENVS/p/bin/python", None, ["/envs/p/bin/python"]),
        ("python3.12", None, ["python3.12"]),
        ("bin/python", "./wrapit", ["HERE/wrapit", "bin/python"]),
        (
            "/opt/python",
            "apptainer exec --nv image.sif",
            ["apptainer", "exec", "--nv", "HERE/image.sif", "/opt/python"],
        ),
        (
            "p",
            "exec exec -B $ENVS:/e ~/i.sif not.there",
            ["exec", "exec", "-B", "/envs:/e", "/home/ada/i.sif", "not.there", "p"],
        ),
        ("p", """bash -c 'exec "$0" "$RANK"'""", ["bash", "-c", 'exec "$0" "$RANK"', "p"]),
        (None, None, ["/submits/python"]),
    ],
)
def test_paths_of_a_job_mean_what_they_mean_where_it_is_submitted(
    python: str | None, container: str | None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("ENVS", "/envs")
    monkeypatch.delenv("RANK", raising=False)
    for name in ("wrapit", "image.sif", "exec"):
        (tmp_path / name).touch()
    file = cluster_file(tmp_path, yaml.safe_dump({"job": {"python": python, "container": container}}))
    command = interpreter(load_cluster(file), "/submits/python")
    assert command == [word.replace("HERE", str(tmp_path)) for word in words]


def test_a_cluster_file_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"cluster\.yaml: unknown key slurm\.gpu_per_node; did you mean slurm\.gpus_per_"
    ):
        load_cluster(cluster_file(tmp_path, "slurm: {gpu_per_node: 4}"))
    with pytest.raises(UserError, match="expected a YAML file such as configs/clusters/slurm"):
        load_cluster(tmp_path / "nowhere.yaml")


def test_a_file_is_not_blamed_for_an_override(tmp_path: Path) -> None:
    file = cluster_file(tmp_path, "slurm: {time: 9}")
    with pytest.raises(UserError, match=r"^slurm\.signal_lead_s: 600 s is all of slurm\.time \(540 s\); lower it, or"):
        load_cluster(file, ["slurm.signal_lead_s=600"])
    with pytest.raises(UserError, match=r"^slurm\.signal_lead_s: 120 s is all of slurm\.time \(60 s\)"):
        load_cluster(file, ["slurm.time=1"])


def test_overrides_of_the_cluster_and_of_the_trainer_are_separated() -> None:
    words = ["slurm.nodes=4", "train.global_batch=256", "job.runs=/r", "seed=1", "slurm.tar"]
    theirs = ["train.global_batch=256", "seed=1", "slurm.tar"]
    assert split_overrides(words) == (["slurm.nodes=4", "job.runs=/r"], theirs)


def test_the_cluster_file_that_comes_with_the_checkout_says_the_defaults_it_names() -> None:
    options = load_cluster(ROOT / "configs/clusters/slurm.yaml")
    assert options.slurm.ranks_per_node == 4 and options.job == load_cluster(None).job
    assert load_cluster(None, ["slurm.gres=gpu:a100:3"]).slurm.ranks_per_node == 3


def test_a_stage_inherits_neither_gpus_nor_memory_nor_whole_nodes_and_has_keys_of_its_own() -> None:
    training = ["slurm.mem=200G", "slurm.gpus_per_node=4", "slurm.extra={exclusive: true, exclude: n7, qos: art}"]
    words = [*training, "report.slurm.partition=cpu", "prepare.slurm={time: 30, extra: {exclude: false}}"]
    options = load_cluster(None, [*words, "slurm.srun.cpu-bind=cores", "slurm.extra.nice=7"])
    batch = Batch("r", Path("/r"), Path("/s"), ())
    train, prepare, report = (batch_script(batch, options, options.stage(k)) for k in ("train", "prepare", "report"))
    assert {"#SBATCH --mem=200G", "#SBATCH --exclusive", "#SBATCH --nice=7"} <= set(train.splitlines())
    for text in (prepare, report):
        assert not re.search("--mem|--exclusive|gpus", text) and "--nice=7\n" in text and "--qos=art\n" in text
        assert "\ngan_dist_srun_options=(--cpu-bind=cores)\n" in text
    assert "--time=30\n" in prepare and "--exclude" not in prepare and "--partition" not in prepare
    assert "--time=60\n" in report and "--exclude=n7\n" in report and "--partition=cpu\n" in report


@pytest.mark.parametrize("words", [["prepare", "a.zip", "SET"], ["pipeline", "CONFIG", "--source", "a.zip"]])
def test_every_kind_of_job_can_be_printed(words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "art.yaml"
    config.write_text(yaml.safe_dump({"data": {"shards": str(tmp_path / "set")}}))
    places = {"SET": str(tmp_path / "set"), "CONFIG": str(config)}
    command = [sys.executable, "-m", "launch", *(places.get(word, word) for word in words), "--dry-run", "--tasks", "3"]
    where = ["--run-dir", str(tmp_path / "run")] if words[0] == "pipeline" else []
    done = subprocess.run([*command, *where], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout.count("#!/bin/bash\n") == (3 if where else 1)
    assert (
        "#SBATCH --array=0-2\n" in done.stdout
        and f"-m launch.job.command prepare a.zip {tmp_path}/set\n" in done.stdout
    )
    assert ("--dependency=afterok:ID_OF_TRAIN\n" in done.stdout) == bool(where)
    assert {path.name for path in tmp_path.iterdir()} == {"art.yaml"}


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["slurm.gres=gpu:a100-sxm4-80gb:4"], 4),
        (["slurm.gres=gpu:1g.5gb:2"], 2),
        (["slurm.gres=gpu:nvidia_a100_3g.20gb:2"], 2),
        (["slurm.gres=gpu:a100:2,gpu:v100:2"], 4),
        (["slurm.gres=gpu:a100=4"], 4),
        (["slurm.gres=gpu:8(S:0-1)"], 8),
        (["slurm.gres=gres/gpu:h100:3,tmpfs:10G"], 3),
        (["slurm.gres=gpu"], 1),
        (["slurm.gres=gpu:1g.10gb"], 1),
        (["slurm.gres=shard:4"], 1),
        (["slurm.gpus_per_node=4"], 4),
        (["slurm.gpus_per_node=a100-sxm4.80:4,v100:1"], 5),
        (["slurm.gpus_per_node=null"], 1),
        (["slurm.extra={gpus-per-node: a100.80:4}"], 4),
        (["slurm.extra={--gres: gpu:a100:2}"], 2),
        (["slurm.gres=gpu:4", "slurm.tasks_per_node=3"], 3),
        (["slurm.extra={gpus: 8}", "slurm.tasks_per_node=4"], 4),
    ],
)
def test_there_is_a_rank_for_each_gpu_however_it_is_asked_for(words: list[str], ranks: int) -> None:
    options = load_cluster(None, words)
    assert options.slurm.ranks_per_node == ranks
    text = batch_script(Batch("r", Path("/r"), Path("/s"), ()), options)
    assert f"#SBATCH --ntasks-per-node={ranks}\n" in text


def test_what_is_left_to_the_cluster_is_not_asked_for() -> None:
    words = ["slurm.cpus_per_task=null", "slurm.gpus_per_node=null", "slurm.nodes=2-4", "slurm.tasks_per_node=2"]
    options = load_cluster(None, words)
    text = batch_script(Batch("r", Path("/r"), Path("/s"), ()), options)
    assert "cpus-per-task" not in text and "gpus" not in text and "#SBATCH --nodes=2-4\n" in text
    assert (options.slurm.ranks, options.slurm.planned) == (8, None)


def test_another_game_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    values = {"data": {"shards": str(tmp_path / "set")}}
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(values)))
    refuse_changes(tmp_path, load_config(values, ["train.epochs=99", "log.grid=4"]))
    refuse_changes(tmp_path / "nothing yet", load_config(values))
    with pytest.raises(UserError, match=r"seed was 0, now 3; train.epochs was 30\.0, now 1"):
        refuse_changes(tmp_path, load_config(values, ["train.epochs=1", "seed=3"]))


def test_a_parent_becomes_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "old" / "checkpoints").mkdir(parents=True)
    cluster = load_cluster(None, ["job.runs=elsewhere"])
    assert resolve_parent("old", cluster) == str(tmp_path / "elsewhere" / "old")
    assert (
        resolve_parent("old@7", cluster) == resolve_parent("elsewhere/old@7", cluster) == f"{tmp_path}/elsewhere/old@7"
    )
    assert resolve_parent(None, cluster) is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["submit", "CONFIG", "--run-dir", "RUN"],
            "launch: sbatch is not on PATH: this machine cannot submit to SLURM",
        ),
        (["pipeline", "CONFIG", "--run-dir", "RUN", "--source", "a"], "launch: sbatch is not on PATH"),
        (["doctor", "job.runs=nowhere"], "launch: sbatch is not on PATH"),
        (["submit", "CONFIG", "slurm.nods=2"], "launch: unknown key slurm.nods; did you mean slurm.nodes?"),
        (["submit", "CONFIG", "slurm.nodes=200"], "launch: 200 ranks, but train.global_batch is 128"),
        (["submit", "CONFIG", "--dry-run", "slurm.nodes=200"], "launch: 200 ranks, but train.global_batch is 128"),
        (["submit", "CONFIG", "--dry-run", "--from", "nowhere@3"], "launch: --from: no run at"),
        (["submit", "CONFIG", "--dry-run", "--from", ""], "launch: --from: expected RUN or RUN@STEP, found ''"),
        (["submit", "CONFIG", "--run-dir", "s3://b/x"], "launch: s3://b/x: expected a directory, found an address"),
        (["submit", "CONFIG", "job.runs=s3://b/x"], "launch: s3://b/x: expected a directory, found an address"),
        (["submit", "CONFIG", "--name", "100%job"], "launch: HERE/runs/100%job: %j in a path is a pattern to"),
        (["submit", "CONFIG", "--dry-run", "--name", "a%%j"], "launch: HERE/runs/a%%j: %j in a path is a pattern to"),
        (["prepare", "a", "s3://b/x"], "launch: s3://b/x: expected a directory, found an address"),
        (["pipeline", "CONFIG", "--source", "a", "data.shards=s3://b/x"], "launch: s3://b/x: expected a directory"),
        (
            ["pipeline", "CONFIG", "--source", "a", "--prepare", "'"],
            "launch: --prepare: expected options as for a shell",
        ),
        (["logs", "anything", "--rank", "**/"], "launch: --rank: expected a number, or batch, found '**/'"),
        (["submit", "CONFIG", "model.nods=2"], "launch: unknown key model.nods"),
        (["prepare", "only-one", "--cluster", "CLUSTER"], "launch: expected SOURCE... OUT"),
        (["prepare", "a", "b", "--resolution", "32", "slurm.time=x"], "launch: slurm.time: expected"),
        (["pipeline", "CONFIG"], "launch: --source: expected one source or more"),
        (["doctor", "train.epochs=3"], "launch: expected slurm. and job. keys only, found train.epochs=3"),
        (["status", "nowhere"], "launch: no run at"),
        (["tensorboard", "nowhere"], "launch: no directory"),
        (["tensorboard", ".", "train.epochs=3", "--cluster", "CLUSTER"], "launch: expected slurm. and job. keys, with"),
        (
            ["tensorboard", ".", "slurm.mem=3G"],
            "launch: expected slurm. and job. keys, with --cluster, found slurm.mem",
        ),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.cli import main

    monkeypatch.setenv("PATH", str(tmp_path))
    config = tmp_path / "art.yaml"
    config.write_text(yaml.safe_dump({"data": {"shards": str(tmp_path / "set")}}))
    files = {"CONFIG": str(config), "RUN": str(tmp_path / "run"), "CLUSTER": cluster_file(tmp_path)}
    monkeypatch.setattr(sys, "argv", ["launch", *(files.get(word, word) for word in words)])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert (
        caught.value.code == 2 and error.startswith(line.replace("HERE", str(Path.cwd()))) and error.count("\n") == 1
    ), error
    assert not (tmp_path / "run").exists()
