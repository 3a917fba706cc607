"""verify names every fault, and the command that it gives mends it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gan_dist.data.prepare import prepare
from gan_dist.data.verify import verify
from gan_dist.errors import UserError
from tests.data.test_prepare import contents, fill


def flip(path: Path, place: int) -> None:
    """Inverts one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        ("pixel", "shard-00001.tar", "sha256"),
        ("header in the middle", "shard-00001.tar", "no tar header where sample 1"),
        ("array header in the middle", "shard-00001.tar", "no uint8"),
        ("truncated", "shard-00001.tar", "bytes, expected"),
        ("missing", "shard-00001.tar", "cannot be read"),
        ("sidecar missing", "shard-00001.jsonl", "cannot be read"),
        ("sidecar short", "shard-00001.jsonl", "has 3 records, expected 4"),
        ("sidecar words", "shard-00001.jsonl", "sha256"),
        ("sidecar keys", "shard-00001.jsonl", "other keys"),
        ("rejects", "rejects.jsonl", "lists"),
    ],
)
def test_every_fault_is_named_and_mended_by_its_command(tmp_path: Path, damage: str, file: str, what: str) -> None:
    source, out = fill(tmp_path / "in put", broken=1), tmp_path / "out"
    prepare(source, out, shard_samples=4, max_reject_fraction=0.5, workers=0)
    assert verify(out) == []
    before = contents(out)
    shard, sidecar = out / "shard-00001.tar", out / "shard-00001.jsonl"
    if damage == "pixel":
        flip(shard, 13312 + 5000)
    elif damage == "header in the middle":
        flip(shard, 13312 + 2)
    elif damage == "array header in the middle":
        flip(shard, 13312 + 512 + 20)
    elif damage == "truncated":
        shard.write_bytes(before[shard.name][:-10240])
    elif damage in ("missing", "sidecar missing"):
        (out / file).unlink()
    elif damage == "sidecar short":
        sidecar.write_bytes(b"\n".join(before[sidecar.name].splitlines()[:3]) + b"\n")
    elif damage == "sidecar words":
        sidecar.write_bytes(before[sidecar.name].replace(b"RGB", b"BGR", 1))
    elif damage == "sidecar keys":
        sidecar.write_bytes(before[sidecar.name].replace(b'"key": 4', b'"key": 9', 1))
    else:
        (out / file).write_bytes(b"")
    faults = verify(out)
    assert [(fault.file, what in fault.what) for fault in faults] == [(file, True)]
    words = shlex.split(faults[0].mend.split("`")[1])
    assert words[:4] == ["gan-dist", "prepare", str(source), str(out)]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options == {"--shard-samples": "4", "--max-reject-fraction": "0.5"}
    prepare(words[2], words[3], shard_samples=4, max_reject_fraction=0.5, workers=0)
    assert verify(out) == [] and contents(out) == before


def test_a_stray_shard_is_named(tmp_path: Path) -> None:
    prepare(fill(tmp_path / "in"), tmp_path / "out", workers=0)
    (tmp_path / "out/shard-00009.tar").write_bytes(b"x")
    assert [(fault.file, fault.what) for fault in verify(tmp_path / "out")] == [
        ("shard-00009.tar", "is not in the manifest")
    ]


def test_no_dataset_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a dataset"):
        verify(tmp_path)
