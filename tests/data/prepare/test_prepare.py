"""Sources to a dataset: whole, reproducible, accounted for, and refused with one clear line when it cannot be."""

from __future__ import annotations

import gc
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare.account import TooManyRejects
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.shards import read_manifest
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.sources import balanced, contents, encode, fill


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_a_folder_becomes_a_dataset_that_stock_webdataset_reads(tmp_path: Path) -> None:
    account = prepare(fill(tmp_path / "in"), tmp_path / "out", shard_samples=4, workers=2)
    assert (account.seen, account.written, account.rejected, account.shards) == (10, 10, {}, 3)
    assert balanced(account)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.shard_sizes == (4, 4, 2)
    urls = [str(tmp_path / "out" / shard.file) for shard in dataset.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    gc.collect()
    records = [record for i in range(3) for record in dataset.records(i)]
    assert [record["path"] for record in records] == sorted(record["path"] for record in records)
    for sample, record in zip(samples, records, strict=True):
        expected = square((tmp_path / "in" / record["path"]).read_bytes(), Recipe())
        assert int(sample["__key__"]) == record["key"]
        assert np.array_equal(sample["npy"], expected.pixels)
        assert (record["width"], record["height"], record["source"]) == (90, 70, "in")


def test_worker_counts_and_reruns_make_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "in", broken=1)
    for workers in (0, 1, 3):
        prepare([tmp_path / "in"], tmp_path / f"out{workers}", shard_samples=4, workers=workers, max_reject_fraction=1)
    first = contents(tmp_path / "out0")
    assert first == contents(tmp_path / "out1") == contents(tmp_path / "out3")
    again = prepare([tmp_path / "in"], tmp_path / "out3", shard_samples=4, max_reject_fraction=1)
    assert again.entries == 0 and again.written == 10
    assert contents(tmp_path / "out3") == first


def test_only_a_damaged_shard_is_rewritten(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    prepare(source, tmp_path / "out", shard_samples=4, workers=0)
    first = contents(tmp_path / "out")
    shard = tmp_path / "out/shard-00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"npy", b"nqy", 1))
    assert prepare(source, tmp_path / "out", shard_samples=4, workers=0).entries == 4
    assert contents(tmp_path / "out") == first


def test_zip_and_folder_of_the_same_files_make_the_same_shards(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "in").rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "in"))
    prepare(tmp_path / "in", tmp_path / "folder", workers=0)
    prepare(tmp_path / "in.zip", tmp_path / "zip", workers=0)
    assert (tmp_path / "folder/shard-00000.tar").read_bytes() == (tmp_path / "zip/shard-00000.tar").read_bytes()


def test_rejects_have_a_reason_and_a_limit(tmp_path: Path) -> None:
    fill(tmp_path / "in", count=8, broken=2)
    (tmp_path / "in/notes.txt").write_text("x")
    with pytest.raises(TooManyRejects, match=r"20\.0% .* 5\.0%") as caught:
        prepare(tmp_path / "in", tmp_path / "out", workers=0)
    assert caught.value.exit_status == 1 and caught.value.account.rejected == {"not_an_image": 2}
    lines = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["broken0.jpg", "broken1.jpg"]
    with pytest.raises(UserError):
        read_manifest(tmp_path / "out")
    account = prepare(tmp_path / "in", tmp_path / "out", workers=0, max_reject_fraction=0.2)
    assert balanced(account) and account.entries == 0 and account.skipped == {"not an image: .txt": 1}
    assert read_manifest(tmp_path / "out").totals["rejected"] == {"not_an_image": 2}


@pytest.mark.parametrize("case", ["missing", "empty", "no valid image", "a text file", "no source"])
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    source = tmp_path / "in"
    if case != "missing":
        source.mkdir()
    if case == "no valid image":
        fill(source, 0, broken=2)
    if case == "a text file":
        source = tmp_path / "in/text"
        source.write_text("hello")
    with pytest.raises(UserError) as caught:
        prepare([] if case == "no source" else [source], tmp_path / "out", workers=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["a file", "under a file", "other files", "in the source"])
