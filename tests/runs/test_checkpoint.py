"""Checkpoints: complete or invisible, verified before use, the older kept until the newer is sound."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.runs import checkpoint
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import write_hashed


def state(step: int) -> dict[str, Any]:
    weights = torch.full((64,), float(step))
    return {"format": 1, "step": step, "images_seen": 12 * step, "generator": {"w": weights}, "config": {"seed": 0}}


def save_steps(directory: Path, *steps: int, keep: int = 3, **facts: Any) -> None:
    for step in steps:
        checkpoint.save(directory, state(step), facts, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, dataset="abc")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert (found.step, found.state["images_seen"], found.manifest["dataset"]) == (2, 24, "abc")
    assert torch.equal(found.state["generator"]["w"], torch.full((64,), 2.0))
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_only_the_newest_and_the_marked_are_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), {"kept": True}, keep=2)
    save_steps(tmp_path, 2, 3, 4, 5, keep=2)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000004", "step-00000005"]


def test_an_unsound_later_step_neither_counts_nor_displaces_a_sound_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 30, keep=2)
    (tmp_path / "step-00000030" / "state.pt").write_bytes(b"damaged")
    save_steps(tmp_path, 20, keep=1)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 20
    save_steps(tmp_path, 30, keep=1)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 30 and not found.skipped


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, replace_by_directory])
def test_a_damaged_newest_is_passed_over_and_said(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / file)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 1
    assert len(found.skipped) == 1 and "step-00000002" in found.skipped[0]


def test_a_flipped_bit_in_the_state_is_found(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip_a_bit(tmp_path / "step-00000002" / "state.pt")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 1
    assert "does not match the sha256" in found.skipped[0]


def test_latest_is_only_a_courtesy(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "latest").write_text("step-00000099\n")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 2


def test_none_sound_is_an_error_and_none_at_all_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "nothing") is None
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(tmp_path / checkpoint.directory_name(step) / "state.pt")
    before = names(tmp_path)
    with pytest.raises(GanDistError, match="no sound checkpoint"):
        checkpoint.load_newest(tmp_path)
    assert names(tmp_path) == before


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["MALICE"],))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALICE", str(tmp_path / "executed"))
    directory = tmp_path / "checkpoints"
    save_steps(directory, 1)
    checkpoint.save(directory, {"step": 2, "images_seen": 0, "generator": {}, "x": 1}, {}, keep=3)
    content = pickle.dumps(Malice())
    torch.save({"step": 2, "images_seen": 0, "generator": Malice()}, directory / "step-00000002" / "state.pt")
    for payload in (content, (directory / "step-00000002" / "state.pt").read_bytes()):
        (directory / "step-00000002" / "state.pt").write_bytes(payload)
        entry = {"sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
        (directory / "step-00000002" / "manifest.json").write_text(
            json.dumps({"format": 1, "files": {"state.pt": entry}})
        )
        found = checkpoint.load_newest(directory)
        assert found is not None and found.step == 1
        assert "more than tensors" in found.skipped[0]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("refused", ["write_hashed", "write_durably", "fsync_folder"])
def test_a_disk_that_refuses_leaves_the_older_one_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    save_steps(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, refused, fail)
        with pytest.raises(OSError, match="No space"):
            save_steps(tmp_path, 2)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 1
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_a_save_writes_torchs_own_file_and_copies_nothing_in_python(tmp_path: Path) -> None:
    # A copy that Python makes, and torch's writing into one, hold up every other thread: the training's, for one.
    large = {**state(1), "generator": {"w": torch.randn(2**22), "b": torch.randn(3, 5)}}
    buffer = io.BytesIO()
    torch.save(large, buffer)
    tracemalloc.start()
    try:
        path = checkpoint.save(tmp_path, large, {}, keep=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (path / "state.pt").read_bytes() == buffer.getvalue()
    assert peak < 2**20 < len(buffer.getvalue())
    assert torch.equal(checkpoint.load(path).state["generator"]["w"], large["generator"]["w"])


class SmallDisk(io.FileIO):
    """A file on a disk with `room` for so many bytes."""

    room = 0

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_a_full_disk_is_one_wherever_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> tuple[str, int]:
        return write_hashed(tmp_path / "state", lambda file: torch.save({"w": torch.zeros(500), "b": 1}, file))

    _, size = write()
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: SmallDisk(path, mode))
    for SmallDisk.room in range(0, size, 97):
        with pytest.raises(OSError, match="No space left on device") as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
    SmallDisk.room = size
    assert write()[1] == size


def test_leftovers_of_a_killed_save_are_invisible_and_go(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".saving-step-00000002-dead")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.step == 1 and not found.skipped
    save_steps(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


def test_finding_a_step(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 1, 2)
    assert checkpoint.find(tmp_path, 1).step == 1
    assert checkpoint.find(tmp_path).step == 2
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has: 2, 1"):
        checkpoint.find(tmp_path, 7)
    with pytest.raises(UserError, match="no run at"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoints yet"):
        checkpoint.find(tmp_path / "empty")


def test_room_for_two_checkpoints(tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 1, "generator": {"w": torch.zeros(1000)}, "optimizer": [{"m": torch.zeros(500)}]}
    checkpoint.check_disk(tmp_path, state)
    huge = {"w": torch.zeros(1, dtype=torch.float64).expand(2**50)}  # no memory behind it
    with pytest.raises(GanDistError, match=r"MiB free, but two checkpoints take 17,179,869,184 MiB; free some space"):
        checkpoint.check_disk(tmp_path, huge)
