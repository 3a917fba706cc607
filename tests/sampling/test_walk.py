"""Walks: closed, smooth, on the sphere; films and enlarged pictures as other programs read them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gan_dist.cli.runs import sample
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.sampling.export import export_generator
from gan_dist.sampling.generate import draw_latents, slerp
from gan_dist.sampling.sample import sample_run
from gan_dist.sampling.walk import loop
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import enlarge, grid_side


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = Generator(32, 8, 4)
    initialise(generator, 0.2, torch.Generator().manual_seed(0))  # far from grey
    return export_generator(generator.eval(), tmp_path_factory.mktemp("weights") / "g.safetensors", {})[0]


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(2, 7), st.integers(3, 12))
def test_a_loop_is_closed_and_smooth_and_as_long_as_latents_are(seed: int, anchors: int, apart: int) -> None:
    points = torch.randn(anchors, 2, 100, generator=torch.Generator().manual_seed(seed))
    latents = loop(points, anchors * apart)
    assert latents.shape == (anchors * apart, 2, 100) and latents.dtype == points.dtype
    torch.testing.assert_close(latents[::apart], points, rtol=1e-4, atol=1e-4)  # through every anchor
    lengths = latents.norm(dim=-1)
    assert lengths.min() > 0.75 * points.norm(dim=-1).min() and lengths.max() < 1.35 * points.norm(dim=-1).max()


def test_neither_place_nor_direction_jumps_anywhere() -> None:
    points = torch.randn(5, 1, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    latents = loop(points, 500)[:, 0]
    steps = torch.roll(latents, -1, 0) - latents  # the last one closes the loop
    turns = (torch.roll(steps, -1, 0) - steps).norm(dim=-1)
    speed = steps.norm(dim=-1)
    assert speed.max() < 3 * speed.min()
    assert turns.max() < 0.06 * speed.mean()
    corner = torch.cat([slerp(points[i], points[(i + 1) % 5], torch.linspace(0, 0.99, 100)[:, None]) for i in range(5)])
    steps = torch.roll(corner, -1, 0) - corner
    assert (torch.roll(steps, -1, 0) - steps).norm(dim=-1).max() > 0.5 * steps.norm(dim=-1).mean(), (
        "a control with corners"
    )


def test_opposite_and_equal_anchors_give_numbers() -> None:
    start = torch.tensor([[[1.0]], [[-1.0]], [[1.0]], [[1.0]]])
    assert loop(start, 40).isfinite().all()


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    """Returns the frames of a film, uint8 [H, W, 3], and its frames a second."""
    if path.suffix == ".gif":
        frames = []
        with Image.open(path) as film:
            assert film.info["loop"] == 0
            for index in range(getattr(film, "n_frames", 1)):
                film.seek(index)
                frames.append(np.array(film.convert("RGB")))
            return frames, 1000 / film.info["duration"]
    with av.open(str(path)) as film:
        (stream,) = film.streams.video
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)], float(stream.average_rate or 0)


@pytest.mark.parametrize(("name", "fps", "exact"), [("a.mp4", 12, 12), ("a.gif", 12, 12.5)])
def test_a_film_begins_with_the_grid_and_returns_to_it(
    weights: Path, tmp_path: Path, name: str, fps: int, exact: float
) -> None:
    lines = sample_run(
        weights, count=3, seed=5, out=tmp_path / "grid.png", walk=tmp_path / "new" / name, seconds=2, fps=fps, size=64
    )
    assert f"a walk of {2 * exact:g} frames, {exact:g} a second" in lines[1]
    frames, rate = frames_of(tmp_path / "new" / name)
    assert len(frames) == 2 * exact and rate == exact
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 66 + 2, 2 * 66 + 2) == frames[0].shape[1::-1]
        first = np.array(grid.convert("RGB")).astype(int)
    away = [float(np.abs(frame.astype(int) - first).mean()) for frame in frames]
    assert away[0] < 6, "the first frame is the grid"
    assert max(away) > 2 * away[0] and away[-1] < 0.7 * max(away), "it leaves, and comes back"
    sizes = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert sizes == {"grid.png", name}


def test_enlarging_keeps_each_picture_to_itself(weights: Path, tmp_path: Path) -> None:
    pair = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pair[1] = 255
    assert torch.equal(enlarge(pair, 96)[0], torch.zeros(3, 96, 96, dtype=torch.uint8))
    assert enlarge(pair, None) is pair and enlarge(pair, 32) is pair
    sample_run(weights, count=2, out=tmp_path / "grid.png", individual=tmp_path / "each", size=96)
    with Image.open(tmp_path / "each" / "sample-00001.png") as large, Image.open(tmp_path / "grid.png") as page:
        assert large.size == (96, 96) and page.size == (grid_side(2, 96), 100)
        assert np.array_equal(np.array(page)[2:98, 100:196], np.array(large))
        sample_run(weights, count=2, out=tmp_path / "plain.png", individual=tmp_path / "plain")
        with Image.open(tmp_path / "plain" / "sample-00001.png") as small:
            assert np.array_equal(np.array(small.resize((96, 96), Image.Resampling.LANCZOS)), np.array(large))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"walk": "a.avi"}, r"--walk: expected a file name ending in \.mp4 or \.gif, found a\.avi"),
        ({"walk": "a.gif", "fps": 60}, r"--fps: expected 1 to 50 frames a second in a \.gif file, found 60"),
        ({"walk": "a.mp4", "fps": 0}, "--fps: expected 1 to 60 .* found 0"),
        ({"walk": "a.mp4", "seconds": 0.0}, r"--seconds: expected 0\.12 \(3 frames\) to 600, found 0"),
        ({"walk": "a.mp4", "seconds": float("nan")}, "--seconds: expected .* found nan"),
        ({"walk": "a.gif", "size": 2048, "count": 2}, "at most 2048 pixels wide and high, this one would have 4102"),
        ({"size": 100}, "--size: expected a multiple of 32, the pixels that g.safetensors draws, found 100"),
        ({"size": 16}, "--size: expected a multiple of 32, .* found 16"),
        ({"size": 0}, "--size: expected a multiple of 32, .* found 0"),
        ({"count": 10**8}, r"^--count: expected .* or fewer, a grid of 16,384 pixels a side, found 100,000,000$"),
        ({"size": 8192}, "a grid is at most 16,384 pixels wide, 9 images of 8192 would make 24,584"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        sample_run(weights, **{"count": 9, **options})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_without_pyav_it_says_how_to_get_it(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else honest(name, *rest))
    with pytest.raises(UserError, match=r"not installed; run pip install av, or name a \.gif file"):
        sample_run(weights, out=tmp_path / "grid.png", walk=tmp_path / "a.mp4")
    sample_run(weights, count=1, out=tmp_path / "grid.png", walk=tmp_path / "a.GIF", seconds=0.3, fps=10)
    assert len(frames_of((tmp_path / "a.GIF").rename(tmp_path / "a.gif"))[0]) == 3


def test_the_same_seed_walks_the_same_way_and_the_command_line_knows_it(weights: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sample_run(weights, count=1, out=tmp_path / "x.png", walk=tmp_path / f"{name}.gif", seconds=0.5, fps=10, seed=4)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    sample(str(weights), image=tmp_path / "x.png", walk=tmp_path / "c.gif", seconds=0.5, fps=10, seed=4, count=1)
    assert (tmp_path / "c.gif").read_bytes() == (tmp_path / "a.gif").read_bytes()
    latents = draw_latents(8, 1, 4)
    assert torch.equal(loop(torch.stack([latents, -latents.flip(-1), latents + 1]), 9)[0], latents)