def test_a_bad_out_is_one_line_and_is_left_alone(tmp_path: Path, case: str) -> None:
    source, out = fill(tmp_path / "in"), tmp_path / "out"
    if case == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    else:
        out.write_text("x")
    target = {"under a file": out / "deeper/still", "in the source": source}.get(case, out)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="OUT"):
        prepare(source, target, workers=0)
    assert contents(tmp_path) == before


def test_out_within_the_source_is_no_part_of_it(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    for _ in range(2):  # the second time it holds a contact sheet, which is a PNG
        account = prepare(source, source / "deep/out", workers=0)
        assert balanced(account) and account.seen == 10 and (source / "deep/out/contact_sheet.png").exists()


def test_datasets_within_the_source_are_no_part_of_it(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    prepare(source, source / "one", workers=0)
    account = prepare(source, source / "two", resolution=32, workers=0)
    assert balanced(account) and account.seen == 10 and "one is a dataset" in account.notes[0]
    again = prepare(source, source / "one", workers=0)  # its sources have not changed
    assert again.entries == 0 and again.complete


@pytest.mark.parametrize("case", ["twice", "by a link", "inside", "as replacements"])
def test_a_source_within_another_is_refused(tmp_path: Path, case: str) -> None:
    source = fill(tmp_path / "in")
    (tmp_path / "link").symlink_to(source)
    more = {"twice": [source], "by a link": [tmp_path / "link"], "inside": [source / "a"]}.get(case, [])
    with pytest.raises(UserError, match="taken twice"):
        prepare(
            [source, *more], tmp_path / "out", workers=0, replacements=source if case == "as replacements" else None
        )
    assert not (tmp_path / "out").exists()


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in"), tmp_path / "out"
    prepare(source, out, shard_samples=4, workers=0)
    whole = contents(out)
    for name in whole:
        if name != ".prepare/lock":
            (out / f"{name}.elsewhere-123.tmp").write_bytes(b"half")
    (out / ".prepare/command.json.elsewhere-123.tmp").write_bytes(b"half")
    for shard in range(3):  # a shard's leftovers go when it is written again
        (out / f".prepare/shard-{shard:05d}.tar.json").unlink()
    prepare(source, out, shard_samples=4, workers=0)
    assert contents(out) == whole


def test_another_recipe_is_refused_with_both_values(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    prepare(source, tmp_path / "out", workers=0)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="resolution was 64 and is now 32"):
        prepare(source, tmp_path / "out", resolution=32, workers=0)
    with pytest.raises(UserError, match="sources were in and are now in, more"):
        prepare([source, fill(tmp_path / "more")], tmp_path / "out", workers=0)
    assert contents(tmp_path / "out") == before


def test_a_changed_source_is_named(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    prepare(source, tmp_path / "out", workers=0)
    (source / "a/002.png").write_bytes(encode(99))
    (source / "new.png").write_bytes(encode(98))
    with pytest.raises(GanDistError, match=r"1 added \(first in/'new\.png'\), 1 changed \(first in/'a/002\.png'\)"):
        prepare(source, tmp_path / "out", workers=0)


def test_tasks_in_any_order_equal_one_run(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", broken=1)
    prepare(source, tmp_path / "one", shard_samples=2, workers=0, max_reject_fraction=1)
    for i in (2, 0, 1):
        account = prepare(source, tmp_path / "many", shard_samples=2, workers=0, max_reject_fraction=1, task=(i, 3))
        assert ("by the other tasks" in "".join(account.lines())) == (i != 1)
        assert account.complete == (i == 1) == (tmp_path / "many/manifest.json").exists()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": 0},
        {"resample": "nearest"},
        {"shard_samples": 0},
        {"task": (3, 3)},
        {"workers": -1},
        {"max_reject_fraction": 5},
        {"max_reject_fraction": float("nan")},
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    source = fill(tmp_path / "in")
    with pytest.raises(UserError):
        prepare(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_address_is_no_place_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where `s3:` would be a folder
    with pytest.raises(UserError, match="s3://bucket/set: expected a directory, found an address"):
        prepare(fill(tmp_path / "in"), "s3://bucket/set")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
