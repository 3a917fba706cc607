"""Archives as people have them: a tar, a zip and the folder that they were made from are the same dataset."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare import staging
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.sources import list_source, open_source
from gan_dist.utils.errors import UserError
from tests.helpers.images import encode as encode_image
from tests.helpers.images import plain
from tests.helpers.sources import balanced, encode, rejects


def add(archive: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            add(archive, name, data)
    return stream.getvalue()


def dataset(out: Path) -> tuple[bytes, list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the shard, and records and rejects without the names of sources."""
    records = [json.loads(line) for line in (out / "shard-00000.jsonl").read_text().splitlines()]
    rejected = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    strip = [{name: value for name, value in record.items() if name != "source"} for record in (*records, *rejected)]
    return (out / "shard-00000.tar").read_bytes(), strip[: len(records)], strip[len(records) :]


def paths(out: Path) -> list[str]:
    return [record["path"] for record in dataset(out)[1]]


NAMES = st.sampled_from(
    [
        "a.png",
        "b/a.png",
        "b/c/d.png",
        "b/\u00fc.png",
        "n.txt",
        "@eaDir/x.png",
        ".store/y.png",
        "bad.png",
        "b/none",
        "C/A.PNG",
        "z z.png",
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.integers(0, 5), min_size=2), st.integers(0, 3), st.booleans(), st.data())
def test_folder_tar_and_zip_are_one_dataset(
    tmp_path: Path, files: dict[str, int], links: int, by_dot: bool, data: st.DataObject
) -> None:
    for used in tmp_path.iterdir():
        shutil.rmtree(used) if used.is_dir() else used.unlink()
    source = tmp_path / "in"
    for name, seed in ({"sure.png": 9} | files).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        content = b"junk" if "bad" in name or name.endswith("txt") else encode(seed, (9, 7))
        (source / name).write_bytes(content)
    for number in range(links):
        target = data.draw(st.sampled_from(["sure.png", *files, "nowhere.png"]))
        name = f"link {number}" + data.draw(st.sampled_from([".png", "", ".txt", ". of a man"]))
        if data.draw(st.booleans()) and (source / target).exists():
            os.link(source / target, source / name)
        else:
            (source / name).symlink_to(target)
    format = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
    with tarfile.open(tmp_path / "in.tar", "w", format=format) as archive:
        if by_dot:
            archive.add(source, ".")
        for path in [] if by_dot else sorted(source.iterdir(), reverse=True):
            archive.add(path, path.name)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as packed:
        for path in sorted(source.rglob("*")):
            name = str(path.relative_to(source))
            if path.is_symlink():
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, 0o120777 << 16
                packed.writestr(info, str(path.readlink()))
            elif path.is_file():
                packed.write(path, name)
    for name in ("in", "in.tar", "in.zip"):
        account = prepare(tmp_path / name, tmp_path / f"out-{name}", workers=0, max_reject_fraction=1, resolution=8)
        assert balanced(account)
    assert dataset(tmp_path / "out-in") == dataset(tmp_path / "out-in.tar") == dataset(tmp_path / "out-in.zip")


@pytest.mark.parametrize("zeros", [0, 1, 40])
@pytest.mark.parametrize("way", ["plain", "gzip members", "bz2", "xz"])
def test_tars_one_after_the_other_are_all_read(tmp_path: Path, way: str, zeros: int) -> None:
    parts = [tar({f"{i}.png": encode(i), f"{i}.txt": b"x"}) + bytes(512 * zeros) for i in range(3)]
    packed = {
        "plain": b"".join(parts),
        "gzip members": b"".join(map(gzip.compress, parts)),
        "bz2": bz2.compress(b"".join(parts)),
        "xz": lzma.compress(parts[0]) + lzma.compress(parts[1] + parts[2]),
    }
    (tmp_path / "in.tar").write_bytes(packed[way])
    account = prepare(tmp_path / "in.tar", tmp_path / "out", workers=0)
    assert balanced(account) and paths(tmp_path / "out") == ["0.png", "1.png", "2.png"]


