"""The nearest real images, on sets where they are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gan_dist.data.dataset import Dataset, gather, open_dataset
from gan_dist.data.shards import FORMAT, MANIFEST, Manifest, ShardWriter
from gan_dist.distributed.world import join
from gan_dist.sampling import neighbours
from gan_dist.sampling.neighbours import draw_neighbours, find_neighbours, nearest
from tests.helpers.ranks import run_ranks


def write_set(root: Path, images: torch.Tensor, shard: int) -> Dataset:
    """Returns a dataset of `images` in shards of `shard` samples."""
    root.mkdir()
    shards = []
    for number, part in enumerate(torch.split(images, shard)):
        with ShardWriter(root, number, images.shape[-1]) as writer:
            for i, image in enumerate(part):
                key = number * shard + i
                writer.add(key, image.numpy().tobytes(), {"source": "s", "path": f"{key}.png"})
            info = writer.commit()
            assert info is not None
            shards.append(info)
    manifest = Manifest(FORMAT, images.shape[-1], {}, (), {"seen": len(images), "written": len(images)}, tuple(shards))
    (root / MANIFEST).write_bytes(manifest.to_bytes())
    return open_dataset(root)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_nearest_of_all_shards_is_found(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 5)
    dataset = write_set(tmp_path / "set", images, 12)
    wanted = [49, 0, 13, 24]
    noise = torch.randint(-9, 10, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    samples = (images[wanted].int() + noise).clamp(0, 255).to(torch.uint8)
    found = find_neighbours(samples, dataset)
    assert found.indices == wanted and torch.equal(found.images, images[wanted])
    assert found.sources == [f"s/{i}.png" for i in wanted]
    expected = (samples.float() - images[wanted].float()).square().mean((1, 2, 3)).sqrt()
    assert found.distances == pytest.approx(expected.tolist())
    assert found.copies == 4 and "4 may be copies" in found.lines()[0]


def test_a_mirrored_copy_is_one(images: torch.Tensor, tmp_path: Path) -> None:
    found = find_neighbours(images[[7, 31]].flip(-1), write_set(tmp_path / "set", images, 20))
    assert found.indices == [7, 31] and found.distances == [0, 0] and found.copies == 2
    assert torch.equal(found.images, images[[7, 31]])  # shown as they are in the set


def test_distances_between_real_images_leave_out_themselves(images: torch.Tensor, tmp_path: Path) -> None:
    found = find_neighbours(images[:3], write_set(tmp_path / "set", images, 20))
    assert found.distances == [0, 0, 0]
    flat = images.flatten(1).float()
    apart = torch.cdist(flat, flat).fill_diagonal_(torch.inf).min(1).values / (3 * 8 * 8) ** 0.5
    assert found.usual == pytest.approx(apart.median().item(), rel=1e-3)


def test_what_is_unlike_is_no_copy_and_one_image_has_no_usual_distance(images: torch.Tensor, tmp_path: Path) -> None:
    samples = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    found = find_neighbours(samples, write_set(tmp_path / "set", images, 50))
    assert found.copies == 0 and "none looks like a copy" in found.lines()[0]
    alone = find_neighbours(samples, write_set(tmp_path / "one", images[:1], 1))
    assert alone.usual is None and alone.indices == [0] * 5 and "unknown" in alone.lines()[0]
    with pytest.raises(ValueError, match="images are 3x8x8"):
        find_neighbours(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), write_set(tmp_path / "two", images, 50))


def search(rank: int, root: str) -> None:
    with join("cpu") as world, open_dataset(root) as dataset:
        samples = gather(dataset, np.array([49, 0, 24, 7])).roll(1, 3)
        alone, shared = nearest(samples, dataset), nearest(samples, dataset, world)
        assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1]) and alone[2] == shared[2]


@pytest.mark.chaos
def test_ranks_share_the_search(images: torch.Tensor, tmp_path: Path) -> None:
    write_set(tmp_path / "set", images, 12)
    run_ranks(3, search, str(tmp_path / "set"))


def test_the_sheet_pairs_sample_and_neighbour(images: torch.Tensor, tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", images, 20)
    draw_neighbours(images[:6], dataset, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * (18 + 8) + 8, 2 * (8 + 8) + 8)
        left, right = sheet.crop((8, 8, 16, 16)), sheet.crop((18, 8, 26, 16))
        assert left.tobytes() == right.tobytes() == images[0].permute(1, 2, 0).contiguous().numpy().tobytes()


def test_an_empty_picture_is_near_to_every_empty_one_and_no_copy_of_it(images: torch.Tensor, tmp_path: Path) -> None:
    grey = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    dataset = write_set(tmp_path / "set", torch.cat([grey, images]), 51)
    found = find_neighbours(torch.cat([grey, images[:1]]), dataset)
    assert found.distances == [0, 0] and found.indices == [0, 1] and found.copies == 1
