"""What is an image, what is an archive, and what a source that cannot be read costs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import pytest

from gan_dist.data.prepare import labels, workers, zips
from gan_dist.data.prepare.images import Recipe
from gan_dist.data.prepare.matching import Matches, match
from gan_dist.data.prepare.plan import Options, make_plan
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.sources import Entry
from gan_dist.data.prepare.workers import JOB_ENTRIES, JOB_SQUARES, make_jobs
from gan_dist.utils.errors import GanDistError
from tests.helpers.sources import balanced, encode, fill, rejects

LIMITED = """
import resource, sys
from gan_dist.data.prepare.prepare import prepare
from gan_dist.utils.errors import GanDistError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
try:
    prepare(sys.argv[3:], sys.argv[2], workers=0)
except GanDistError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def many_zips(folder: Path, count: int) -> list[Path]:
    """Writes zips of one picture each and returns their paths."""
    paths = [folder / f"{i:03d}.zip" for i in range(count)]
    for i, path in enumerate(paths):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", encode(i))
    return paths


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_an_archive_is_what_it_begins_with(tmp_path: Path, ending: str) -> None:
    """A tar that ends with a stored zip has a zip's end too; a zip may begin with a stored tar."""
    inner, source = tmp_path / "inner", tmp_path / f"in.{ending}"
    members = {"a.png": encode(1), "b.png": encode(2)}
    if ending == "tar":
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr("c.png", encode(3))
        with tarfile.open(source, "w") as out:
            for name, data in (members | {"z.zip": inner.read_bytes()}).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    else:
        with tarfile.open(inner, "w") as out:
            out.add(fill(tmp_path / "pictures"), "p")
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in ({"0.tar": inner.read_bytes()} | members).items():
                archive.writestr(name, data)
    account = prepare(source, tmp_path / "out", workers=0)
    assert balanced(account) and account.written == 2 and account.skipped == {"nested archive": 1}
    assert any("not opened" in note for note in account.notes)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_unknown_endings_are_judged_by_content_and_known_ones_by_name(tmp_path: Path, kind: str) -> None:
    pictures = ["Mona Lisa, c. 1503", "IMG.1503", "photo.jpg ", "wget.jpg?w=300", "none"]
    others = ["x.\udcff\udcfe", "x.a\nb", "x.1503", "thumb.nef", "README"]
    files = {name: encode(i) for i, name in enumerate(pictures)} | dict.fromkeys(others, b"text")
    files["thumb.nef"] = encode(9)  # a raw photograph would pass as the small TIFF that it begins with
    if kind == "zip":
        files = {name: data for name, data in files.items() if "\udcff" not in name}
    source = tmp_path / "in"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif kind == "tar":
        with tarfile.open(tmp_path / "in.tar", "w") as out:
            out.add(source, "in")
    account = prepare(source if kind == "folder" else tmp_path / f"in.{kind}", tmp_path / "out", workers=0)
    assert balanced(account) and account.written == 5
    kinds = {"not an image": 2 + (kind != "zip"), "not an image: .1503": 1, "not an image: .nef": 1}
    assert account.skipped == kinds
    assert all(line.isascii() and "\n" not in line for line in account.lines())