def test_what_follows_a_tar_and_is_none_is_an_error(tmp_path: Path) -> None:
    second = bytearray(tar({"b.png": encode(2)}))
    second[3] ^= 1
    (tmp_path / "in.tar").write_bytes(tar({"a.png": encode(1)}) + second)
    with pytest.raises(UserError, match=r"in\.tar is a tar that is damaged or cut short"):
        prepare(tmp_path / "in.tar", tmp_path / "out", workers=0)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_and_versions_in_a_tar(tmp_path: Path, format: int) -> None:
    with tarfile.open(tmp_path / "in.tar", "w", format=format) as archive:
        add(archive, "a.png", encode(1))
        add(archive, "b/hard.png", b"", type=tarfile.LNKTYPE, linkname="a.png")
        add(archive, "b/soft.png", b"", type=tarfile.SYMTYPE, linkname="../a.png")
        add(archive, "b/chain.png", b"", type=tarfile.SYMTYPE, linkname="soft.png")
        add(archive, "broken.png", b"", type=tarfile.SYMTYPE, linkname="none.png")
        add(archive, "c.png", encode(2))
    with tarfile.open(tmp_path / "in.tar", "a") as archive:
        add(archive, "./c.png", encode(3))
    account = prepare(tmp_path / "in.tar", tmp_path / "out", workers=0, max_reject_fraction=1)
    assert balanced(account) and account.rejected == {"unreadable": 1} and account.skipped == {"older version": 1}
    assert paths(tmp_path / "out") == ["a.png", "b/chain.png", "b/hard.png", "b/soft.png", "c.png"]
    assert any("1 members are there again" in note for note in account.notes)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/c.png").write_bytes(encode(3))
    prepare(tmp_path / "new", tmp_path / "out-new", workers=0)
    last, new = (open_dataset(tmp_path / out).shard_view(0).numpy()[-1] for out in ("out", "out-new"))
    assert np.array_equal(last, new)


def test_classes_may_be_links(tmp_path: Path) -> None:
    """Of WebDataset's samples, as of images: to what was there, or is there in the end."""
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for number in range(5):
            add(archive, f"{number}.png", encode(number))
        add(archive, "0.cls", b"cat")
        add(archive, "1.cls", b"", type=tarfile.LNKTYPE, linkname="0.cls")
        add(archive, "2.cls", b"", type=tarfile.SYMTYPE, linkname="names/dog.txt")
        add(archive, "3.cls", b"", type=tarfile.SYMTYPE, linkname="nowhere")
        add(archive, "0.cls", b"cow\n")
        add(archive, "names/dog.txt", b"dog")
    account = prepare(tmp_path / "in.tar", tmp_path / "out", workers=0)
    assert account.classes == {"cat": 1, "cow": 1, "dog": 1} and account.unlabelled == 2
    others = {"beside an image: .cls": 4, "not an image: .txt": 1, "older version": 1}
    assert balanced(account) and account.skipped == others
    labels = [record.get("label") for record in dataset(tmp_path / "out")[1]]
    assert labels == [1, 0, 2, None, None]


def test_a_hard_link_is_the_version_that_was_there(tmp_path: Path) -> None:
    """As unpacking has it, which then replaces the file, but not what is linked."""
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        add(archive, "a.png", encode(1))
        add(archive, "b.png", b"", type=tarfile.LNKTYPE, linkname="./a.png")
        add(archive, "a.png", encode(2))
    (tmp_path / "in").mkdir()
    for name, seed in (("a.png", 2), ("b.png", 1)):
        (tmp_path / "in" / name).write_bytes(encode(seed))
    for name in ("in", "in.tar"):
        prepare(tmp_path / name, tmp_path / f"out-{name}", workers=0)
    assert dataset(tmp_path / "out-in") == dataset(tmp_path / "out-in.tar")


@pytest.mark.parametrize("name", ["/a/b.png", "../a/b.png", "//.././a//b.png", "./a/./b.png", "a/b.png"])
def test_members_are_where_unpacking_puts_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.tar").write_bytes(tar({name: encode(1)}))
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), encode(1))
    for ending in ("tar", "zip"):
        prepare(tmp_path / f"in.{ending}", tmp_path / ending, workers=0)
        assert paths(tmp_path / ending) == ["a/b.png"]


