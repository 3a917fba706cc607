"""Everything that goes wrong: nothing crashes, nothing is written outside OUT, every entry is accounted for."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare import workers
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.reading import Reader
from gan_dist.data.prepare.sources import list_source, open_source
from gan_dist.data.prepare.verify import verify
from gan_dist.data.remote import fetch
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.images import cmyk_jpeg, deep, with_alpha
from tests.helpers.images import encode as encode_image
from tests.helpers.sources import balanced, contents, encode, fill, rejects


def everything(folder: Path) -> dict[str, str]:
    """Writes a folder of good and bad files; returns the expected reason of each bad one."""
    good = {
        "gray.png": encode_image(Image.new("L", (50, 40), 9)),
        "bit.png": encode_image(Image.new("1", (50, 40), 1)),
        "deep.png": encode_image(deep(999, np.uint16)),
        "float.tif": encode_image(deep(0.3, np.float32), "TIFF"),
        "palette.png": encode_image(with_alpha("P")),
        "la.png": encode_image(with_alpha("LA")),
        "cmyk.jpg": cmyk_jpeg((10, 200, 30), 0),
        "ycck.jpg": cmyk_jpeg((10, 200, 30), 2),
        "progressive.jpg": encode_image(Image.new("RGB", (90, 80)), "JPEG", progressive=True),
        "frames.gif": encode_image(
            Image.new("L", (9, 9)), "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 5)]
        ),
        "really_a_png.jpg": encode(1),
        "v1.2.final.png": encode(2),
        "with space.png": encode(3),
        "\u00fcn\u00efc\u00f6d\u00e9 \u7d75.png": encode(4),
        "two\nlines.png": encode(5),
        "quote\"'`$(x).png": encode(6),
        "UPPER.PNG": encode(7),
        "no_ending": encode(8),
        "a/same.png": encode(9),
        "b/same.png": encode(10),
        os.fsdecode(b"latin\xe9.png"): encode(11),
        "x.jpg/inside.png": encode(12),  # a directory named x.jpg
    }
    jpeg = encode(20, (300, 200), "JPEG")
    bad = {
        "fifty_bytes.jpg": (jpeg[:50], "truncated"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not_an_image"),
        "empty.png": (b"", "empty"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(64), "unsupported"),
        "broken.png": (encode(21)[:17] + b"\7" + encode(21)[18:], "corrupt"),
    }
    for name, data in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "a/up").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")
    for junk in ("__MACOSX/._a.png", ".hidden.png", ".git/x.png", "Thumbs.db", "notes.txt", "more.zip", "README"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    return {name: reason for name, (_, reason) in bad.items()} | {"gone.jpg": "unreadable"}


@pytest.mark.filterwarnings("error")
def test_a_folder_of_everything(tmp_path: Path) -> None:
    expected = everything(tmp_path / "in")
    outside = contents(tmp_path / "in")
    account = prepare(
        tmp_path / "in", tmp_path / "out", resolution=32, workers=2, shard_samples=7, max_reject_fraction=1
    )
    assert balanced(account) and account.written == 22
    assert rejects(tmp_path / "out") == expected
    assert account.skipped == {
        "__MACOSX": 1,
        "dot file": 2,
        "system file": 1,
        "not an image: .txt": 1,
        "not an image": 1,
        "nested archive": 1,
        "special file": 1,
    }
    assert verify(tmp_path / "out") == []
    assert contents(tmp_path / "in") == outside and {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    dataset = open_dataset(tmp_path / "out")
    paths = [record["path"] for i in range(len(dataset.shard_sizes)) for record in dataset.records(i)]
    assert len(set(paths)) == 22 and {
        "a/same.png",
        "b/same.png",
        "two\nlines.png",
        os.fsdecode(b"latin\xe9.png"),
    } < set(paths)


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def patch(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_a_zip_of_everything(tmp_path: Path) -> None:
    names = ["../evil.png", "/abs.png", "..\\win.png", "ok/fine.png", "secret.png", "lies_low.png", "lies_high.png"]
    names += ["crc.png", "local.png", "inner.zip", "__MACOSX/._fine.png", "ok/.DS_Store", "odd_method.png"]
    path = write_zip(tmp_path / "in.zip", {name: encode(i) for i, name in enumerate(names)})
    with zipfile.ZipFile(path) as archive:
        places = {info.filename: info for info in archive.infolist()}

    def central(content: bytearray, name: str) -> int:
        return content.rindex(name.encode()) - 46

    def change(content: bytearray) -> None:
        content[central(content, "secret.png") + 8] |= 1
        for name, size in (("lies_low.png", 10), ("lies_high.png", 10**6)):
            struct.pack_into("<I", content, central(content, name) + 24, size)
        content[central(content, "crc.png") + 16] ^= 0xFF
        content[places["local.png"].header_offset] ^= 0xFF
        struct.pack_into("<H", content, central(content, "odd_method.png") + 10, 97)
        struct.pack_into("<H", content, places["odd_method.png"].header_offset + 8, 97)

    patch(path, change)
    account = prepare(path, tmp_path / "deep/out", workers=1, max_reject_fraction=1)
    assert balanced(account) and account.written == 4
    assert rejects(tmp_path / "deep/out") == {
        "secret.png": "encrypted",
        "lies_low.png": "bad_archive",
        "lies_high.png": "bad_archive",
        "crc.png": "bad_archive",
        "local.png": "bad_archive",
        "odd_method.png": "unsupported",
    }
    assert account.skipped == {"nested archive": 1, "__MACOSX": 1, "dot file": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_way_that_a_zip_packs(tmp_path: Path, method: int) -> None:
    write_zip(tmp_path / "in.zip", {f"{i}.png": encode(i) for i in range(3)}, method)
    assert prepare(tmp_path / "in.zip", tmp_path / "out", workers=0).written == 3


@pytest.mark.parametrize("case", ["zip", "tar", "tar in the middle", "tar.gz"])
def test_a_cut_archive_is_one_line(tmp_path: Path, case: str) -> None:
    if case == "zip":
        source = write_zip(tmp_path / "in.zip", {f"{i}.png": encode(i) for i in range(3)})
        source.write_bytes(source.read_bytes()[:-100])
    else:
        source = tmp_path / "in.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(fill(tmp_path / "pictures"), "p")
        content = bytearray(source.read_bytes())
        if case == "tar in the middle":  # tarfile would take this for the end, and say nothing
            content[content.index(b"p/b/005") + 3] ^= 0xFF
        elif case == "tar":
            content = content[: len(content) // 2 + 77]
        source.write_bytes(gzip.compress(bytes(content))[:-50] if case == "tar.gz" else content)
    with pytest.raises(UserError, match="cut short") as caught:
        prepare(source, tmp_path / "out", workers=0)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Returns zips (deflated, stored, lzma) and a tar of the same pictures, one of them without an ending."""
    folder = tmp_path_factory.mktemp("archives")
    members = {name: encode(i, (9, 7)) for i, name in enumerate(("0.png", "1.png", "none"))}
    ways = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA)
    made = [write_zip(folder / f"{way}.zip", members, way) for way in ways]
    with tarfile.open(folder / "in.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return [path.read_bytes() for path in (*made, folder / "in.tar")]


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_archives_never_crash(
    archives: list[bytes], tmp_path: Path, which: int, changes: list[tuple[float, int]]
) -> None:
    content = bytearray(archives[which])
    for where, value in changes:
        content[-1 - int(where * (min(len(content), 700) - 1))] = value  # where a zip's directory lies
        content[int(where**3 * (len(content) - 1))] = value
    path = tmp_path / "archive"
    path.write_bytes(content)
    try:
        source = open_source(path, "archive")
        entries = list_source(source, 0).entries
    except UserError as error:
        assert "\n" not in str(error)
        return
    with closing(Reader([source])) as reader:
        for entry in entries:
            with contextlib.suppress(Rejected):  # SourceChanged cannot be: nobody wrote into it meanwhile
                assert len(reader.read(entry)) == entry.size


def write_shard(path: Path, first: int, count: int) -> Path:
    """Writes a foreign WebDataset shard: an image, a caption, a class and metadata a sample."""
    with tarfile.open(path, "w") as archive:
        for i in range(first, first + count):
            parts = {"jpg": encode(i, format="JPEG"), "txt": b"a cat", "cls": str(10 + i % 2).encode(), "json": b"{}"}
            for ending, data in parts.items():
                info = tarfile.TarInfo(f"{i:05d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = Path(self.server.folder, self.path[1:]).read_bytes()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_foreign_shards_by_pattern_address_and_pipe_are_the_same_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        write_shard(folder / f"{i:03d}.tar", 4 * i, 4)
    account = prepare(f"{folder}/{{000..001}}.tar", tmp_path / "local", workers=0)
    assert balanced(account) and account.written == 8
    assert account.classes == {"10": 4, "11": 4}
    assert account.skipped == {"beside an image: .cls": 8, "beside an image: .json": 8, "beside an image: .txt": 8}
    dataset = open_dataset(tmp_path / "local")
    assert [record["label"] for record in dataset.records(0)] == [0, 1] * 4
    prepare(f"pipe:cat {folder}/000.tar", tmp_path / "piped", workers=0)
    for i in range(2):
        with gzip.open(folder / f"{i}.tar.gz", "wb") as packed:
            packed.write((folder / f"{i:03d}.tar").read_bytes())
    assert prepare([folder / "0.tar.gz", folder / "1.tar.gz"], tmp_path / "packed", workers=0).written == 8
    shards = [(tmp_path / name / "shard-00000.tar").read_bytes() for name in ("local", "packed")]
    assert shards[0] == shards[1]
    assert not (tmp_path / "packed/.prepare/staged").exists()
    (folder / "0.tar.gz").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        prepare([folder / "0.tar.gz"], tmp_path / "none", workers=0)
    if shutil.which("curl") is None:
        return
    server = HTTPServer(("127.0.0.1", 0), Server)
    server.folder = folder  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{000..001}}.tar"
    prepare(url, tmp_path / "http", workers=0)
    server.shutdown()
    server.server_close()
    assert (tmp_path / "http/shard-00000.tar").read_bytes() == shards[0]
    account = prepare(url, tmp_path / "http", workers=0)  # whole: nothing is fetched again
    assert (account.entries, account.written, account.complete) == (0, 8, True)


def test_what_was_fetched_broken_is_fetched_again(tmp_path: Path) -> None:
    source = write_shard(tmp_path / "in.tar", 0, 4)
    whole = source.read_bytes()
    source.write_bytes(whole[:9000])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"source pipe:cat {source} is a tar that is .* cut short"):
        prepare(f"pipe:cat {source}", tmp_path / "out", workers=0)
    source.write_bytes(whole)
    assert prepare(f"pipe:cat {source}", tmp_path / "out", workers=0).written == 4


