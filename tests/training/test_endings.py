"""How a run on GPUs ends: what it recorded is freed before the ranks part, and a device that hangs holds nothing up."""

from __future__ import annotations

import os
import queue
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gan_dist.data.stream import Stream
from gan_dist.distributed.failures import DeviceHangs
from gan_dist.distributed.world import World
from gan_dist.training import checkpointer as checkpointing
from gan_dist.training import setup
from gan_dist.training.checkpointer import Checkpointer
from gan_dist.training.control import ControlRing
from gan_dist.training.runner import Captured, Eager
from gan_dist.training.trainer import train
from gan_dist.utils import tensors
from gan_dist.utils.errors import GanDistError
from tests.helpers.fake_cuda import FakeGraph, play_cuda
from tests.helpers.games import CPU, batches, game
from tests.helpers.processes import Ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.training import config_file, small


def test_a_captured_runner_waits_for_its_last_replay_and_frees_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, update = play_cuda(monkeypatch), game()
    for orderly in (True, False):
        runner: Any = Captured(update, "a test")
        runner.step(*batches(update, 0))
        graph: FakeGraph = runner.graph
        waits.clear()
        runner.close(orderly)
        assert graph.calls == ["replay", "reset"] and runner.graph is None and not runner.inputs
        assert waits == (["synchronize"] if orderly else [])


def test_a_broken_device_that_refuses_the_reset_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: FakeGraph) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    play_cuda(monkeypatch)
    monkeypatch.setattr(FakeGraph, "reset", refuse)
    runner, update = Captured(game(), "a test"), game()
    runner.step(*batches(update, 0))
    runner.close(orderly=False)
    assert runner.graph is None


def train_and_note_the_end(rank: int, dataset: str, out: str, fails: bool) -> None:
    """Trains as one of two ranks, to the end or into an error; notes what is called in which order."""
    calls: list[str] = []
    destroy = dist.destroy_process_group

    class Recorded(Eager):
        def step(self, *words: Any) -> torch.Tensor:
            if fails:
                raise ValueError("a test")
            return super().step(*words)

        def close(self, orderly: bool = True) -> None:
            calls.append(f"close, orderly={orderly}")

    def note(*words: Any) -> None:
        calls.append("destroy")
        destroy(*words)

    setup.make_runner = lambda name, update: Recorded(update, "a test")  # type: ignore[attr-defined]
    dist.destroy_process_group = note  # type: ignore[assignment]
    with pytest.raises(ValueError, match="a test") if fails else nullcontext():
        train(small(Path(dataset)), run_dir=f"{out}/run", max_steps=2, console=False)
    assert calls == [f"close, orderly={not fails}", "destroy"]
    Path(out, str(rank)).touch()


@pytest.mark.parametrize("fails", [False, True])
def test_the_runner_is_closed_before_the_process_group_is_destroyed(dataset: Path, tmp_path: Path, fails: bool) -> None:
    run_ranks(2, train_and_note_the_end, str(dataset), str(tmp_path), fails)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"


def _fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the second step find this rank's GPU full; what it drives is a CPU until then."""

    def step(self: Eager, *words: Any) -> torch.Tensor:
        if self.update.buffers.flat.any():  # the first one counted its passes
            object.__setattr__(self.update.world, "device", torch.device("cuda", 0))
            raise torch.OutOfMemoryError(FULL)
        return self.update.step(*words)

    monkeypatch.setattr(Eager, "step", step)


def train_until_a_gpu_is_full(rank: int, dataset: str, out: str) -> None:
    """Trains as one of two ranks, the second of which runs out of memory."""
    with pytest.MonkeyPatch.context() as patch:
        destroyed: list[object] = []
        if rank == 1:
            _fill_the_gpu(patch)
            patch.setattr(dist, "destroy_process_group", destroyed.append)
        with pytest.raises(GanDistError) as caught:
            train(small(Path(dataset)), run_dir=f"{out}/run", max_steps=9, console=False)
    error, host = caught.value, os.uname().nodename
    if rank == 1:
        assert str(error).startswith("the GPU is out of memory with train.global_batch=8 on 2 rank(s); lower ")
        assert error.exit_now and not destroyed
        Path(out, "1").touch()
        os._exit(0)  # as exit_at_once does
    assert f"rank 1 on {host} was lost, its last words: OutOfMemoryError: {FULL}" in str(error)
    assert not error.exit_now
    Path(out, "0").touch()


def test_a_rank_whose_gpu_is_full_leaves_at_once_and_the_other_says_why(dataset: Path, tmp_path: Path) -> None:
    run_ranks(2, train_until_a_gpu_is_full, str(dataset), str(tmp_path))
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