def test_the_last_of_a_zips_versions_counts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for seed in (1, 2, 3):
            archive.writestr("a.png", encode(seed))
    account = prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    assert balanced(account) and account.skipped == {"older version": 2} and account.written == 1


def test_sparse_members_are_whole(tmp_path: Path) -> None:
    data = encode_image(plain(0, "L", (700, 700)), "BMP")
    data = data[:1078] + bytes(len(data) - 1078 - 70_000) + b"\xff" * 70_000
    (tmp_path / "in/\u00c9douard").mkdir(parents=True)
    with (tmp_path / "in/\u00c9douard/scan.bmp").open("wb") as stream:
        stream.write(data[:1078])
        stream.seek(len(data) - 70_000)
        stream.write(data[-70_000:])
    (tmp_path / "in/a.png").write_bytes(encode(1))
    prepare(tmp_path / "in", tmp_path / "out", workers=0)
    for format in ("gnu", "posix"):
        target = str(tmp_path / f"{format}.tar")
        packed = ["tar", f"--format={format}", "-S", "-cf", target, "-C", str(tmp_path / "in"), "."]
        subprocess.run(packed, check=True)
        with tarfile.open(tmp_path / f"{format}.tar") as archive:
            assert any(member.issparse() for member in archive)
        prepare(tmp_path / f"{format}.tar", tmp_path / f"out-{format}", workers=0)
        assert dataset(tmp_path / f"out-{format}") == dataset(tmp_path / "out")


def test_a_tar_of_the_oldest_kind_may_end_with_a_zip(tmp_path: Path) -> None:
    """It has no signature, and what it ends with looks like a zip's end."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.png").write_bytes(encode(number))
    with zipfile.ZipFile(tmp_path / "in/more.zip", "w") as archive:
        archive.writestr("inner.png", encode(9))
    names = ["0.png", "1.png", "2.png", "more.zip"]
    packed = ["tar", "--format=v7", "-cf", str(tmp_path / "in.tar"), "-C", str(tmp_path / "in"), *names]
    subprocess.run(packed, check=True)
    account = prepare(tmp_path / "in.tar", tmp_path / "out", workers=0)
    assert paths(tmp_path / "out") == names[:3] and account.skipped == {"nested archive": 1}


def test_a_zip_from_windows_has_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("cats\\a.png", "dogs\\b.png"):
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, 0
            archive.writestr(info, encode(1))
    account = prepare(tmp_path / "in.zip", tmp_path / "out", workers=0, labels="folders")
    assert account.classes == {"cats": 1, "dogs": 1} and paths(tmp_path / "out") == ["cats/a.png", "dogs/b.png"]


def test_the_unicode_name_of_a_zip_counts(tmp_path: Path) -> None:
    raw, right = b"M?hle.png", "M\u00fchle.png"
    field = b"\1" + struct.pack("<I", zlib.crc32(raw)) + right.encode()
    stale = b"\1" + struct.pack("<I", 1) + b"other.png"
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name, extra in ((raw.decode(), field), ("kept.png", stale)):
            info = zipfile.ZipInfo(name)
            info.extra = struct.pack("<HH", 0x7075, len(extra)) + extra
            archive.writestr(info, encode(1))
    prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    assert paths(tmp_path / "out") == [right, "kept.png"]


def test_a_name_that_says_that_it_is_unicode_is_not_read_twice(tmp_path: Path) -> None:
    """These letters' bytes in the old code are those of another name in UTF-8."""
    name, field = "\u251c\u255d.png", b"\1" + struct.pack("<I", 0) + b"other.png"
    assert name.encode("cp437").decode() == "\u00fc.png"
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        info = zipfile.ZipInfo(name)
        info.extra = struct.pack("<HH", 0x7075, len(field)) + field
        archive.writestr(info, encode(1))
    prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    assert paths(tmp_path / "out") == [name]


@pytest.mark.parametrize("root", ["/", "./", "//", "\\"])
def test_the_root_folder_in_a_zip_is_no_file(tmp_path: Path, root: str) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        info = zipfile.ZipInfo("x")
        info.filename, info.create_system = root, 0
        archive.writestr(info, b"")
        archive.writestr("a.png", encode(1))
    account = prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    assert (account.seen, account.skipped, paths(tmp_path / "out")) == (1, {}, ["a.png"])


