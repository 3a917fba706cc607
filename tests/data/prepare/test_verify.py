"""verify names every fault, and the command that it names repairs it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.verify import verify
from gan_dist.utils.errors import UserError
from tests.helpers.sources import contents, fill


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
    words = shlex.split(faults[0].repair.split("`")[1])
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


ODD: tuple[Any, ...] = (None, "x", -1, 2**70, 1.5, [], {}, "../../x.tar", [1], float("nan"))


def test_a_manifest_of_nonsense_is_a_fault_or_one_line(tmp_path: Path) -> None:
    """Every field of it, one after the other, is replaced by things that have no business there."""
    out = tmp_path / "out"
    prepare(fill(tmp_path / "in", 4, broken=1), out, max_reject_fraction=1, workers=0)
    good = json.loads((out / "manifest.json").read_bytes())
    shard = good["shards"][0]
    bad = [good | {name: odd} for name in good for odd in ODD]
    bad += [good | {"shards": [shard | {name: odd}]} for name in shard for odd in ODD]
    bad += [good | {"totals": good["totals"] | {name: odd}} for name in good["totals"] for odd in ODD]
    for manifest in bad:
        (out / "manifest.json").write_text(json.dumps(manifest))
        for look in (verify, open_dataset):
            try:
                look(out)
            except UserError as error:
                assert "\n" not in str(error)


def test_a_damaged_manifest_is_mended_by_the_command_that_made_it(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in put", 4), tmp_path / "out"
    prepare(source, out, shard_samples=2, workers=0)
    whole = contents(out)
    (out / "manifest.json").write_bytes(whole["manifest.json"][:-100])
    with pytest.raises(
        UserError, match=r"manifest\.json is damaged .*: run `gan-dist prepare .* --shard-samples 2 .*` again"
    ) as caught:
        verify(out)
    words = shlex.split(str(caught.value).split("`")[1])
    assert words[2:4] == [str(source), str(out)]
    prepare(source, out, shard_samples=2, workers=0)
    assert verify(out) == [] and contents(out) == whole
    newer = json.loads(whole["manifest.json"]) | {"format": 99}
    (out / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="reads up to 1: update gan_dist"):
        verify(out)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_damaged_notes_of_a_preparation_are_noticed(notes: tuple[Path, dict[str, bytes]], place: int, by: int) -> None:
    """A byte is changed in what OUT/.prepare holds of a finished shard: it is written again, to the same bytes."""
    root, whole = notes
    name = ".prepare/shard-00000.tar.json"
    content = bytearray(whole[name])
    content[place % len(content)] ^= by
    (root / "out" / name).write_bytes(content)
    account = prepare(root / "in", root / "out", max_reject_fraction=1, workers=0)
    assert account.written == 4
    assert contents(root / "out") | {name: b""} == whole | {name: b""}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("notes")
    prepare(fill(root / "in", 4, broken=1), root / "out", max_reject_fraction=1, workers=0)
    return root, contents(root / "out")