def test_a_lone_gpu_that_is_full_is_left_in_order(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill_the_gpu(monkeypatch)
    with pytest.raises(GanDistError, match="the GPU is out of memory") as caught:
        train(small(dataset), run_dir=tmp_path / "run", max_steps=9, console=False)
    assert not caught.value.exit_now


HANGS = """
import sys, threading, time
import torch.distributed as dist
from gan_dist.data.stream import Stream
from gan_dist.training import control
from gan_dist.training.checkpointer import Checkpointer
from gan_dist.training.runner import Eager

class Ring(control.ControlRing):
    def __init__(self, *words):
        super().__init__(*words)
        self.lag = 2

class Never:
    def query(self):
        return False

def forever(*words, **named):
    threading.Event().wait()

from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training import trainer
from gan_dist.utils import tensors
trainer.ControlRing, tensors.record_event = Ring, lambda device: Never()
close = Telemetry.close
Telemetry.close = lambda self, **words: (close(self, **words), print("metrics written", words, flush=True))
Stream.close = Eager.close = dist.destroy_process_group = forever
failure = Checkpointer.failure
Checkpointer.failure = lambda self, wait=False: forever() if self.saved_step > 0 and wait else failure(self, wait=wait)
threading.Thread(target=forever).start()  # a thread that writes a checkpoint, as Python waits for it at its end
from MODULE import main
main()
"""


@pytest.mark.parametrize("module", ["gan_dist.cli.main", "launch.job.rank"])
def test_a_device_that_hangs_ends_the_process_with_its_words_written(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setenv("GAN_DIST_ATTEMPT", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a test")
    code, config = HANGS.replace("MODULE", module), config_file(dataset, tmp_path)
    ranks = Ranks(1, config, tmp_path / "run", "dist.timeout_s=1", code=code)
    assert ranks.wait() == [1], ranks.log(0)
    words = "the device did not finish a step within dist.timeout_s=1 s"
    *_, pictures, written, last = ranks.log(0).splitlines()
    assert (written, last) == ("metrics written {'orderly': False}", f"gan-dist: {words}")
    assert pictures.startswith("WARNING: the samples of step 0 are not drawn: the device ")
    assert ranks.log(0).count("WARNING") == 1
    if module == "launch.job.rank":
        assert (tmp_path / "failed-0").read_text().split("\t")[1:] == [
            "1",
            "lost",
            "0",
            os.uname().nodename,
            words + "\n",
        ]


def test_a_rank_whose_device_hangs_says_so_and_leaves_at_once(dataset: Path, tmp_path: Path) -> None:
    code, config, run = HANGS.replace("MODULE", "gan_dist.cli.main"), config_file(dataset, tmp_path), tmp_path / "run"
    ranks = Ranks(2, config, run, "dist.timeout_s=3", code=code)
    assert ranks.wait() == [1, 1], ranks.log(0) + ranks.log(1)
    last = ranks.log(1).splitlines()[-1]
    assert "was lost" in last and "the device did not finish a step within dist.timeout_s=3 s" in last
    assert "trainer.py" in (run / "hang" / "rank-1.txt").read_text()


def test_who_waits_for_samples_behind_a_device_that_hangs_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream.__new__(Stream)
    stream._full = queue.SimpleQueue()
    ring = ControlRing(CPU, timeout_s=0.05)
    ring.lag = 4
    ring.push(1, torch.zeros(3))
    ring.check()  # a step that is done is no hang, however long the samples take
    monkeypatch.setattr(tensors, "record_event", lambda device: SimpleNamespace(query=lambda: False))
    ring.drain()
    ring.push(2, torch.zeros(3))
    ring.check()  # nor is one that has only begun
    stream.while_waiting = ring.check
    with pytest.raises(DeviceHangs):
        stream._await_block()
    with pytest.raises(DeviceHangs):
        ring.drain()


def test_who_waits_for_a_save_behind_a_device_that_hangs_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(checkpointing, "WAIT_S", 0.01)
    monkeypatch.setattr(checkpointing, "record_event", lambda device: SimpleNamespace(query=gate.is_set))
    copy = Checkpointer._on_host
    monkeypatch.setattr(Checkpointer, "_on_host", lambda self, state, copied: gate.wait() and copy(self, state, None))
    checkpointer = Checkpointer(tmp_path, World(), keep=1, timeout_s=0.05)
    checkpointer.save({"step": 1, "images_seen": 8})
    try:
        for wait in (checkpointer.previous_state, checkpointer.wait, lambda: checkpointer.save({"step": 2})):
            with pytest.raises(DeviceHangs):
                wait()
    finally:
        gate.set()
    checkpointer.wait()  # a disk that is slow is no device that hangs
    assert (tmp_path / "step-00000001").exists()