def test_names_in_unicode_that_do_not_say_so(tmp_path: Path) -> None:
    """As macOS and many programs of Unix write them; those of old Windows programs are no UTF-8."""
    names = ["Mu\u0308ller/\u00e9.png", "\u7d75.png"]
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in (*names, "M#ller.png"):
            archive.writestr(zipfile.ZipInfo(name), encode(1))
    data = bytearray((tmp_path / "in.zip").read_bytes().replace(b"M#ller", "M\u00fcller".encode("cp437")))
    for signature, place in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        for match in re.finditer(re.escape(signature), bytes(data)):
            data[match.start() + place] &= ~0x08
    (tmp_path / "in.zip").write_bytes(data)
    prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    assert paths(tmp_path / "out") == sorted([*names, "M\u00fcller.png"], key=str.encode)


@pytest.mark.parametrize(
    ("names", "code", "expected"),
    [
        (["\u5199\u771f/\u30bd.png", "\u5199\u771f/a.png"], "cp932", ["\u5199\u771f/a.png", "\u5199\u771f/\u30bd.png"]),
        (["\u8868\\\u8868\\\u30bd.png"], "cp932", ["\u8868/\u8868/\u30bd.png"]),
        (["Men\u00fc\\a.png"], "cp437", ["Men\u00fc/a.png"]),
        (
            ["Menu\\a.png", "Men\u00fc\\b.png", "Caf\u00e9.png"],
            "cp437",
            ["Caf\u00e9.png", "Menu/a.png", "Men\u00fc/b.png"],
        ),
    ],
)
def test_a_letter_of_two_bytes_is_not_cut_by_a_backslash(
    tmp_path: Path, names: list[str], code: str, expected: list[str]
) -> None:
    """A Japanese letter may have one as its second byte. It separates folders in zips of other languages."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for number, name in enumerate(names):
            info = zipfile.ZipInfo(str(number).rjust(len(name.encode(code)), "?"))
            info.create_system = 0
            archive.writestr(info, encode(1))
    content = (tmp_path / "in.zip").read_bytes()
    for number, name in enumerate(names):
        raw = name.encode(code)
        content = content.replace(str(number).rjust(len(raw), "?").encode(), raw)
    (tmp_path / "in.zip").write_bytes(content)
    prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    assert paths(tmp_path / "out") == expected


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
MAGIC = {"gz": b"\x1f\x8b", "bz2": b"BZh[1-9]", "xz": b"\xfd7zXZ\0"}


@pytest.mark.parametrize("ending", PACK)
def test_what_follows_a_compressed_tar_is_said_or_refused(tmp_path: Path, ending: str) -> None:
    packed, path = PACK[ending](tar({"a.png": encode(1)})), tmp_path / f"in.tar.{ending}"
    for number, (more, said) in enumerate(((bytes(700), ""), (b"\n", "has 1 bytes"), (b"signature", "has 9 bytes"))):
        path.write_bytes(packed + more)
        account = prepare(path, tmp_path / str(number), workers=0)
        assert account.written == 1 and "".join(account.notes).startswith(f"{path.name} {said}" if said else "")
        assert len(account.notes) == bool(said)
    second = bytearray(PACK[ending](tar({"b.txt": os.urandom(100_000)})))
    second[0] ^= 1  # it is no other stream any more
    for bad in (
        packed + second,
        packed + PACK[ending](tar({"b.png": encode(2)}))[:-4],
        packed[:-4],
        packed[:-9] + b"x",
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"in\.tar\.{ending} is .*damaged.*: fetch it again"):
            prepare(path, tmp_path / "bad", workers=0)


@pytest.mark.parametrize("block", [7, 64, 2**20])
@pytest.mark.parametrize("ending", PACK)
def test_streams_are_unpacked_a_block_at_a_time(ending: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little may become very much, or nothing; and streams begin anywhere in a block, with zeros between them."""
    monkeypatch.setattr(staging, "_BLOCK", block)
    parts = [bytes(20_000), os.urandom(300), b"", b"abc" * 4000]
    zeros = (bytes(0), bytes(1), bytes(131), bytes(9))
    packed = b"".join(PACK[ending](part) + zero for part, zero in zip(parts, zeros, strict=True))
    pieces = list(staging._unpacked(io.BytesIO(packed + b"stray"), MAGIC[ending]))
    assert b"".join(pieces) == b"".join(parts) + b"stray"
    assert max(map(len, pieces)) <= max(block, len(b"stray"))


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
def test_a_damaged_compressed_tar_is_one_line(tmp_path: Path, ending: str, where: float) -> None:
    raw = tar({f"{i}.jpg": encode(i, (200, 150), "JPEG") for i in range(30)})
    whole = {"gz": gzip.compress(raw), "bz2": bz2.compress(raw), "xz": lzma.compress(raw)}
    packed = bytearray(whole[ending])
    place = int(where * len(packed))
    packed[place : place + 300] = bytes(300)
    (tmp_path / f"in.tar.{ending}").write_bytes(packed)
    with pytest.raises(UserError, match=rf"in\.tar\.{ending} is .*damaged.*: fetch it again"):
        prepare(tmp_path / f"in.tar.{ending}", tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive: unpack it"),
        ("a.rar", b"Rar!\x1a\x07\x01" + bytes(99), "a rar archive: unpack it"),
        ("train.parquet", b"PAR1" + bytes(99), "a parquet table: write its images"),
        ("train.arrow", b"ARROW1" + bytes(99), "an Arrow table: write its images"),
        ("a.tar.lz4", b"\x04\x22\x4d\x18" + bytes(99), r"compressed with lz4: unpack it \(`lz4 -d`\)"),
        ("a.tar.lz", b"LZIP\1" + bytes(99), "compressed with lzip"),
        ("a.iso", bytes(2**15) + b"\1CD001" + bytes(99), "holds no image.* bytes after its end mark"),
        ("shard.tar", b"", "is empty: fetch it again"),
        ("set.z01", b"PK\7\x08PK\3\4" + bytes(99), "one part of several of a split zip"),
        ("set.z02", b"\x99" * 900, "one part of several"),
        ("set.tar.aa", b"\x99" * 900, "one part of several"),
        ("what.bin", b"\x99" * 900, "neither a folder nor a zip nor a tar"),
    ],
)
def test_what_is_no_source_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    """As a shell's `<(...)` is one. Nothing is read of it, which could last for ever."""
    os.mkfifo(tmp_path / "in.tar")
    holder = os.open(tmp_path / "in.tar", os.O_RDWR)
    os.write(holder, tar({"a.png": encode(1)})[:4096])
    with pytest.raises(UserError, match=r"in\.tar is a pipe or a device.*: copy it into a file"):
        prepare(tmp_path / "in.tar", tmp_path / "out", workers=0)
    assert len(os.read(holder, 5000)) == 4096
    os.close(holder)


