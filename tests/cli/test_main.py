"""The command line as a user meets it: exit statuses, one line for a mistake; each kind in a real process once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gan_dist.config.schema import PRESETS, preset
from tests.conftest import RunHere
from tests.helpers.training import config_file


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gan_dist", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def refused(*words: object, cwd: Path | None = None) -> str:
    """Returns the one line that a mistake gets."""
    done = run(*words, cwd=cwd)
    return one_line(done.returncode, done.stderr)


def one_line(status: object, errors: str) -> str:
    lines = errors.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("gan-dist: "), errors
    return lines[0]


@pytest.fixture
def refused_here(run_here: RunHere) -> Callable[..., str]:
    """Returns what `refused` is, in this process."""

    def refused_here(*words: object) -> str:
        done = run_here(*words)
        return one_line(done.returncode, done.stderr)

    return refused_here


def test_help_lists_commands_in_the_order_in_which_one_uses_them() -> None:
    done = run("--help")
    assert done.returncode == 0 and "Usage: " in done.stdout and done.stderr == ""
    listed = re.findall(r"^  ([a-z]+)  ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert listed == [
        "doctor",
        "demo",
        "prepare",
        "verify",
        "train",
        "sample",
        "encoder",
        "evaluate",
        "report",
        "bench",
    ]


@pytest.mark.parametrize("command", ["train", "sample", "bench step"])
def test_help_tells_what_there_is(command: str, run_here: RunHere) -> None:
    done = run_here(*command.split(), "--help")
    assert done.returncode == 0 and "Usage: " in done.stdout and done.stderr == ""


def test_an_unknown_command_names_the_nearest(run_here: RunHere) -> None:
    done = run_here("trian")
    assert done.returncode == 2 and "train" in done.stderr and "Traceback" not in done.stderr


def test_from_paintings_to_samples(
    paintings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here: RunHere,
) -> None:
    shards = tmp_path / "shards"
    monkeypatch.setenv("GAN_DIST_RUNS", str(tmp_path / "all"))
    done = run("prepare", paintings, shards, "--resolution", 32, "--max-reject-fraction", "0.5")
    assert done.returncode == 0, done.stderr
    assert "seen" in done.stdout and "70" in done.stdout and "rejected" in done.stdout
    assert run_here("verify", shards).returncode == 0
    config = config_file(shards, tmp_path)
    done = run("train", config, "--max-steps", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "done: step 4" in done.stdout and "tensorboard --logdir" in done.stdout
    assert "leaked" not in done.stderr  # Triton counts at the end what the process has not collected
    done = run("sample", "small", "--count", "5", "--out", "g.png", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "g.png").stat().st_size > 500
    done = run_here("sample", tmp_path / "all" / "small", "--individual", "each", "--interpolate")
    assert done.returncode == 0 and len(list((tmp_path / "each").iterdir())) == 64
    flip_a_byte(shards / "shard-00000.tar")
    done = run_here("verify", shards)
    assert done.returncode == 1 and "shard-00000.tar" in done.stdout


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 255
    path.write_bytes(bytes(content))


def test_a_dry_run_prints_the_whole_configuration_and_makes_nothing(
    dataset: Path, tmp_path: Path, run_here: RunHere
) -> None:
    done = run_here("train", config_file(dataset, tmp_path), "optim.g_lr=1e-4", "--dry-run")
    assert done.returncode == 0 and "g_lr: 0.0001" in done.stdout and "timeout_s: 300.0" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_mistakes_of_preparation(
    paintings: Path, dataset: Path, tmp_path: Path, refused_here: Callable[..., str]
) -> None:
    nothing, junk, out = tmp_path / "nothing", tmp_path / "junk", tmp_path / "out"
    nothing.mkdir()
    junk.mkdir()
    (junk / "a.jpg").write_text("not an image")
    (tmp_path / "file").write_text("")
    assert "SOURCE... OUT" in refused("prepare", paintings)
    assert "nowhere" in refused_here("prepare", tmp_path / "nowhere", out)
    assert "nothing" in refused_here("prepare", nothing, out)
    assert "junk" in refused_here("prepare", junk, out)
    assert "file" in refused_here("prepare", paintings, tmp_path / "file")
    assert "file" in refused_here("prepare", paintings, tmp_path / "file" / "out")
    assert "--task" in refused_here("prepare", paintings, out, "--task", "3/3")
    assert not out.exists()
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    assert "resolution" in refused_here("prepare", paintings, dataset, "--resolution", 64, "--shard-samples", 16)
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


def test_mistakes_of_training(dataset: Path, tmp_path: Path, refused_here: Callable[..., str]) -> None:
    config = config_file(dataset, tmp_path)
    assert "no configuration at" in refused_here("train", tmp_path / "none.yaml")
    assert "did you mean optim.g_lr?" in refused("train", config, "optim.glr=1")
    assert "expected integer" in refused_here("train", config, "train.global_batch=many")
    assert "model.resolution is 64" in refused_here("train", config, "model.resolution=64")
    assert "no run at" in refused_here("sample", "nobody")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]


@pytest.mark.chaos
def test_a_run_directory_with_another_configuration_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = config_file(dataset, tmp_path)
    assert run("train", config, "--max-steps", "1", "--run-dir", tmp_path / "run").returncode == 0
    line = refused("train", config, "optim.d_steps=2", "--run-dir", tmp_path / "run")
    assert "optim.d_steps was 1, now 2" in line and "to start it as a new run: gan-dist train" in line


@pytest.mark.chaos
def test_out_of_memory_says_what_to_lower(dataset: Path, tmp_path: Path) -> None:
    """The host's memory is really refused: an address space of 6 GiB, and a batch that wants far more."""
    config = config_file(dataset, tmp_path)
    words = ["train", config, "train.global_batch=200000", "model.g_channels=64", "--run-dir", str(tmp_path / "run")]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30));"
        f"sys.argv = ['gan-dist', *{words!r}]; from gan_dist.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "out of memory with train.global_batch=200000" in last and "lower train.global_batch" in last
    assert "Traceback" not in done.stderr


def test_importing_the_package_is_light_and_needs_no_cluster() -> None:
    heavy = "{'torch', 'submitit', 'tensorboard'} & set(sys.modules)"
    code = f"import sys, gan_dist; print({heavy}, gan_dist.train, 'submitit' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set() <function train") and done.stdout.endswith("False\n")


def test_presets_are_valid_and_the_thesis_is_kept_to_the_letter() -> None:
    thesis = preset("paintings64")
    assert (thesis.train.global_batch, thesis.train.epochs, thesis.model.resolution) == (128, 30, 64)
    assert (thesis.optim.g_lr, thesis.optim.d_lr, thesis.optim.betas) == (2e-4, 2e-4, (0.5, 0.999))
    assert (thesis.loss.real_target, thesis.loss.generator_target, thesis.model.leaky_slope) == (0.9, 0.9, 0.2)
    for name in PRESETS:
        assert json.dumps(preset(name).to_dict())


def test_a_sweep_among_runs_is_told_from_them(tmp_path: Path, refused_here: Callable[..., str]) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.yaml").touch()
    assert f"gan-dist report {tmp_path / 'sweep'}" in refused_here("report", tmp_path / "sweep", tmp_path)
