"""Saving beside the training path: one at a time, compared between ranks first, failures told once."""

from __future__ import annotations

import errno
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gan_dist.distributed.failures import DeviceHangs
from gan_dist.distributed.world import World, join
from gan_dist.runs import checkpoint
from gan_dist.runs.checkpoint import find
from gan_dist.training import checkpointer as checkpointing
from gan_dist.training.checkpointer import Checkpointer
from gan_dist.training.trainer import train
from gan_dist.utils.errors import GanDistError
from gan_dist.utils.files import write_hashed
from gan_dist.utils.stop import StopRequest
from gan_dist.utils.tensors import copy_state, to_host
from tests.helpers.ranks import run_ranks
from tests.helpers.training import small


def state(step: int, value: float = 0.0) -> dict[str, Any]:
    return {"step": step, "images_seen": 8 * step, "generator": {"w": torch.full((5,), value)}}


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_failure_is_told_once_and_the_next_save_goes_on(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    checkpointer = Checkpointer(blocked / "checkpoints", World(), keep=2, timeout_s=60)
    checkpointer.save(state(1))
    assert isinstance(checkpointer.failure(wait=True), OSError)
    assert checkpointer.failure(wait=True) is None
    checkpointer.directory = tmp_path / "checkpoints"
    checkpointer.save(state(2))
    checkpointer.save(state(3))
    assert checkpointer.failure(wait=True) is None
    assert saved(checkpointer.directory) == ["latest", "step-00000002", "step-00000003"]


def test_the_caller_does_not_wait_and_the_guard_has_the_last_word(tmp_path: Path) -> None:
    gate = threading.Event()

    def guard() -> None:
        assert gate.wait(20)
        raise GanDistError("not any more")

    checkpointer = Checkpointer(tmp_path / "checkpoints", World(), keep=2, timeout_s=60, before_publishing=guard)
    checkpointer.save(state(1))  # returns although the save cannot end
    assert checkpointer.failure() is None
    gate.set()
    assert str(checkpointer.failure(wait=True)) == "not any more"
    assert saved(checkpointer.directory) == []


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError(), KeyError("w")])
def test_whatever_ends_the_thread_is_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpointing, "save", broken)
    checkpointer = Checkpointer(tmp_path / "checkpoints", World(), keep=2, timeout_s=60)
    checkpointer.save(state(1))
    with pytest.raises(GanDistError, match=rf"the checkpoint could not be made: {type(error).__name__}"):
        checkpointer.wait()


def fail_as_rank(rank: int, folder: str) -> None:
    """Saves on two ranks, of which the second cannot copy its state: neither waits for the other in vain."""
    with join("cpu") as world:
        checkpointer = Checkpointer(Path(folder) / "checkpoints", world, keep=2, timeout_s=60)
        mine: dict[str, Any] = (
            state(1) if rank == 0 else {**state(1), "generator": {"w": torch.empty(1, device="meta")}}
        )
        checkpointer.save(mine)
        with pytest.raises(GanDistError, match="the checkpoint could not be made: rank 1: "):
            checkpointer.wait()


def test_a_rank_that_cannot_copy_its_state_tells_the_others(tmp_path: Path) -> None:
    run_ranks(2, fail_as_rank, str(tmp_path))
    assert saved(tmp_path) == []


def save_as_rank(rank: int, folder: str) -> None:
    """Saves a state that is the same on both ranks, then one that is not."""
    with join("cpu") as world:
        checkpointer = Checkpointer(Path(folder) / "checkpoints", world, keep=2, timeout_s=60)
        checkpointer.save(state(1))
        checkpointer.save(state(2, value=1e-30 * rank))
        failure = checkpointer.failure(wait=True)
        assert isinstance(failure, GanDistError)
        assert "rank(s) 1 of 2 do not hold rank 0's parameters" in str(failure)


def test_a_state_that_ranks_do_not_share_is_never_written(tmp_path: Path) -> None:
    run_ranks(2, save_as_rank, str(tmp_path))
    assert saved(tmp_path / "checkpoints") == ["latest", "step-00000001"]


