"""One path, many spellings: what is meant is found, and what is not clear is never guessed."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare.matching import match
from gan_dist.data.prepare.prepare import prepare
from gan_dist.utils.errors import UserError
from tests.helpers.sources import encode

NAMES = st.text(st.sampled_from("abcXYZ \u00e9\u00fc\u3042-_0123456789"), min_size=1, max_size=6).map(
    lambda text: text.strip() or "x"
)
PATHS = st.lists(st.lists(NAMES, min_size=2, max_size=4).map(tuple), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(PATHS, st.data())
def test_respelt_paths_find_one_another(paths: list[tuple[str, ...]], data: st.DataObject) -> None:
    unique = {"/".join(path).casefold(): path for path in paths if len({path[-1].casefold() for path in paths})}
    kept = [path for path in unique.values() if sum(p[-1].casefold() == path[-1].casefold() for p in paths) == 1]
    keys = []
    for path in kept:
        text = "/".join(path) + data.draw(st.sampled_from((".jpg", "", ".JPG")))
        text = unicodedata.normalize(data.draw(st.sampled_from(("NFC", "NFD"))), text)
        text = data.draw(st.sampled_from((text, text.swapcase(), "./" + text, "more/folders/" + text)))
        text = data.draw(st.sampled_from((text, text.partition("/")[2] or text, text.replace("/", "\\"))))
        keys.append(text)
    targets = ["source/" + "/".join(path) + ".jpg" for path in kept]
    assert match(keys, targets).keys == list(range(len(kept)))


@pytest.mark.parametrize(
    ("keys", "targets", "expected"),
    [
        (["a/1.png", "1.png"], ["a/1.png", "b/1.png"], [0, None]),  # the second might mean either
        (["1.png"], ["a/1.png", "b/1.png"], [None, None]),
        (["1.PNG", "1.png"], ["1.png", "1.PNG"], [1, 0]),  # the same case is better
        (["1.jpg"], ["1.png"], [None]),
        (["1", "1.jpg"], ["1.jpeg"], [1]),  # an ending of the same kind is better than none
        (["1"], ["1.png", "1.jpg"], [None, None]),
        (["a/1", "a/1.png"], ["a/1.png"], [1]),
        (["x/1.png", "y/1.png"], ["1.png"], [None]),
        (["train/1.png", "test/1.png"], ["test/1.png", "train/1.png"], [1, 0]),
        (["b/1.png"], ["a/1.png", "b/1.png"], [None, 0]),
        (["a/1.jpg", "1.png"], ["a/1.png"], [1]),
        (["1.jpg", "2.TIFF"], ["1.jpeg", "2.tif"], [0, 1]),
        (["1.jpg", "1.jpeg"], ["1.jpeg", "1.jpg"], [1, 0]),  # the same spelling is better
    ],
)
def test_what_is_clear_and_what_is_not(keys: list[str], targets: list[str], expected: list[int | None]) -> None:
    assert match(keys, targets).keys == expected


def test_equal_values_are_no_choice() -> None:
    assert match(["x/1.png", "y/1.png"], ["1.png"], values=["cat", "cat"]).keys == [0]
    assert match(["x/1.png", "y/1.png"], ["1.png"], values=["cat", "dog"]).ambiguous_targets == {0}


def test_many_files_of_one_name_are_matched_quickly() -> None:
    paths = [f"{i // 100}/{i % 100}/image.jpg" for i in range(20_000)]
    assert match(paths, paths).keys == list(range(20_000))
    assert match(["image.jpg"], paths).keys == [None] * 20_000
    others = [f"other/{path}" for path in paths[10_000:]] + [f"{i}/image.jpg" for i in range(1_000, 11_000)]
    matches = match(others, paths)  # only half of the paths have a partner
    assert matches.keys == [None] * 10_000 + list(range(10_000))
    assert matches.ambiguous_targets == set(range(10_000)) and matches.ambiguous_keys == set(range(10_000, 20_000))
    assert match(others, paths, values=["cat"] * 20_000).keys == matches.keys


def label(tmp_path: Path, files: list[str], table: str, name: str = "out") -> dict[str, str | None]:
    """Returns the class of each picture by a table, which is written as it is."""
    for number, path in enumerate(files):
        target = tmp_path / "in" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode(number, (9, 7)))
    (tmp_path / "t.csv").write_text(table, newline="")
    prepare(tmp_path / "in", tmp_path / name, labels=f"{tmp_path}/t.csv:file:style", workers=0)
    dataset = open_dataset(tmp_path / name)
    classes = dataset.manifest.classes
    return {r["path"]: classes[r["label"]] if "label" in r else None for r in dataset.records(0)}


def test_empty_fields_at_the_end_of_a_row_are_none(tmp_path: Path) -> None:
    assert label(tmp_path, ["0.png", "1.png"], "file,style\n0.png,a,\n1.png,b,, \n") == {"0.png": "a", "1.png": "b"}


def test_tables_as_they_come(tmp_path: Path) -> None:
    files = ["Cubism/1.JPG", "Cubism/2.JPG", "Realism/1.JPG", "Realism/Mu\u0308hle.JPG"]
    table = 'file,style,notes\ncubism\\1,c\ndata/wikiart/Cubism/2.jpg,c\nRealism/1.JPG,r,"two\nlines"\n'
    table += "Realism/M\u00fchle.jpg,r," + "x" * 300_000 + "\n"
    found = label(tmp_path, files, table)
    assert list(found.values()) == ["c", "c", "r", "r"]
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('file,style\n0.png,"a\n1.png,b\n2.png,a\n', "a quote opened after line 1 is never closed"),
        ('file,style,t\n0.png,a,"x\n1.png,b,y\n2.png,a,"\n', "swallows whole rows"),
        ('file,style\n0,"a\n1,b\n2,c"\n', "line 2 that swallows whole rows"),
        ('file,style\n0,"a\n8,b\n9,c"\n', "swallows whole rows"),
        ('style,file\na,2.png\n"b,0.png\nc",1.png\n', "line 3 that swallows whole rows"),
        ('file,style,t\n0,"a\n1,b",x\n2,a,y\n', "swallows whole rows"),
        ('file,style,t\n0,a,"x\n1,b,y\n\n2,a,"\n', "swallows whole rows"),
        (
            "file,title,style\n0.png,Sea,a\n1.png,Sea, stormy,a\n",
            "has 4 fields in line 3 and 3 in its head: put cells that have a ',' in them into quotes",
        ),
        ("file,style,style\n0.png,a,b\n", "the column 'style' twice"),
        ('file,style\n"0.png"x,a\n', "is not a CSV file"),
        ("file,style\n0.png,a\n0.png,b\n", "not one has a row of its own with one class: .* first row says '0.png'"),
        (
            "file,style\nother.png,a\n",
            "no row matches any of the 3 images.* The first row says 'other.png', the first image is '0.png'",
        ),
    ],
)
def test_tables_that_cannot_be_right_are_one_line(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        label(tmp_path, ["0.png", "1.png", "2.png"], table)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "classes"),
    [
        ('file,style\n0.png,"a\nb"\n1.png,"c,\nd"\n', ["a b", "c, d"]),
        ('style,file\n"a\nb",0.png\nc,1.png\n', ["a b", "c"]),
        ('file,style,t\n0,a,"A boat, at dusk, in oil\nseen, as it were, from afar\n"\n1,b,\n', ["a", "b"]),
        ('t,file,style\n"A boat, at dusk, in oil\nafar",0,a\n"see\n0.png",1,b\n', ["a", "b"]),
        ('file,t,style\n0,"see 1.png, or\n1.png",a\n1,"x,y\nz",b\n', ["a", "b"]),
    ],
)
def test_cells_of_several_lines_that_are_no_rows_are_read(tmp_path: Path, table: str, classes: list[str]) -> None:
    assert list(label(tmp_path, ["0.png", "1.png"], table).values()) == classes


def test_numeric_classes_of_one_value_have_an_order(tmp_path: Path) -> None:
    names = ["00001", "0001", "001", "01", "1", "002", "02", "2", "10"]
    for name in reversed(names):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(encode(1))
    account = prepare(tmp_path / "in", tmp_path / "out", labels="folders", workers=0)
    assert list(account.classes) == names


@pytest.mark.parametrize(
    ("files", "sources", "advice"),
    [
        (["cubism/images/a", "realism/images/b"], ["."], "the folders that differ are cubism, realism in {}:"),
        (["cubism/images/a", "realism/images/b", "c"], ["."], "the folders that differ are cubism, realism in {}:"),
        (["x/cubism/images/a", "x/d"], ["x/cubism"], "give a source with several"),
        (["images/a", "b"], ["."], "give a source with several"),
        (["Caf\u00e9/a", "Cafe\u0301/b"], ["."], "give a source with several"),
        (["s1/images/a", "s2/images/b"], ["s1", "s2"], "lie directly in {0}/s1, {0}/s2, and give the parent folder"),
        (["s1/images/a", "s2/b"], ["s1", "s2"], "give a source with several"),
        (["s1/images/a", "s2/images/b"], ["s1.zip", "s2.zip"], "give a source with several"),
    ],
)
def test_folders_that_are_one_class_are_said(tmp_path: Path, files: list[str], sources: list[str], advice: str) -> None:
    for number, file in enumerate(files):
        path = tmp_path / "in" / f"{file}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    for name in ("s1", "s2") if "s1.zip" in sources else ():
        shutil.make_archive(str(tmp_path / "in" / name), "zip", tmp_path / "in" / name)
    account = prepare([tmp_path / "in" / name for name in sources], tmp_path / "out", labels="folders", workers=0)
    (note,) = account.notes
    assert len(account.classes) == 1 and "so there is one class: " in note
    assert advice.format(tmp_path / "in") in note


def test_advice_for_folders_gives_classes(tmp_path: Path) -> None:
    """Images that lie in the sources themselves, as is advised where these are all that differs."""
    for name in ("s1", "s2"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(encode(1))
        shutil.make_archive(str(tmp_path / "packed" / name), "zip", tmp_path / "in" / name)
    for folder, ending, advice in (
        ("in", "", f"give the parent folder as the source: {tmp_path}/in$"),
        ("packed", ".zip", "table"),
    ):
        sources = [tmp_path / folder / f"{name}{ending}" for name in ("s1", "s2")]
        with pytest.raises(UserError, match=f"no image is in a folder of its source: .*{advice}"):
            prepare(sources, tmp_path / "out", labels="folders", workers=0)
    assert prepare(tmp_path / "in", tmp_path / "out", labels="folders", workers=0).classes == {"s1": 1, "s2": 1}


def test_a_class_is_one_however_its_accents_are_spelt(tmp_path: Path) -> None:
    spelt = ("Caf\u00e9", "Cafe\u0301")
    for name in (*spelt, "x"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"{len(name)}.png").write_bytes(encode(1))
    account = prepare(tmp_path / "in", tmp_path / "out", labels="folders", workers=0)
    assert account.classes == {spelt[0]: 2, "x": 1}
    rows = "".join(f"{len(name)}.png,{name}\n{len(name)}.png,{name}\n" for name in spelt)
    (tmp_path / "t.csv").write_text("file,style\n" + rows)
    account = prepare(tmp_path / "in", tmp_path / "out-table", labels=f"{tmp_path}/t.csv:file:style", workers=0)
    assert account.classes == {spelt[0]: 2} and account.unlabelled == 1


def test_a_compressed_tar_stands_for_a_folder_of_its_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            info = tarfile.TarInfo("1.png")
            info.size = len(encode(1))
            archive.addfile(info, io.BytesIO(encode(1)))
    (tmp_path / "t.csv").write_text("file,style\na/1.png,x\nb/1.png,y\n")
    sources = [tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"]
    account = prepare(sources, tmp_path / "out", labels=f"{tmp_path}/t.csv:file:style", workers=0)
    assert account.classes == {"x": 1, "y": 1}


def test_numbers_that_are_too_long_are_names(tmp_path: Path) -> None:
    long = "1" * 5000
    (tmp_path / "in").mkdir()
    for name in ("9", "10", "3"):
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(1))
    (tmp_path / "t.csv").write_text(f"file,style\n9.png,9\n10.png,10\n3.png,{long}\n")
    account = prepare(tmp_path / "in", tmp_path / "out", labels=f"{tmp_path}/t.csv:file:style", workers=0)
    assert list(account.classes) == ["10", long, "9"]


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_tables_are_separated_by_what_their_first_line_is(tmp_path: Path, mark: str) -> None:
    table = f'\ufeff"file"{mark} style \r\na.png{mark}"x, y"\r\nb.png{mark}z\r\n'
    assert label(tmp_path, ["a.png", "b.png"], table) == {"a.png": "x, y", "b.png": "z"}
    with pytest.raises(UserError, match="swallows whole rows"):
        label(tmp_path, ["a.png"], f'file{mark}style\na.png{mark}"x\nb.png{mark}y\nc.png{mark}"\n', "other")
