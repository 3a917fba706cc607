"""Images out of generators: ranges, layouts, walks, and nothing disturbed on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gan_dist
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.sampling.generate import draw, draw_latents, generate, interpolate
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import grid, grid_side, save_png, to_uint8
from tests.helpers.training import small


@pytest.fixture
def generator() -> Generator:
    network = Generator(32, 8, 4)
    initialise(network, 0.02, torch.Generator().manual_seed(0))
    return network


def test_pixels_come_back_as_they_went_in() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.float().div(127.5).sub(1)), values)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_drawing_disturbs_nothing_and_batches_do_not_matter(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    latents = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    images = generate(generator, latents)
    assert images.shape == (7, 3, 32, 32) and images.dtype == torch.uint8
    monkeypatch.setattr("gan_dist.sampling.generate.BATCH", 2)
    assert torch.equal(images, generate(generator, latents))
    assert generator.training
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_a_grid_is_as_square_as_can_be() -> None:
    images = torch.zeros(10, 3, 16, 16, dtype=torch.uint8)
    assert grid(images).shape == (3, 3 * 18 + 2, 4 * 18 + 2)
    assert grid(images[:1]).dtype == torch.uint8
    assert (grid(images)[:, :2] == 255).all() and (grid(images)[:, -17:-2, -17:-2] == 255).all()  # on white


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (1, 4), (2, 1), (3, 5), (7, 3), (7, None), (12, 12)])
def test_the_longer_side_of_a_grid_is_known_before(count: int, columns: int | None) -> None:
    page = grid(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), columns)
    assert max(page.shape) == grid_side(count, 8, columns if columns is None else min(columns, count))


def test_walks_keep_their_ends_and_their_length() -> None:
    start, end = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    walk = interpolate(start, end, 9)
    assert torch.allclose(walk[0], start, atol=1e-5) and torch.allclose(walk[-1], end, atol=1e-5)
    assert walk.norm(dim=1).min() > 0.95 * min(start.norm(), end.norm())
    assert torch.allclose(interpolate(start, start, 3), start.expand(3, -1))


def test_files_are_whole_and_no_others_are_left(generator: Generator, tmp_path: Path) -> None:
    latents = draw_latents(8, 5, 3)
    images = draw(generator, latents, tmp_path / "a" / "grid.png", individual=tmp_path / "each")
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [
        "grid.png",
        *(f"sample-0000{i}.png" for i in range(5)),
    ]
    with Image.open(tmp_path / "each" / "sample-00003.png") as image:
        assert np.array_equal(np.asarray(image), images[3].permute(1, 2, 0).numpy())
    again = draw(generator, draw_latents(8, 5, 3), tmp_path / "b.png")
    assert torch.equal(images, again)
    assert not torch.equal(images, draw(generator, draw_latents(8, 5, 4), tmp_path / "b.png"))
    assert draw(generator, draw_latents(8, 7, 3, walk=True), tmp_path / "walk.png").shape[0] == 7
    assert not list(tmp_path.rglob(".*"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        save_png(torch.zeros(5, 2), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_run_gives_its_generator(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), run_dir=tmp_path / "run", max_steps=3, console=False)
    newest, first = gan_dist.load_generator(tmp_path / "run"), gan_dist.load_generator(tmp_path / "run", step=0)
    assert not newest.training
    latents = torch.randn(2, 8)
    assert newest(latents).shape == (2, 3, 32, 32) and not torch.equal(newest(latents), first(latents))
    with pytest.raises(UserError, match="has no checkpoint of step 99"):
        gan_dist.load_generator(tmp_path / "run", step=99)
