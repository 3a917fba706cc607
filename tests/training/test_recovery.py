"""A run interrupted in every way we could think of, with real processes, ends as the undisturbed run ends.

Bounded and seeded, marked `chaos`. GAN_DIST_CHAOS_KILLS=30 uv run pytest -m chaos -k random_instants kills more often.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gan_dist.runs.checkpoint import find, step_directories
from gan_dist.training.trainer import train
from tests.cluster.boot import wait_until
from tests.helpers.processes import LIMIT, Ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_identical, config_file, small, wait_for_step, worst_difference

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

KILLS = int(os.environ.get("GAN_DIST_CHAOS_KILLS") or 5)
STEPS = 30 * KILLS


def newest(run: Path) -> int:
    """Returns the step of the newest checkpoint that stands in a run directory; -1 where there is none."""
    return max((int(path.name[5:]) for path in step_directories(run / "checkpoints")), default=-1)


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_at_random_instants_it_ends_as_if_nothing_had_happened(dataset: Path, tmp_path: Path) -> None:
    """Two ranks, killed alone or together, while starting, stepping, drawing or saving."""
    config, run, whole = config_file(dataset, tmp_path), tmp_path / "run", tmp_path / "whole"
    # A checkpoint every other step: about half of the kills fall into a save.
    words = ["checkpoint.every_steps=2", "log.scalars_every=3", "log.samples_every=20", "--max-steps", str(STEPS)]
    # Who is killed before the ranks have met is waited for as long as init_timeout_s.
    words += ["train.epochs=1000", "dist.init_timeout_s=30"]
    assert Ranks(2, config, whole, *words).wait(200) == [0, 0]
    chance, kills = random.Random(20261123), 0
    while kills < KILLS:
        before = newest(run)
        ranks = Ranks(2, config, run, *words)
        try:
            if chance.random() < 0.2:
                time.sleep(chance.uniform(0.5, 8.0))  # while starting
            else:
                limit = time.monotonic() + LIMIT
                while newest(run) <= before and ranks.processes[0].poll() is None and time.monotonic() < limit:
                    time.sleep(0.005)
                # Progress is spread over the kills, so that the last of them still finds the run under way.
                time.sleep(chance.uniform(0.0, 0.4))
            victims = chance.choice([[0], [1], [0, 1]])
            for victim in victims:
                ranks.processes[victim].kill()
            kills += 1
            statuses = ranks.wait()
            assert "Traceback" not in "".join(ranks.log(rank) for rank in (0, 1) if rank not in victims), statuses
        finally:
            ranks.kill()
    last = Ranks(2, config, run, *words)
    assert last.wait(200) == [0, 0], last.log(0)
    assert_identical(run, whole)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = Counter(line["step"] for line in lines if "event" not in line)
    assert logged == Counter(range(3, STEPS + 1, 3))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    assert [event.step for event in events.Scalars("loss/generator")] == list(range(3, STEPS + 1, 3))


def train_on(rank: int, dataset: str, out: str, until: int) -> None:
    """Continues both runs to step `until`, as one of however many ranks there are now."""
    import torch.distributed as dist

    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    for batch in (12, 14):
        words = ["train.precision=fp64", f"train.global_batch={batch}", "checkpoint.every_steps=0"]
        train(small(Path(dataset)), words, run_dir=Path(out) / str(batch), max_steps=until, console=False)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def test_one_two_four_three_ranks_play_the_game_of_one(dataset: Path, tmp_path: Path) -> None:
    """Across restarts and in the middle of an epoch; batch 14 gives four ranks unequal shares."""
    run_ranks(1, train_on, str(dataset), str(tmp_path / "one"), 12)
    for size, until in ((1, 3), (2, 6), (4, 9), (3, 12)):
        run_ranks(size, train_on, str(dataset), str(tmp_path / "many"), until)
    for batch in ("12", "14"):
        assert find(tmp_path / "many" / batch).manifest["world_size"] == 3
        assert worst_difference(tmp_path / "one" / batch, tmp_path / "many" / batch) < 1e-9, batch
    told = (tmp_path / "many" / "12" / "metrics.jsonl").read_text()
    assert "ranks resolved to 2 before and to 4 now" in told


def on_small_disk(size: str, command: str, *, options: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a shell command with a file system of its own, of `size` bytes, at ./disk; it is gone afterwards."""
    spaces = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    script = f"mount -t tmpfs -o size={size} none disk && {command}"
    return subprocess.run([*spaces, "bash", "-c", script], capture_output=True, text=True, timeout=LIMIT, check=False)