def test_a_bad_member_of_a_zip_costs_itself_alone(tmp_path: Path) -> None:
    """Nothing can be said of one without an ending that cannot be looked into, but that it may be an image."""
    unread = {"damaged": {"CRC": 1}, "packed": {"compress_type": 93}, "secret": {"flag_bits": 1}}
    bad = {f"{kind}{rest}": fields for kind, fields in unread.items() for rest in ("", " link.png", ".txt")}
    field = struct.pack("<HH", 0x7075, 50) + b"\1abc"
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in (*bad, "ok.png", "link.png", "field.png", "bytes\u00e9.png", "", "notes"):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16 if "link" in name else 0
            info.extra = field if "field" in name else b""
            archive.writestr(info, b"ok.png" if "link" in name else b"text" if name == "notes" else encode(1))
            for attribute, value in bad.get(name, {}).items():
                setattr(info, attribute, value)
        packed = [info.header_offset for info in archive.infolist() if info.compress_type == 93]
    content = bytearray((tmp_path / "in.zip").read_bytes().replace(b"bytes\xc3\xa9", b"bytes\xff\xfe"))
    for place in packed:
        content[place + 8] = 93
    (tmp_path / "in.zip").write_bytes(content)
    account = prepare(tmp_path / "in.zip", tmp_path / "out", workers=0, max_reject_fraction=1)
    assert balanced(account)
    assert account.skipped == {"not an image": 1, "not an image: .txt": 3, "member without a name": 1}
    reasons = {"damaged": "bad_archive", "packed": "unsupported", "secret": "encrypted"}
    assert rejects(tmp_path / "out") == {name: reasons[name.split()[0]] for name in bad if "txt" not in name}
    assert paths(tmp_path / "out") == ["bytes\udcff\udcfe.png", "field.png", "link.png", "ok.png"]


