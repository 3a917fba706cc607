"""Killed anywhere, out of space, or shared among tasks: the bytes are those of one undisturbed run."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gan_dist.data.prepare.prepare import prepare
from gan_dist.utils.errors import GanDistError
from tests.helpers.sources import contents, encode, fill

SCRIPT = """
import sys
from gan_dist.data.prepare.prepare import prepare
from gan_dist.utils.errors import GanDistError
source, out, task = sys.argv[1:]
def show(verb, done, total):
    if verb == "preparing":
        print(done, flush=True)
try:
    prepare(source, out, shard_samples=8, workers=2, max_reject_fraction=1, show=show,
            task=tuple(map(int, task.split("/"))) if task else None)
except GanDistError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def start(source: Path, out: Path, task: str = "", **options: Any) -> subprocess.Popen[str]:
    """Starts a preparation in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(out), task]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 images that take some time, and two that are none, which make the first shard the smallest."""
    folder = fill(tmp_path_factory.mktemp("source") / "in", 80)
    for name in ("a/!1.jpg", "a/!2.jpg"):
        (folder / name).write_text("<html>not found</html>")
    large = encode(0, (1200, 900))
    for i in range(40):
        (folder / f"large{i}.png").write_bytes(large)
    return folder


class Whole(NamedTuple):
    """What one run makes, and the seconds that it takes, the interpreter's start included."""

    contents: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    began = time.monotonic()
    with start(source, out) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    return Whole(contents(out), time.monotonic() - began)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.chaos)])
def test_killed_at_random_moments_it_ends_the_same(
    source: Path, undisturbed: Whole, tmp_path: Path, kills: int
) -> None:
    """Moments from the interpreter's start to the manifest; what gets there before it is killed begins anew."""
    moments, out = random.Random(kills), tmp_path / "out"
    seconds, killed, done = min(undisturbed.seconds, 6.0), 0, 0
    while killed < kills:
        with start(source, out) as process:
            assert process.stdout is not None
            time.sleep(moments.uniform(0.3, 1) * seconds)
            process.kill()
            first = int((process.stdout.readline() or f"{done}\n").partition("\n")[0] or done)
        assert first >= done, "finished shards were done again"
        done = first
        if process.returncode == 0:
            assert contents(out) == undisturbed.contents
            shutil.rmtree(out)
            seconds, done = 0.9 * seconds, 0
        else:
            killed += 1
    with start(source, out) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(out) == undisturbed.contents


def test_workers_do_not_outlive_a_killed_run(source: Path, tmp_path: Path) -> None:
    with start(source, tmp_path / "out", start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.kill()
    deadline = time.monotonic() + 100
    while left := subprocess.run(
        ["ps", "-o", "pid=,stat=", "-s", str(process.pid)], capture_output=True, text=True
    ).stdout:
        if all("Z" in line for line in left.splitlines()):
            break
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_worker_that_is_killed_costs_nothing(source: Path, undisturbed: Whole, tmp_path: Path) -> None:
    """As the kernel does it when memory runs out: one of the workers, at any moment."""
    killed = 0

    def kill(verb: str, done: int, total: int) -> None:
        nonlocal killed
        if verb != "preparing":
            return
        pids = subprocess.run(
            ["pgrep", "-P", str(os.getpid()), "-f", "prepare.workers"], capture_output=True, text=True
        )
        if done and killed < 4 and pids.stdout:
            os.kill(int(pids.stdout.split()[killed % 2 - 1]), signal.SIGKILL)
            killed += 1

    prepare(source, tmp_path / "out", shard_samples=8, workers=2, max_reject_fraction=1, show=kill)
    assert killed >= 2
    assert contents(tmp_path / "out") == undisturbed.contents


def test_a_full_disk_is_one_line_and_continues_after_space_is_made(
    source: Path, undisturbed: Whole, tmp_path: Path
) -> None:
    limit = 100_000  # six samples fit, eight do not: the first shard is written

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with start(source, tmp_path / "out", preexec_fn=full) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith("no space left") and errors.count("\n") == 1
    assert [path.name for path in sorted((tmp_path / "out").glob("shard-*"))] == [
        "shard-00000.jsonl",
        "shard-00000.tar",
    ]
    account = prepare(source, tmp_path / "out", shard_samples=8, workers=2, max_reject_fraction=1)
    assert account.entries == 122 - 8
    assert contents(tmp_path / "out") == undisturbed.contents


def test_concurrent_tasks_equal_one_run(source: Path, undisturbed: Whole, tmp_path: Path) -> None:
    processes = [start(source, tmp_path / "out", f"{i}/3") for i in (1, 2, 0)]
    for process in processes:
        with process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert contents(tmp_path / "out") == undisturbed.contents


def test_a_second_writer_is_refused(source: Path, tmp_path: Path) -> None:
    with start(source, tmp_path / "out") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(GanDistError, match="another gan-dist prepare is writing"):
            prepare(source, tmp_path / "out", shard_samples=8, workers=0)
        process.send_signal(signal.SIGCONT)
        process.communicate()
    assert process.returncode == 0


def test_an_interrupt_ends_workers_and_leaves_no_shard_half_written(source: Path, tmp_path: Path) -> None:
    def stop(verb: str, done: int, total: int) -> None:
        if verb == "preparing" and done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", shard_samples=8, workers=2, show=stop)
    assert not list((tmp_path / "out").glob("*.tmp"))
    account = prepare(source, tmp_path / "out", shard_samples=8, workers=2, max_reject_fraction=1)
    assert account.complete and account.entries < 122


def test_a_file_that_changes_under_the_work_is_named(source: Path, tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 40)

    def change(verb: str, done: int, total: int) -> None:
        if verb == "preparing":
            (folder / "b/039.jpg").write_bytes(b"something else")

    with pytest.raises(GanDistError, match=r"'b/039\.jpg' changed"):
        prepare(folder, tmp_path / "out", shard_samples=8, workers=0, show=change)
