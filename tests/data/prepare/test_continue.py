"""A dataset can be continued and mended when its sources only look different; what would change it is refused."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gan_dist.data.prepare.account import Account, TooManyRejects
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.staging import source_name, stage
from gan_dist.data.prepare.verify import repair_command, verify
from gan_dist.utils.errors import GanDistError, UserError
from tests.conftest import RunHere
from tests.helpers.server import Server
from tests.helpers.sources import balanced, contents, encode, fill


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


def pack(kind: str, path: Path, images: Sequence[int], seconds: int = 1000) -> Path:
    """Writes a source of this kind anew, whose files have one modification time and, but for their pixels, one size."""
    files = {f"{place:03d}.bmp": encode(seed, (8, 8), "BMP") for place, seed in enumerate(images)}
    if kind == "folder":
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
            os.utime(path / name, (seconds, seconds))
        return path
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    os.utime(path, (seconds, seconds))
    return path


EVERY_KIND = pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])


@EVERY_KIND
@pytest.mark.parametrize("finished", [True, False])
def test_every_kind_of_source_is_held_against_what_it_was(tmp_path: Path, kind: str, finished: bool) -> None:
    source, out, table = tmp_path / "in", tmp_path / "out", tmp_path / "t.csv"
    labels = {f"{i:03d}.bmp": "xy"[i % 2] for i in range(6)}

    def again() -> Account:
        table.write_text("f,l\n" + "".join(f"{name},{label}\n" for name, label in labels.items()))
        return prepare(source, out, workers=0, shard_samples=2, labels=f"{table}:f:l")

    pack(kind, source, range(6))
    again()
    whole = contents(out)
    if not finished:
        (out / "manifest.json").unlink()
        (out / ".prepare/shard-00002.tar.json").unlink()
    pack(kind, source, range(6), seconds=2000)
    notes = again().notes
    assert contents(out) == whole
    assert any("other modification times" in note for note in notes) == (kind != "zip")
    for other in ([9, *range(1, 6)], range(7), range(5)):
        pack(kind, source, other, seconds=3000)
        with pytest.raises(GanDistError, match="the sources changed"):
            again()
    pack(kind, source, range(6), seconds=4000)
    labels["003.bmp"] = "x"
    with pytest.raises(GanDistError, match=r"the sources changed since .* was begun: labels"):
        again()
    assert contents(out) == whole


@EVERY_KIND
@pytest.mark.parametrize("replacements", ["folder", "zip", "tar"])
def test_touched_replacements_are_the_same(tmp_path: Path, kind: str, replacements: str) -> None:
    source, new, out = pack(kind, tmp_path / "in", range(4)), tmp_path / "new", tmp_path / "out"
    pack(replacements, new, [7])
    prepare(source, out, workers=0, replacements=new)
    whole = contents(out)
    pack(replacements, new, [7], seconds=2000)
    assert prepare(source, out, workers=0, replacements=new).replaced == 1
    assert contents(out) == whole
    pack(replacements, new, [8], seconds=3000)
    with pytest.raises(GanDistError, match="1 changed"):
        prepare(source, out, workers=0, replacements=new)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "address"])
@pytest.mark.parametrize("manifest", [b"", b"{}", b'{"format": ', None])
def test_the_command_mends_a_damaged_manifest(tmp_path: Path, kind: str, manifest: bytes | None) -> None:
    (tmp_path / "web").mkdir()
    path, out = pack("tar" if kind == "tar" else "tar.gz", tmp_path / "web/in.tar", range(4)), tmp_path / "out"
    with Server(tmp_path / "web") as server:
        source = f"{server.address}/in.tar" if kind == "address" else str(path)
        prepare(source, out, workers=0)
        whole = contents(out)
        if manifest is None:
            (out / "manifest.json").unlink()
        else:
            (out / "manifest.json").write_bytes(manifest)
            with pytest.raises(UserError, match="gan-dist prepare"):
                verify(out)
        prepare(source, out, workers=0)
    assert contents(out) == whole


def test_a_copy_that_was_fetched_before_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    path, out = pack("tar", tmp_path / "web/in.tar", range(4)), tmp_path / "out"
    path.write_bytes(path.read_bytes().replace(b"BM", b"XX", 1))
    with Server(tmp_path / "web") as server:
        source = f"{server.address}/in.tar"
        for notes in (0, 1):
            with pytest.raises(TooManyRejects) as caught:
                prepare(source, out, workers=0)
            assert sum("to fetch them again" in note for note in caught.value.account.notes) == notes
        assert server.requests["in.tar"] == 1


@pytest.mark.parametrize("kind", ["tar.gz", "address", "pattern"])
def test_replacements_may_be_whatever_a_source_may_be(tmp_path: Path, kind: str) -> None:
    source, web = pack("folder", tmp_path / "in", range(4)), tmp_path / "web"
    web.mkdir()
    expected = prepare(source, tmp_path / "expected", workers=0, replacements=pack("zip", tmp_path / "new.zip", [7, 8]))
    with Server(web) as server:
        match kind:
            case "pattern":
                pack("tar", web / "a.tar", [7])
                pack("tar", web / "b.tar", [7, 8])
                with tarfile.open(web / "b.tar", "w") as archive:
                    data = encode(8, (8, 8), "BMP")
                    info = tarfile.TarInfo("001.bmp")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                new: str | Path = f"{web}/{{a,b}}.tar"
            case "address":
                pack("tar", web / "new.tar", [7, 8])
                new = f"{server.address}/new.tar"
            case _:
                new = pack("tar.gz", web / "new.tar.gz", [7, 8])
        account = prepare(source, tmp_path / "out", workers=0, replacements=new)
        assert account.replaced == expected.replaced == 2
        assert prepare(source, tmp_path / "out", workers=0, replacements=new).replaced == 2
    for name in ("shard-00000.tar", "rejects.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_replacements_of_nothing_are_told_by_an_example(tmp_path: Path) -> None:
    source = pack("folder", tmp_path / "in", range(2))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/other.png").write_bytes(encode(1))
    notes = prepare(source, tmp_path / "out", workers=0, replacements=tmp_path / "new").notes
    assert any("the first is 'other.png', the first image '000.bmp'" in note for note in notes)


def test_fetching_shows_progress_and_leaves_nothing_of_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    pack("tar.gz", tmp_path / "web/in.tar.gz", range(4))
    shown, said = list[tuple[str, int]](), list[str]()
    with Server(tmp_path / "web", lambda name, nth: "cut_at_once" if nth == 0 else None) as server:
        source, out = f"{server.address}/in.tar.gz", tmp_path / "out"
        staged = out / ".prepare/staged"
        staged.mkdir(parents=True)
        name = stage(source, tmp_path / "elsewhere").name
        for left in (f"{name}.abc.tmp", f"{name}.unpacked.abc.tmp"):
            (staged / left).write_bytes(b"half")
        (tmp_path / "web/in.tar.gz").write_bytes(b"no tar")
        with pytest.raises(UserError):
            prepare(source, out, workers=0, show=lambda verb, done, total: shown.append((verb, done)), log=said.append)
        assert not list(staged.glob("*.tmp"))
        pack("tar.gz", tmp_path / "web/in.tar.gz", range(4))
        server.requests.clear()  # the first request fails again
        prepare(source, out, workers=0, show=lambda verb, done, total: shown.append((verb, done)), log=said.append)
    assert shown[0] == ("fetching and unpacking, MB", 0) and ("preparing", 4) in shown
    assert any("trying again" in line for line in said)


def test_what_is_fetched_again_and_is_the_same_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    pack("tar", tmp_path / "web/in.tar", range(6))
    out = tmp_path / "out"
    with Server(tmp_path / "web") as server:
        source = f"{server.address}/in.tar"
        prepare(source, out, workers=0, shard_samples=2)
        whole = contents(out)
        (out / "shard-00001.tar").unlink()
        assert prepare(source, out, workers=0, shard_samples=2).notes == []
        assert contents(out) == whole
        pack("tar", tmp_path / "web/in.tar", [9, *range(1, 6)])
        (out / "shard-00001.tar").unlink()
        with pytest.raises(GanDistError, match="1 changed"):
            prepare(source, out, workers=0, shard_samples=2)


def test_a_complete_set_of_an_earlier_release_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    pack("tar", tmp_path / "web/in.tar", range(2))
    out = tmp_path / "out"
    with Server(tmp_path / "web") as server:
        for _ in range(2):
            prepare(f"{server.address}/in.tar", out, workers=0)
            command = json.loads((out / ".prepare/command.json").read_text())
            command.pop("inputs", None)
            (out / ".prepare/command.json").write_text(json.dumps(command))
        assert server.requests["in.tar"] == 1


def test_a_changed_archive_leaves_the_copy_that_others_may_read(tmp_path: Path) -> None:
    source = pack("tar.gz", tmp_path / "in.tar.gz", range(2))
    folder = tmp_path / "staged"
    copy = stage(str(source), folder)
    (folder / f"{copy.name}.other.tmp").write_bytes(b"being written")
    pack("tar.gz", source, range(3), seconds=2000)
    assert stage(str(source), folder) != copy and copy.exists()
    assert (folder / f"{copy.name}.other.tmp").exists()


def test_a_set_that_was_accepted_stays_so(tmp_path: Path, run_here: RunHere) -> None:
    """A lower limit of rejects takes nothing away, and the command to repair it keeps the earlier one."""
    source, out = fill(tmp_path / "in", 6, broken=4), tmp_path / "out"
    prepare(source, out, workers=0, max_reject_fraction=0.5)
    whole = contents(out)
    assert prepare(source, out, workers=0).written == 6
    assert contents(out) == whole
    (out / "manifest.json").unlink()
    done = run_here(*shlex.split(repair_command(out))[1:])
    assert done.returncode == 0, done.stderr
    assert contents(out) == whole


def test_a_shard_that_another_task_lost_is_missing_and_no_failed_write(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 8), tmp_path / "out"
    prepare(source, out, workers=0, shard_samples=4, task=(0, 2))
    (out / "shard-00000.tar").unlink()
    account = prepare(source, out, workers=0, shard_samples=4, task=(1, 2))
    assert not account.complete and any("by this command without --task" in note for note in account.notes)
    assert prepare(source, out, workers=0, shard_samples=4).complete and verify(out) == []


def test_of_equal_files_one_that_has_a_class_is_kept(tmp_path: Path) -> None:
    for name in ("a.png", "b/1.png", "c/2.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encode(1))
    (tmp_path / "in/b/other.png").write_bytes(encode(2))
    account = prepare(tmp_path / "in", tmp_path / "out", workers=0, dedupe=True, labels="folders")
    assert account.classes == {"b": 2} and account.unlabelled == 0 and account.duplicates == 2


@pytest.mark.parametrize("name", ["BZh9", "PAR1", "LZIP", "Rar!\x1a"])
def test_a_tars_first_name_may_begin_like_anything(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        info, data = tarfile.TarInfo(f"{name}/a.png"), encode(1)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    assert prepare(tmp_path / "in.tar", tmp_path / "out", workers=0).written == 1


def test_a_source_is_not_named_by_a_password() -> None:
    for text in ("http://me:hidden@host", "http://hidden@host/", "pipe:curl http://me:hidden@host/?a=hidden"):
        assert source_name(text) == "host"
    assert source_name("http://me:hidden@host/d/a@2.tar;token=hidden") == "a@2.tar"
    assert source_name("http://host/my pictures.tar?x=1") == "my pictures.tar"


@pytest.mark.parametrize("target", ["loop.png", "loop", "x" * 300, "nowhere"])
def test_a_link_that_cannot_be_followed_costs_itself_alone(tmp_path: Path, target: str) -> None:
    source = fill(tmp_path / "in", 4)
    for name in ("loop.png", "loop"):
        (source / name).symlink_to(target)
    account = prepare(source, tmp_path / "out", workers=0, max_reject_fraction=1)
    assert account.written == 4 and account.rejected == {"unreadable": 1} and balanced(account)


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