def test_more_archives_than_files_that_may_be_open(tmp_path: Path) -> None:
    zips = many_zips(tmp_path, 60)
    command = [sys.executable, "-c", LIMITED, "50", str(tmp_path / "out"), *map(str, zips)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rejects(tmp_path / "out") == {}


def test_no_more_open_files_is_one_line_and_no_pictures_fault(tmp_path: Path) -> None:
    zips = many_zips(tmp_path, 20)
    command = [sys.executable, "-c", LIMITED, "12", str(tmp_path / "out"), *map(str, zips)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot be read now (Too many open files)" in done.stderr and done.stderr.count("\n") == 1
    command[3] = "50"
    assert subprocess.run(command, check=False).returncode == 0
    assert rejects(tmp_path / "out") == {}


def test_workers_that_cannot_start_are_one_line_and_no_pictures_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORKER_CODE", "raise SystemExit(7)")
    with pytest.raises(GanDistError, match=r"ended before its first picture \(status 7\)"):
        prepare(fill(tmp_path / "in"), tmp_path / "out", workers=2)
    monkeypatch.undo()
    assert prepare(tmp_path / "in", tmp_path / "out", workers=2).written == 10


UNPRIVILEGED = """
import os, sys
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.verify import verify
from gan_dist.utils.errors import UserError
source, out, locked = sys.argv[1:]
prepare(source + "/b", out + "0", workers=0)  # imports all, before the rights to do so are gone
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
prepare(source, out, workers=0, max_reject_fraction=1)
for call in (
    lambda: prepare(source, locked + "/deep/out", workers=0),
    lambda: prepare(locked + "/in.zip", out + "1", workers=0),
    lambda: prepare(source, out + "1", workers=0, replacements=locked + "/in.zip"),
    lambda: verify(locked + "/out"),
):
    try:
        call()
    except UserError as error:
        print(error)
"""


def test_what_may_not_be_read_is_a_reject_or_one_line(tmp_path: Path) -> None:
    """By somebody who is not root: an image without rights to it, and a folder that may not be entered."""
    (fill(tmp_path / "in") / "a/004.png").chmod(0)
    (tmp_path / "locked").mkdir(mode=0)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o777)
    command = [sys.executable, "-c", UNPRIVILEGED, *(str(tmp_path / name) for name in ("in", "out", "locked"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rejects(tmp_path / "out") == {"a/004.png": "unreadable"}
    lines = done.stdout.splitlines()
    assert [line.split(":")[-1].split(";")[0].strip() for line in lines[:3]] == [
        f"no permission to write in {tmp_path}/locked",
        "Permission denied",
        "Permission denied",
    ]
    assert len(lines) == 4 and "is not a dataset: no readable manifest.json (Permission denied)" in lines[3]
    assert not (tmp_path / "out1").exists()


@pytest.mark.parametrize(("resolution", "most"), [(64, JOB_ENTRIES), (1024, 10), (4096, 1)])
def test_a_jobs_answer_is_small_at_any_resolution(tmp_path: Path, resolution: int, most: int) -> None:
    jobs = make_jobs([Entry(0, str(i), 10, "") for i in range(100)], resolution)
    assert sum(map(len, jobs)) == 100 and max(map(len, jobs)) == most
    assert most == 1 or most * 3 * resolution**2 <= JOB_SQUARES


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_listing_tells_how_many_files_there_are(tmp_path: Path, kind: str) -> None:
    source = fill(tmp_path / "in", 4)
    for i in range(300):
        (source / f"{i}.txt").write_text("x")
    if kind == "tar":
        with tarfile.open(tmp_path / "in.tar", "w") as out:
            out.add(source, "in")
    elif kind == "zip":
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for path in source.rglob("*.*"):
                archive.write(path, path.relative_to(source))
    seen: list[int] = []
    path = source if kind == "folder" else tmp_path / f"in.{kind}"
    prepare(
        path,
        tmp_path / "out",
        workers=0,
        show=lambda verb, done, total: seen.append(done) if verb == "listing" else None,
    )
    assert seen[0] == 0 and seen[-1] >= 304 and seen == sorted(seen)


def test_listing_and_matching_show_progress_while_one_directory_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip's directory is read in one go: nothing would be heard of it for long if it is a big one."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", encode(number))
    (tmp_path / "labels.csv").write_text("file,style\n0.png,x\n1.png,y\n")
    read, calls = zips.members, list[str]()

    def slowly(stream: IO[bytes]) -> list[zips.Member]:
        time.sleep(0.7)
        calls.append("read")
        return read(stream)

    def match_slowly(*arguments: Any) -> Matches:
        time.sleep(0.5)
        return match(*arguments)

    monkeypatch.setattr(zips, "members", slowly)
    monkeypatch.setattr(labels, "match", match_slowly)
    table = f"{tmp_path / 'labels.csv'}:file:style"
    plan = make_plan(
        [(tmp_path / "in.zip", "in.zip")],
        Options(Recipe(16), labels=table),
        tmp_path / "out",
        show=lambda verb, done, total: calls.append(verb),
    )
    assert calls[:3] == ["listing"] * 3  # before the directory was read
    assert calls.count("matching paths") >= 3
    assert plan.ids == [0, 1, None]
