"""A dataset can be continued and mended when its sources only look different; what would change it is refused."""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.verify import repair_command, verify
from gan_dist.utils.errors import GanDistError, UserError
from tests.conftest import RunHere
from tests.helpers.server import Server
from tests.helpers.sources import contents, encode, fill


def touch(source: Path, out: Path) -> None:
    for path in source.rglob("*.*"):
        if path.is_file():
            os.utime(path, (1, 1))


def stray(source: Path, out: Path) -> None:
    for name in (".DS_Store", "a/Thumbs.db", "b/notes.txt", "a/more.zip"):
        (source / name).write_bytes(b"junk")
    (source / "read.me").unlink()


def older_pillow(source: Path, out: Path) -> None:
    plan = out / ".prepare/plan.json"
    stored = json.loads(plan.read_text())
    stored["recipe"]["decoders"]["pillow"] = "1.0"
    plan.write_text(json.dumps(stored))


def same_bytes_again(source: Path, out: Path) -> None:
    for path in source.rglob("*.png"):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)


LOOKS: dict[str, Callable[[Path, Path], None]] = {
    "other times": touch,
    "stray files": stray,
    "another Pillow": older_pillow,
    "written again": same_bytes_again,
}


def begin(tmp_path: Path) -> tuple[Path, Path]:
    source = fill(tmp_path / "in", 12, broken=1)
    (source / "read.me").write_text("about")
    prepare(source, tmp_path / "out", workers=0, shard_samples=4, max_reject_fraction=1, labels="folders")
    return source, tmp_path / "out"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("names", [*[[name] for name in LOOKS], list(LOOKS)])
def test_the_command_that_verify_names_mends_a_set_that_only_looks_different(
    tmp_path: Path, names: list[str], finished: bool, run_here: RunHere
) -> None:
    source, out = begin(tmp_path)
    whole = contents(out)
    (out / "shard-00001.tar").unlink()
    if not finished:
        (out / "manifest.json").unlink()
        (out / ".prepare/shard-00002.tar.json").unlink()
    for name in names:
        LOOKS[name](source, out)
    said = str(verify(out)[0]) if finished else repair_command(out)
    command = shlex.split(said.partition("`")[2].partition("`")[0] or said)
    done = run_here(*command[1:])
    assert done.returncode == 0, done.stderr
    assert verify(out) == []
    after = contents(out)
    for name in whole:
        if name != ".prepare/plan.json":  # in which the test itself wrote
            assert json_free(after[name]) == json_free(whole[name]), name


def json_free(data: bytes) -> bytes:
    return data.replace(b'"pillow": "1.0"', b"").replace(PILLOW, b"")


PILLOW = b'"pillow": "' + __import__("PIL").__version__.encode() + b'"'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda source: (source / "a/000.jpg").write_bytes(encode(77, (9, 7), "JPEG")),
            "1 changed .first in/'a/000.jpg'",
        ),
        (lambda source: (source / "a/new.png").write_bytes(encode(77)), "1 added"),
        (lambda source: (source / "b/001.png").unlink(), "1 removed"),
        (lambda source: (source / "b").rename(source / "c"), "added"),
    ],
)
def test_what_would_change_the_dataset_is_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    source, out = begin(tmp_path)
    change(source)
    with pytest.raises(GanDistError, match=message):
        prepare(source, out, workers=0, shard_samples=4, max_reject_fraction=1, labels="folders")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda source: (source / "!first.png").write_bytes(encode(77)), "1 added .first in/'!first.png'.:"),
        (lambda source: (source / "a/000.jpg").unlink(), "1 removed .first in/'a/000.jpg'.:"),
        (lambda source: [(source / f"a/{name}").unlink() for name in ("000.jpg", "004.png")], "2 removed [^,]*:"),
    ],
)
def test_what_came_or_went_is_told_from_what_was_only_touched(
    tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    """It moves the keys of the files after it, and may leave fewer shards than there were."""
    source, out = begin(tmp_path)
    touch(source, out)
    change(source)
    with pytest.raises(GanDistError, match=f"the sources changed since {out} was begun: {says}"):
        prepare(source, out, workers=0, shard_samples=4, max_reject_fraction=1, labels="folders")


def test_other_content_of_the_same_size_is_refused(tmp_path: Path) -> None:
    source, out = begin(tmp_path)
    path = source / "b/001.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(GanDistError, match="1 changed"):
        prepare(source, out, workers=0, shard_samples=4, max_reject_fraction=1, labels="folders")


def test_other_labels_are_refused(tmp_path: Path) -> None:
    source, table = fill(tmp_path / "in", 4), tmp_path / "t.csv"
    table.write_text("f,l\n000.jpg,x\n001.png,y\n")
    spec = f"{table}:f:l"
    prepare(source, tmp_path / "out", workers=0, labels=spec)
    table.write_text("f,l\n000.jpg,x\n001.png,y\n\n")  # the same labels
    prepare(source, tmp_path / "out", workers=0, labels=spec)
    table.write_text("f,l\n000.jpg,y\n001.png,x\n")
    with pytest.raises(GanDistError, match="labels"):
        prepare(source, tmp_path / "out", workers=0, labels=spec)
    with pytest.raises(UserError, match="another recipe"):
        prepare(source, tmp_path / "out", workers=0, labels=spec, resolution=32)


@pytest.mark.parametrize("fault", [None, "damaged", "no image"])
def test_a_dataset_keeps_no_password(tmp_path: Path, fault: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    content = {None: {"a.png": encode(1)}, "no image": {"a.txt": b"x"}, "damaged": {"a.png": encode(1)}}[fault]
    folder, out = tmp_path / "web", tmp_path / "out"
    folder.mkdir()
    with tarfile.open(folder / "in.tar.gz", "w:gz") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if fault == "damaged":
        (folder / "in.tar.gz").write_bytes((folder / "in.tar.gz").read_bytes()[:-20])
    with Server(folder) as server:
        address = server.address.replace("//", "//me:hidden1@") + "/in.tar.gz?v=1&token=hidden2"
        if fault:
            with pytest.raises(UserError, match=r"me:\*\*\*@.*token=\*\*\*") as caught:
                prepare(address, out, workers=0)
            said = str(caught.value)
        else:
            prepare(address, out, workers=0)
            assert server.requests["in.tar.gz"] == 1
            again = address.replace("hidden", "new")
            assert prepare(again, out, workers=0).written == 1 and server.requests["in.tar.gz"] == 1
            prepare(again.replace("v=1", "v=2"), out, workers=0)
            assert server.requests["in.tar.gz"] == 2
            said = repair_command(out)
            assert "me:***@" in said and "v=2" in said
            (out / "shard-00000.tar").unlink()
            assert "` again, with your own words for each *** (" in str(verify(out)[0])
            command = out / ".prepare/command.json"  # as an earlier release stored it
            command.write_text(command.read_text().replace("me:***", "me:hidden3"))
            assert repair_command(out) == said
            command.write_text(command.read_text().replace("hidden3", "***"))
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hidden" in data or b"new1" in data for data in kept)
    assert "hidden" not in said + capsys.readouterr().out
