"""Ranks that die, hang or raise: the others end in bounded time, name them, and a restart continues the game."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gan_dist.runs.checkpoint import find
from tests.helpers.processes import LIMIT, Ranks, wait_for_listening
from tests.helpers.training import config_file, wait_for_step

pytestmark = pytest.mark.chaos

"""Seconds that survivors may take in these tests: a timeout of 8 s, a post-mortem, and a slow machine."""


RAISES = """
import sys
from gan_dist.training.update import Update
step = Update.step
def failing(self, *words):
    if getattr(self, "count", 0) == 4:
        raise ValueError("the disk of this rank is on fire")
    self.count = getattr(self, "count", 0) + 1
    return step(self, *words)
Update.step = failing
from gan_dist.cli.main import main
main()
"""


@pytest.mark.parametrize("fault", ["killed", "stopped", "raises"])
def test_survivors_name_the_lost_rank_and_a_restart_continues(dataset: Path, tmp_path: Path, fault: str) -> None:
    config, run = config_file(dataset, tmp_path), tmp_path / "run"
    ranks = Ranks(2, config, run, "checkpoint.every_steps=2", code=RAISES if fault == "raises" else None)
    try:
        if fault != "raises":
            wait_for_step(run, 4)
            ranks.processes[1].send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        assert ranks.processes[0].wait(LIMIT) == 1, ranks.log(0)
    finally:
        ranks.kill()
    last = ranks.log(0).strip().splitlines()[-1]
    assert last.startswith("gan-dist: rank 1 on ") and "was lost" in last, ranks.log(0)
    assert "Traceback" not in ranks.log(0)
    if fault == "raises":
        assert "its last words: ValueError: the disk of this rank is on fire" in last
    if fault == "stopped":
        assert "trainer.py" in (run / "hang" / "rank-0.txt").read_text()
    assert not (run / "lease").exists()
    before = find(run).step
    again = Ranks(2, config, run, "--max-steps", str(before + 2))
    assert again.wait() == [0, 0], again.log(0)
    assert find(run).step == before + 2


def test_every_rank_stops_at_the_same_step_whoever_is_asked(dataset: Path, tmp_path: Path) -> None:
    config, run = config_file(dataset, tmp_path), tmp_path / "run"
    ranks = Ranks(2, config, run)
    wait_for_step(run, 4)
    ranks.processes[1].send_signal(signal.SIGUSR2)
    assert ranks.wait() == [75, 75], ranks.log(0) + ranks.log(1)
    assert "stopped by SIGUSR2: step" in ranks.log(0) and ranks.log(1).count("stopped") == 0
    assert find(run).step >= 4


def test_a_signal_during_start_up_still_leaves_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    config = config_file(dataset, tmp_path)
    for delay in (0.6, 2.5, 4.0):
        run = tmp_path / f"run-{delay}"
        process = subprocess.Popen(
            [sys.executable, "-m", "gan_dist", "train", config, "--run-dir", str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for_listening(process.pid)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 75, text
        assert find(run).step >= 0


def test_two_trainers_on_one_run_cannot_both_write(dataset: Path, tmp_path: Path) -> None:
    config, run = config_file(dataset, tmp_path), tmp_path / "run"
    os.environ["GAN_DIST_LEASE_TERM_S"] = "4"
    try:
        endless = "train.epochs=100000"  # the second one looks for seconds whether the first is alive
        first = Ranks(1, config, run, endless)
        wait_for_step(run, 3)
        second = Ranks(1, config, tmp_path / "run", endless)
        assert second.processes[0].wait(LIMIT) == 2
        assert "is being trained by process" in second.log(0)
        first.processes[0].send_signal(signal.SIGTERM)
        assert first.wait() == [75]
    finally:
        del os.environ["GAN_DIST_LEASE_TERM_S"]
