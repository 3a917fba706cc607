"""The set as Kaggle ships it: two zips, replacements for corrupted files, and a table of styles."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.prepare import prepare
from gan_dist.utils.errors import UserError
from tests.helpers.sources import balanced, encode


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    """Writes a zip and returns its path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Writes train.zip, test.zip, the replacements and the table, in small."""
    cut = encode(1, format="JPEG")[:100]
    train = {f"train/{i}.jpg": encode(i, format="JPEG") for i in range(1, 11)} | {
        "train/3.jpg": cut,
        "train/7.jpg": cut,
    }
    test = {f"test/{i}.jpg": encode(i, format="JPEG") for i in range(11, 15)} | {"test/12.jpg": cut}
    mended = {f"train/{i}.jpg": encode(i, format="JPEG") for i in (3, 7)} | {"test/12.jpg": encode(12, format="JPEG")}
    mended |= {"__MACOSX/train/._3.jpg": b"x", "train/99.jpg": encode(99), "train/.DS_Store": b"x"}
    write_zip(tmp_path / "train.zip", train)
    write_zip(tmp_path / "test.zip", test)
    write_zip(tmp_path / "replacements_for_corrupted_files.zip", mended)
    rows = [f'{i}.jpg,"Artist, {i}",{["Impressionism", "Baroque", ""][i % 3]}' for i in range(1, 14)]
    (tmp_path / "all_data_info.csv").write_text("\ufeffnew_filename,artist,style\n" + "\n".join(rows) + "\n")
    return tmp_path


def test_kaggles_set_as_it_comes(kaggle: Path) -> None:
    account = prepare(
        [kaggle / "train.zip", kaggle / "test.zip"],
        kaggle / "out",
        replacements=kaggle / "replacements_for_corrupted_files.zip",
        labels=f"{kaggle}/all_data_info.csv:new_filename:style",
        workers=0,
    )
    assert balanced(account)
    assert (account.seen, account.written, account.replaced, account.rejected) == (20, 14, 3, {})
    assert account.skipped == {"__MACOSX": 1, "dot file": 1, "replacement of nothing": 1}
    assert account.classes == {"Baroque": 5, "Impressionism": 4} and account.unlabelled == 5 and account.ambiguous == 0
    dataset = open_dataset(kaggle / "out")
    assert dataset.manifest.classes == ("Baroque", "Impressionism")
    records = {record["path"]: (i, record) for i, record in enumerate(dataset.records(0))}
    assert list(records) == [f"train/{i}.jpg" for i in (1, 10, 2, 3, 4, 5, 6, 7, 8, 9)] + [
        f"test/{i}.jpg" for i in range(11, 15)
    ]
    place, record = records["train/3.jpg"]
    assert (
        record["replaced_by"] == "replacements_for_corrupted_files.zip/train/3.jpg" and record["source"] == "train.zip"
    )
    assert np.array_equal(dataset.shard_view(0)[place].numpy(), square(encode(3, format="JPEG"), Recipe()).pixels)
    assert records["train/4.jpg"][1]["label"] == 0 and records["train/3.jpg"][1]["label"] == 1
    assert "label" not in records["test/14.jpg"][1]


def test_replacements_match_by_path_before_name_and_never_twice(tmp_path: Path) -> None:
    broken = b"broken"
    write_zip(tmp_path / "in.zip", {"a/1.png": broken, "b/1.png": broken, "c/2.png": broken, "c/3.png": encode(3)})
    write_zip(tmp_path / "new.zip", {"b/1.png": encode(1), "x/2.png": encode(2), "x/1.png": encode(4)})
    account = prepare(
        tmp_path / "in.zip", tmp_path / "out", replacements=tmp_path / "new.zip", workers=0, max_reject_fraction=1
    )
    assert balanced(account)
    assert (account.replaced, account.skipped, account.rejected) == (
        2,
        {"ambiguous replacement": 1},
        {"not_an_image": 1},
    )
    rejected = json.loads((tmp_path / "out/rejects.jsonl").read_text())
    assert rejected["path"] == "a/1.png"


@pytest.mark.parametrize("unpacked", [False, True])
def test_replacements_find_the_folder_that_is_meant(tmp_path: Path, unpacked: bool) -> None:
    """The same names in train and test, as archives with or without the folder inside, or unpacked."""
    for part in ("train", "test"):
        members = {f"{i}.png": b"broken" for i in range(3)}
        if unpacked:
            (tmp_path / part).mkdir()
            for name, data in members.items():
                (tmp_path / part / name).write_bytes(data)
        else:
            write_zip(tmp_path / f"{part}.zip", members)
    new = {"new/train/0.png": encode(10), "new/test/0.png": encode(20), "new/train/1.png": encode(11), "2.png": b""}
    ending = "" if unpacked else ".zip"
    account = prepare(
        [tmp_path / f"train{ending}", tmp_path / f"test{ending}"],
        tmp_path / "out",
        replacements=write_zip(tmp_path / "new.zip", new),
        workers=0,
        max_reject_fraction=1,
    )
    assert balanced(account)
    assert (account.seen, account.replaced, account.skipped) == (10, 3, {"ambiguous replacement": 1})
    dataset = open_dataset(tmp_path / "out")
    for record, pixels in zip(dataset.records(0), dataset.shard_view(0).numpy(), strict=True):
        seed = {"train/0.png": 10, "train/1.png": 11, "test/0.png": 20}[
            f"{record['source'].removesuffix('.zip')}/{record['path']}"
        ]
        assert np.array_equal(pixels, square(encode(seed), Recipe()).pixels)


def test_two_replacements_for_one_are_reported(tmp_path: Path) -> None:
    write_zip(tmp_path / "in.zip", {"a/1.png": b"broken", "a/2.png": encode(2)})
    write_zip(tmp_path / "new.zip", {"x/1.png": encode(1), "y/1.png": encode(3)})
    account = prepare(
        tmp_path / "in.zip", tmp_path / "out", replacements=tmp_path / "new.zip", workers=0, max_reject_fraction=1
    )
    assert balanced(account) and (account.replaced, account.skipped) == (0, {"ambiguous replacement": 2})


def test_folders_as_labels(tmp_path: Path) -> None:
    members = {
        "set/cats/1.png": encode(1),
        "set/dogs/1.png": encode(2),
        "set/dogs/2.png": encode(3),
        "top.png": encode(4),
    }
    account = prepare(write_zip(tmp_path / "in.zip", members), tmp_path / "out", labels="folders", workers=0)
    assert account.classes == {"cats": 1, "dogs": 2} and account.unlabelled == 1


def test_a_table_matches_by_path_then_by_unique_name(tmp_path: Path) -> None:
    members = {f"{name}.png": encode(i) for i, name in enumerate(["a/1", "b/1", "a/2", "a/3", "a/4"])}
    source = write_zip(tmp_path / "in.zip", members)
    (tmp_path / "t.csv").write_text("f,l\na/1.png,x\n1.png,y\nin/a/2.png,y\n3.png,x\n4.png,x\n4.png,y\n")
    account = prepare(source, tmp_path / "out", labels=f"{tmp_path}/t.csv:f:l", workers=0)
    labels = {record["path"]: record.get("label") for record in open_dataset(tmp_path / "out").records(0)}
    assert labels == {"a/1.png": 0, "a/2.png": 1, "a/3.png": 0, "a/4.png": None, "b/1.png": None}
    assert (account.unlabelled, account.ambiguous) == (2, 2)


def test_blanks_beside_names_of_columns_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name, file , style\n1,1.png,x\n2,2.png,y\n")
    source = write_zip(tmp_path / "in.zip", {"1.png": encode(1), "2.png": encode(2)})
    for number, columns in enumerate(("file:style", " file : style", "file: style ")):
        account = prepare(source, tmp_path / f"{number}", labels=f"{tmp_path}/t.csv:{columns}", workers=0)
        assert account.classes == {"x": 1, "y": 1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/t.csv: :l", "expected `folders` or CSV:FILECOL:LABELCOL"),
        ("t.csv", "expected `folders` or CSV:FILECOL:LABELCOL"),
        ("{}/none.csv:f:l", "cannot be read"),
        ("{}/t.csv:file:l", "no column 'file' .* it has f, l"),
        ("{}/t.csv:l:f", "no row matches"),
        ("{}/latin.csv:f:l", r"not UTF-8 \(line 2\)"),
        ("folders", "no image is in a folder"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path: Path, spec: str, message: str) -> None:
    source = write_zip(tmp_path / "in.zip", {"1.png": encode(1)})
    (tmp_path / "t.csv").write_text("f,l\n1.png,x\n")
    (tmp_path / "latin.csv").write_bytes("f,l\n1.png,Na\u00efve\n".encode("latin-1"))
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "out", labels=spec.format(tmp_path), workers=0)
    assert not (tmp_path / "out").exists()


def test_duplicates_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, seed in {"a": 1, "b": 2, "c": 1, "d": 1}.items():
        (folder / f"{name}.png").write_bytes(encode(seed))
    source = write_zip(tmp_path / "in.zip", {"again.png": encode(2), "other.png": encode(5)})
    account = prepare([folder, source], tmp_path / "out", dedupe=True, workers=0)
    assert balanced(account) and (account.written, account.duplicates, account.skipped) == (3, 3, {"duplicate": 3})
    listed = [json.loads(line) for line in (tmp_path / "out/duplicates.jsonl").read_text().splitlines()]
    assert listed == [
        {"duplicate": "in/c.png", "of": "in/a.png"},
        {"duplicate": "in/d.png", "of": "in/a.png"},
        {"duplicate": "in.zip/again.png", "of": "in/b.png"},
    ]