def test_a_full_disk_costs_checkpoints_but_no_training_and_no_older_checkpoint(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    gan_dist = f"{sys.executable} -m gan_dist"
    train_command = f"{gan_dist} train {config_file(dataset, tmp_path)} --run-dir disk/run checkpoint.every_steps=2"
    done = on_small_disk(
        "8m",
        "(until test -d disk/run/checkpoints/step-00000004; do sleep 0.05; done; head -c 16M /dev/zero >disk/ballast)& "
        f"{train_command} --max-steps 400; echo status=$?; rm disk/ballast; ls disk/run/checkpoints; "
        f"{train_command} --max-steps 404; echo status=$?",
    )
    full, after = done.stdout.split("status=1\n", 1)
    assert "WARNING: a checkpoint could not be saved" in full and "No space left on device" in full, done.stdout
    assert "could not be saved in" in done.stderr and "earlier ones are as they were" in done.stderr
    assert "Traceback" not in done.stderr
    saved = [int(name[5:]) for name in after.split("latest\n", 1)[1].split() if name.startswith("step-")]
    assert saved and max(saved) < 400
    assert f"continues at step {max(saved)} of 404" in after and after.rstrip().endswith("status=0"), done.stderr


def test_too_small_a_disk_and_a_read_only_one_are_refused_at_the_start(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    command = f"{sys.executable} -m gan_dist train {config_file(dataset, tmp_path)} --max-steps 2 --run-dir disk/run"
    done = on_small_disk("100k", command)
    assert done.returncode == 1 and "two checkpoints take" in done.stderr, done.stderr
    done = on_small_disk("8m", f"mount -o remount,ro disk && {command}")
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    # A run that one can only read is good enough to sample and to start another from.
    child = command.replace("disk/run", "child") + " optim.g_lr=1e-5 --from disk/run"
    done = on_small_disk(
        "8m", f"{command} && mount -o remount,ro disk && {child} && {sys.executable} -m gan_dist sample disk/run"
    )
    assert done.returncode == 0, done.stderr
    assert find(tmp_path / "child", 0).manifest["parent"].endswith("disk/run@2")


SLOW_SAVE = """
import time
from gan_dist.runs import checkpoint
write = checkpoint.write_hashed
def slow(path, content):
    if "step-00000000" not in str(path):
        open("saving", "w").close()
        time.sleep(3)
    return write(path, content)
checkpoint.write_hashed = slow
from gan_dist.cli.main import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_asked_to_stop_during_a_save_twice(dataset: Path, tmp_path: Path, number: signal.Signals) -> None:
    config, run = config_file(dataset, tmp_path), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, "train", config, "--run-dir", str(run), "checkpoint.every_steps=5"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until((tmp_path / "saving").exists, LIMIT, "save")
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, text
    assert f"stopped by {number.name}: step {find(run).step:,} of" in text


def test_a_second_ctrl_c_ends_at_once_and_what_was_saved_stands(dataset: Path, tmp_path: Path) -> None:
    config, run = config_file(dataset, tmp_path), tmp_path / "run"
    words = ["train", config, "--run-dir", str(run), "checkpoint.every_steps=5"]
    endless = SLOW_SAVE.replace("sleep(3)", "sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", endless, *words], cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for_step(run, 2)
    process.send_signal(signal.SIGINT)
    wait_until((tmp_path / "saving").exists, LIMIT, "save")
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=LIMIT)
    assert process.returncode not in (0, 75)
    assert b"Traceback" not in text
    assert find(run).step >= 0


ASKED_WHILE_COMPILING = """
import os, signal
from gan_dist.training.runner import Compiled
step = Compiled.step
def asked_meanwhile(self, *words):
    Compiled.step = step
    os.kill(os.getpid(), signal.SIGUSR2)
    return step(self, *words)
Compiled.step = asked_meanwhile
from gan_dist.cli.main import main
main()
"""


def test_asked_to_stop_while_the_step_is_compiled(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", config_file(dataset, tmp_path), "--run-dir", str(run), "train.runner=compiled"]
    done = subprocess.run([sys.executable, "-c", ASKED_WHILE_COMPILING, *words], capture_output=True, text=True)
    assert done.returncode == 75, done.stdout + done.stderr
    assert find(run).step <= 2  # at most the step under way is played


def test_torchrun_restarts_a_run_from_its_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "gan_dist", "train"]
    more = ["--run-dir", str(run), "--max-steps", "400", "checkpoint.every_steps=2", "dist.timeout_s=20"]
    log = tmp_path / "log"
    with log.open("w") as file:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, config_file(dataset, tmp_path), *more],
            stdout=file,
            stderr=file,
        )
    wait_for_step(run, 6)
    holder: dict[str, Any] = json.loads((run / "lease").read_text())
    os.kill(holder["pid"], signal.SIGKILL)
    assert agent.wait(200) == 0, log.read_text()
    assert find(run).step == 400
    starts = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 2 and starts[1]["step"] >= 4