def test_the_thread_takes_its_ranks_gpu_first_and_one_stream_for_all_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set_device {device}"))

    def noted(call: str, value: Any) -> Any:
        calls.append(call)
        return value

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("copy", nullcontext()))
    wait = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: noted("Stream", wait))
    checkpointer = Checkpointer(tmp_path / "checkpoints", World(device=device), keep=2, timeout_s=60)
    for step in (1, 2):
        checkpointer.save(state(step))
        assert checkpointer.failure(wait=True) is None
    assert calls == ["set_device cuda:1", "Stream", "copy", "set_device cuda:1", "copy"]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_save_waits_for_a_slow_device_and_not_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    goes_on = threading.Event()
    event = SimpleNamespace(query=goes_on.is_set)
    monkeypatch.setattr("gan_dist.training.checkpointer.record_event", lambda device: event)
    monkeypatch.setattr("gan_dist.training.checkpointer.WAIT_S", 0.01)
    checkpointer = Checkpointer(tmp_path / "checkpoints", World(), keep=2, timeout_s=0.1 if hangs else 60)
    monkeypatch.setattr(checkpointer, "_on_host", lambda state, copied: (goes_on.wait(60), to_host(state))[1])
    checkpointer.save(state(1))
    if hangs:
        with pytest.raises(DeviceHangs, match=r"did not finish a step within dist.timeout_s=0.1 s"):
            checkpointer.wait()
        goes_on.set()
    else:
        threading.Timer(0.1, goes_on.set).start()
        checkpointer.wait()
        assert saved(tmp_path / "checkpoints") == ["latest", "step-00000001"]


@pytest.mark.gpu
def test_on_a_gpu_what_is_saved_is_the_step_that_was_copied(tmp_path: Path) -> None:
    """Later steps overwrite the weights at once; the copy is made before them and read beside them."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", World(device=torch.device("cuda", 0)), keep=9, timeout_s=60)
    weights = torch.zeros(16, 1024, 1024, device="cuda")
    for step in range(1, 6):
        weights.fill_(step)
        snapshot = copy_state({"w": weights}, into=(checkpointer.previous_state() or {}).get("generator"))
        checkpointer.save({"step": step, "images_seen": 0, "generator": snapshot})
        weights.fill_(-1)
    assert checkpointer.failure(wait=True) is None
    for step in range(1, 6):
        loaded = checkpoint.load(checkpointer.directory / f"step-{step:08d}").state["generator"]["w"]
        assert loaded.device.type == "cpu" and bool((loaded == step).all())


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.ENOSPC])
def test_training_goes_on_without_a_disk_and_says_so(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, write = tmp_path / "run", write_hashed

    def refuse(path: Path, content: Any) -> tuple[str, int]:
        if f"step-{3:08d}" in str(path):
            raise OSError(number, "refused by the test")
        return write(path, content)

    monkeypatch.setattr(checkpoint, "write_hashed", refuse)
    words = ["checkpoint.every_steps=1", "log.scalars_every=1"]
    assert train(small(dataset), words, run_dir=run, max_steps=5).step == 5
    assert "WARNING: a checkpoint could not be saved" in capsys.readouterr().out
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert "refused by the test" in warning["reason"] and warning["step"] in (3, 4, 5)
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {f"step-{n:08d}" for n in (2, 4, 5)}


def test_a_stop_whose_checkpoint_fails_is_a_failure(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stop = tmp_path / "run", StopRequest()
    train(small(dataset), run_dir=run, max_steps=3, console=False)

    def refuse(path: Path, content: Any) -> tuple[str, int]:
        stop.ask("a test")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_hashed", refuse)
    with pytest.raises(GanDistError, match=r"could not be saved in .*No space left on device; earlier ones are"):
        train(small(dataset), ["checkpoint.every_steps=2"], run_dir=run, max_steps=500, stop=stop, console=False)
    assert find(run).step == 3
