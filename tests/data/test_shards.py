"""The shard format: constant stride, the same bytes every time, and faults that are named."""

from __future__ import annotations

import gc
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from webdataset.writer import TarWriter

from gan_dist.data.dataset import open_dataset
from gan_dist.data.shards import FORMAT, MANIFEST, ShardWriter, read_manifest
from gan_dist.utils.errors import UserError
from tests.helpers.datasets import write_dataset


@pytest.mark.parametrize("resolution", [32, 64])
def test_views_hold_the_samples_and_cost_no_copy(tmp_path: Path, resolution: int) -> None:
    images = write_dataset(tmp_path / "set", resolution=resolution)
    dataset = open_dataset(tmp_path / "set")
    assert (dataset.num_samples, dataset.shard_sizes, dataset.resolution) == (8, (5, 3), resolution)
    assert dataset.identity == hashlib.sha256((tmp_path / "set" / MANIFEST).read_bytes()).hexdigest()
    views = [dataset.shard_view(i) for i in range(2)]
    assert torch.equal(torch.cat(views), torch.from_numpy(images))
    assert views[0].stride(0) == dataset.manifest.shards[0].stride > 3 * resolution**2
    assert [record["key"] for record in dataset.records(1)] == [5, 6, 7]


def test_a_write_into_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set")
    before = (tmp_path / "set/shard-00000.tar").read_bytes()
    open_dataset(tmp_path / "set").shard_view(0)[0] = 7
    assert (tmp_path / "set/shard-00000.tar").read_bytes() == before


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one")
    write_dataset(tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["manifest.json", *(f"shard-0000{i}.{end}" for i in range(2) for end in ("jsonl", "tar"))]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_stock_webdataset_reads_every_sample(tmp_path: Path) -> None:
    images = write_dataset(tmp_path / "set")
    urls = [str(tmp_path / "set" / f"shard-0000{i}.tar") for i in range(2)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(8)]
    assert np.array_equal(np.stack([sample["npy"] for sample in samples]), images)


def test_the_bytes_are_those_of_webdatasets_own_writer(tmp_path: Path) -> None:
    images = write_dataset(tmp_path / "set")
    stream = io.BytesIO()
    with TarWriter(stream, user="", group="", mtime=0, compress=False) as writer:
        for key, image in enumerate(images[:5]):
            writer.write({"__key__": f"{key:09d}", "npy": image})
    assert stream.getvalue() == (tmp_path / "set/shard-00000.tar").read_bytes()


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0, 32) as writer:
        writer.add(0, bytes(3072), {})
        raise RuntimeError
    with ShardWriter(tmp_path, 1, 32) as writer:
        assert writer.commit() is None  # an empty shard is no shard
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "short", "long", "first header", "last header", "shape"])
def test_a_bad_shard_is_named_when_opened(tmp_path: Path, damage: str) -> None:
    write_dataset(tmp_path / "set")
    path = tmp_path / "set/shard-00001.tar"
    content = bytearray(path.read_bytes())
    stride = read_manifest(tmp_path / "set").shards[1].stride
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-512])
    elif damage == "long":
        path.write_bytes(content + bytes(512))
    else:
        content[{"first header": 3, "last header": 2 * stride + 258, "shape": 512 + 70}[damage]] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.tar .*gan-dist prepare"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a dataset"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"format": FORMAT + 1}), "update gan_dist"),
        (json.dumps({"format": FORMAT, "shards": []}), "is damaged"),
    ],
)
def test_a_bad_manifest_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)