def test_an_address_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RetryPolicy", partial(fetch.RetryPolicy, backoff_s=0.01))
    with pytest.raises(GanDistError, match="fetched"):
        prepare("pipe:exit 3", tmp_path / "out", workers=0)


def test_a_crashing_decoder_costs_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker dies by its own hand on one file: a module that stands before gan_dist in its path sees to it."""
    fill(tmp_path / "in", 40)
    (tmp_path / "in/a/bomb.png").write_bytes(encode(0) + b"BOMB")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/struck.py").write_text(
        "import os, gan_dist.data.prepare.workers as w\n"
        "real = w.square\n"
        "def square(data, recipe):\n"
        "    if data.endswith(b'BOMB'): os.abort()\n"
        "    return real(data, recipe)\n"
        "w.square = square\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(workers, "WORKER_CODE", "import struck; " + workers.WORKER_CODE)
    account = prepare(tmp_path / "in", tmp_path / "out", workers=2)
    assert balanced(account) and account.written == 40
    assert rejects(tmp_path / "out") == {"a/bomb.png": "decoder_crashed"}


@pytest.mark.chaos  # waits for the limit four times
def test_a_hanging_decoder_costs_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "in", 6)
    (tmp_path / "in/a/bomb.png").write_bytes(encode(0) + b"BOMB")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/stuck.py").write_text(
        "import time, gan_dist.data.prepare.workers as w\n"
        "real = w.square\n"
        "def square(data, recipe):\n"
        "    if data.endswith(b'BOMB'): time.sleep(60)\n"
        "    return real(data, recipe)\n"
        "w.square = square\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(workers, "WORKER_CODE", "import stuck; " + workers.WORKER_CODE)
    monkeypatch.setattr(workers, "TIME_LIMIT_S", 3.0)
    account = prepare(tmp_path / "in", tmp_path / "out", workers=1, max_reject_fraction=1)
    assert rejects(tmp_path / "out") == {"a/bomb.png": "timed_out"} and account.written == 6


def test_a_group_mate_can_read_and_verify(tmp_path: Path) -> None:
    """Under umask 027 every file is group-readable; checked by a process of that group, where the system has one."""
    before = os.umask(0o027)
    try:
        prepare(fill(tmp_path / "in"), tmp_path / "out", workers=1)
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path
    if os.getuid() != 0:
        return
    for folder in [*(tmp_path / "out").parents][:-1]:
        if folder != Path("/tmp") and str(folder).startswith("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o050)
    program = (
        "import os, sys; from gan_dist.data.prepare.verify import verify; out, group = sys.argv[1:]\n"
        "os.setgroups([]); os.setgid(int(group)); os.setuid(65534)\n"
        "sys.exit(len(verify(out)))"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "out"), str(tmp_path.stat().st_gid)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