def test_a_zips_comment_may_look_like_its_end(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("a.png", encode(1))
        archive.comment = b"about PK\5\6" + b"y" * 40
    assert prepare(tmp_path / "in.zip", tmp_path / "out", workers=0).written == 1


def test_the_last_part_of_a_split_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", encode(1))
    data = bytearray((tmp_path / "set.zip").read_bytes())
    end = data.rindex(b"PK\5\6")
    data[end + 4] = 3  # it is disk 3
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(UserError, match="one part of several of a split zip"):
        prepare(tmp_path / "set.zip", tmp_path / "out", workers=0)


def test_zstd_is_read_where_it_can_be_and_named_elsewhere(tmp_path: Path) -> None:
    """Two frames, made by hand, of one uncompressed block a 128 KiB; between them one that holds nothing."""
    raw = tar({"a.png": encode(1)})
    frame = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(raw))
    for start in range(0, len(raw), 2**17):
        block = raw[start : start + 2**17]
        frame += struct.pack("<I", (start + 2**17 >= len(raw)) | len(block) << 3)[:3] + block
    (tmp_path / "in.tar.zst").write_bytes(frame + b"\x5f\x2a\x4d\x18\4\0\0\0more" + frame)
    try:
        assert prepare(tmp_path / "in.tar.zst", tmp_path / "out", workers=0).skipped == {"older version": 1}
    except UserError as error:
        assert "zstd -d" in str(error) and not (tmp_path / "out").exists()


def test_folders_of_systems_and_devices_are_no_pictures(tmp_path: Path) -> None:
    names = ["@eaDir/a.jpg", "@tmp", "#recycle/x", "@Recycle", "#snapshot", "~snapshot/daily.0", "@Recently-Snapshot"]
    names += ["$RECYCLE.BIN", "RECYCLER", "FOUND.000", "System Volume Information"]
    names += ["FOUND.017", "@quarantine", "_vti_cnf", "@SynoResource", "@appstore", "_gsdata_"]
    names += ["lost+found", "Network Trash Folder", "Temporary Items"]
    pictures = ["@artist", "found.1", "recycle", "x_vti_cnf"]
    for name in (*names, *pictures):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "p.png").write_bytes(encode(1))
    account = prepare(tmp_path / "in", tmp_path / "out", workers=0)
    assert account.skipped == {"system folder": len(names)} and paths(tmp_path / "out") == [
        f"{name}/p.png" for name in pictures
    ]


def test_links_through_linked_folders_are_followed(tmp_path: Path) -> None:
    """As the folder's own files are: a tar and what it unpacks to are the same."""
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        add(archive, "././real/a.png", encode(1))
        add(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname="real/a.png")
        add(archive, "twice.png", b"", type=tarfile.LNKTYPE, linkname="hard.png")
        add(archive, "short", b"", type=tarfile.SYMTYPE, linkname="real")
        add(archive, "deep/shorter", b"", type=tarfile.SYMTYPE, linkname="../short")
        add(archive, "deep/b.png", b"", type=tarfile.SYMTYPE, linkname="shorter/a.png")
        add(archive, "loop.png", b"", type=tarfile.SYMTYPE, linkname="loop.png")
    account = prepare(tmp_path / "in.tar", tmp_path / "out", workers=0, max_reject_fraction=1)
    assert balanced(account) and account.rejected == {"unreadable": 1}
    assert paths(tmp_path / "out") == ["deep/b.png", "hard.png", "real/a.png", "twice.png"]


