"""`gan-dist prepare` in real processes: stopped in the middle, on odd terminals, into pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gan_dist.data.prepare.prepare import prepare
from tests.conftest import RunHere
from tests.helpers.sources import contents, encode, fill

COMMAND = [sys.executable, "-m", "gan_dist", "prepare"]


OPTIONS = ["--shard-samples", "4", "--workers", "1"]
STUCK = """
from gan_dist.data.prepare import workers
workers.WORKER_CODE = '''
import time
from gan_dist.data.prepare import workers
square = workers.square
def stuck(data, recipe):
    if data.endswith(b"STUCK"):
        time.sleep(600)
    return square(data, recipe)
workers.square = stuck
workers.serve()
'''
from gan_dist.cli.main import main
main()
"""
"""`gan-dist` whose worker never gets beyond one picture: on any machine a signal finds it in the middle."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, of which one near the end can be recognised."""
    folder = fill(tmp_path_factory.mktemp("source") / "in", 18)
    (folder / "b/016-stuck.png").write_bytes(encode(0) + b"STUCK")
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(source, out, shard_samples=4, workers=1)
    return contents(out)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", pytest.param("SIGUSR2", marks=pytest.mark.chaos)])
def test_stopped_it_says_so_and_the_same_command_continues(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    command = [*COMMAND, str(source), str(tmp_path / "out"), *OPTIONS]
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, *command[3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if line.startswith("preparing: "))
        assert [int(next(lines).split()[1]) > 0 for _ in range(3)] == [False, True, True]
        os.killpg(process.pid, getattr(signal, name))  # as a terminal and a scheduler do: workers are sent it too
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert errors == f"gan-dist: stopped by {name}; what is finished is kept: run the same command again to continue\n"
    assert list((tmp_path / "out").glob("*.tar")) and not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out/manifest.json").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert contents(tmp_path / "out") == undisturbed


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    (tmp_path / "in/Na\u00efve").mkdir(parents=True)
    (tmp_path / "in/Na\u00efve/a.png").write_bytes(encode(1))
    command = [*COMMAND, str(tmp_path / "in"), str(tmp_path / "out"), "--labels", "folders", "--workers", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert "1 Na\\xefve" in done.stdout


def test_a_log_has_plain_lines(tmp_path: Path) -> None:
    command = [*COMMAND, str(fill(tmp_path / "in")), str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.isascii() and "\x1b" not in done.stdout and "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[:2] == ["preparing: 0 of 10", "preparing: 10 of 10"]
    assert [line.split()[0] for line in lines[2:]] == [
        "seen", "written", "rejected", "replaced", "skipped", "shards", "speed"
    ]  # fmt: skip


def test_every_option_reaches_the_dataset(tmp_path: Path) -> None:
    """Each leaves its mark on the recipe and on what is counted."""
    source, out, new = fill(tmp_path / "in", 6), tmp_path / "out", tmp_path / "new"
    (source / "a/same.png").write_bytes((source / "a/002.png").read_bytes())
    (source / "b/tiny.png").write_bytes(encode(7, (40, 30)))
    (source / "b/cut.png").write_bytes(encode(8)[:-200])
    (source / "b/page.png").write_text("<html>")
    new.mkdir()
    (new / "004.png").write_bytes(encode(9))
    options = "--resolution 32 --resample bilinear --full-decode --keep-truncated --min-side 31 --labels folders"
    options += f" --replacements {new} --dedupe --max-reject-fraction 0.5 --shard-samples 5 --workers 2 --task 0/1"
    done = subprocess.run(
        [*COMMAND, str(source), str(out), *options.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_bytes())
    recipe = manifest["recipe"]
    assert [recipe[name] for name in ("resolution", "resample", "min_side", "shard_samples")] == [32, "bilinear", 31, 5]
    assert recipe["full_decode"] and recipe["keep_truncated"] and recipe["dedupe"]
    assert (recipe["labels"], recipe["replacements"]) == ("folders", "new")
    totals = manifest["totals"]
    assert totals["rejected"] == {"not_an_image": 1, "too_small": 1} and totals["skipped"] == {"duplicate": 1}
    assert (totals["seen"], totals["written"], totals["replaced"], totals["duplicates"]) == (11, 7, 1, 1)
    assert totals["classes"] == {"a": 3, "b": 4} and totals["flags"] == {"truncated": 1}
    for line in ("seen        11", "of these    1 truncated", "classes     2: 4 b, 3 a"):
        assert line in done.stdout, done.stdout


def test_a_size_that_no_network_here_has_is_said_before_the_work(tmp_path: Path, run_here: RunHere) -> None:
    fill(tmp_path / "in", 2)
    for size, note in (
        ("48", "note: 48 pixels are for other programs; gan-dist trains on 32, 64, 128, 256\n"),
        ("32", ""),
    ):
        done = run_here("prepare", tmp_path / "in", tmp_path / size, "--resolution", size)
        assert done.returncode == 0 and done.stderr == note, done.stderr