def test_links_to_folders_are_no_images(tmp_path: Path) -> None:
    """What lies in the folders is counted where it lies, images or not."""
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name in ("deep/real/a.png", "texts/a.txt"):
            add(archive, name, encode(1))
        for number, target in enumerate(("deep", "deep/real", "texts", ".", "deep/real/a.png")):
            add(archive, f"{number}.png", b"", type=tarfile.SYMTYPE, linkname=target)
    account = prepare(tmp_path / "in.tar", tmp_path / "out", workers=0)
    assert balanced(account) and account.skipped == {"link to a folder": 4, "not an image: .txt": 1}
    assert paths(tmp_path / "out") == ["4.png", "deep/real/a.png"]


def test_links_take_no_longer_to_list_than_files(tmp_path: Path) -> None:
    """Three times as long at the most, however many there are."""
    seconds = {}
    for kind in ("files", "links"):
        with tarfile.open(tmp_path / f"{kind}.tar", "w") as archive:
            for i in range(4000):
                add(archive, f"pool/{i:06d}.png", b"x")
                link = {"type": tarfile.SYMTYPE, "linkname": f"../pool/{i:06d}.png"}
                add(archive, f"by class/{i:06d}.png", b"", **(link if kind == "links" else {}))
        began = time.process_time()
        listing = list_source(open_source(tmp_path / f"{kind}.tar", kind), 0)
        seconds[kind] = time.process_time() - began
        assert len(listing.entries) == 8000
    assert seconds["links"] < 3 * seconds["files"], seconds


def test_zips_one_after_the_other_are_not_lost(tmp_path: Path) -> None:
    zips = []
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.png", encode(1))
            archive.comment = b"" if name == "a" else b"a remark"
        zips.append((tmp_path / f"{name}.zip").read_bytes())
    for both in (zips, zips[::-1], zips[:1] * 2):
        (tmp_path / "in.zip").write_bytes(b"".join(both))
        with pytest.raises(UserError, match=r"in\.zip is several zips in one file"):
            prepare(tmp_path / "in.zip", tmp_path / "out", workers=0)
    (tmp_path / "in.zip").write_bytes(b"#!/bin/sh\n" * 50 + zips[0])  # one that unpacks itself
    assert prepare(tmp_path / "in.zip", tmp_path / "out", workers=0).written == 1


def tar_dataset(tmp_path: Path, name: str, content: bytes) -> tuple[list[str], list[str]]:
    """Returns the paths that are written of a tar of this content, and the notes."""
    (tmp_path / f"{name}.tar").write_bytes(content)
    account = prepare(tmp_path / f"{name}.tar", tmp_path / name, workers=0)
    return paths(tmp_path / name), account.notes


@pytest.mark.parametrize("stray", [b"signature 0123", b"\xff" * 700, os.urandom(5000), b"text of a log\n" * 40_000])
def test_stray_bytes_after_a_tar_are_said_and_passed_over(tmp_path: Path, stray: bytes) -> None:
    found, notes = tar_dataset(tmp_path, "t", tar({"a.png": encode(1), "b.png": encode(2)}) + stray)
    assert found == ["a.png", "b.png"]
    assert [note for note in notes if "no archive: left out" in note] == notes and f"{len(stray):,} bytes" in notes[0]


def test_what_may_be_a_second_archive_after_a_tar_is_not_passed_over(tmp_path: Path) -> None:
    """Damaged at its beginning, or of another kind."""
    first, second = tar({"a.png": encode(1)}), tar({"b.png": encode(2), "c.png": encode(3)})
    broken = b"?" * 300 + second[300:]
    old = bytearray(tar({"b.png": encode(2)}))
    old[257:500] = bytes(243)  # version 7 has no signature
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 8 * 32 + sum(old[156:512]))
    assert tar_dataset(tmp_path, "two", first + bytes(old))[0] == ["a.png", "b.png"]
    for number, more in enumerate(
        (broken, b"junk" + second, gzip.compress(second), bz2.compress(second), b"PK\3\4zip")
    ):
        with pytest.raises(UserError, match="damaged or cut short"):
            tar_dataset(tmp_path, f"t{number}", first + more)
