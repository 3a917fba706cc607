"""What `gan-dist sample` gives, for runs, checkpoints and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gan_dist.sampling.generate import animate
from gan_dist.sampling.sample import find_source, sample_run
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.helpers.training import small


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "drawn"
    train(small(dataset), run_dir=directory, max_steps=10, console=False)
    return directory


def test_everything_at_once(run: Path, tmp_path: Path) -> None:
    lines = sample_run(
        run,
        count=6,
        out=tmp_path / "grid.png",
        individual=tmp_path / "each",
        export=tmp_path / "g.safetensors",
        animation=tmp_path / "film.gif",
        neighbours=tmp_path / "near.png",
    )
    assert len(list((tmp_path / "each").iterdir())) == 6
    assert any("6 images of step 10 of drawn" in line for line in lines)
    assert any("distance to the nearest real image" in line for line in lines)
    card = (tmp_path / "g.md").read_text()
    assert "- run: drawn" in card and "- step: 10" in card and "latent_dim: 8" in card
    with Image.open(tmp_path / "near.png") as sheet:
        assert sheet.size == (4 * (2 * 32 + 2 + 8) + 8, 2 * (32 + 8) + 8)


def test_the_animation_reopened(run: Path, tmp_path: Path) -> None:
    count = animate(run, tmp_path / "film.gif")
    assert count == 4  # steps 0, 4, 8 and 10
    with Image.open(tmp_path / "film.gif") as film, Image.open(run / "samples" / "step-00000010.png") as last:
        assert getattr(film, "n_frames", 1) == count and film.info["loop"] == 0
        film.seek(count - 1)
        shown = film.convert("RGB").crop((0, 0, *last.size))
        difference = torch.tensor(list(shown.tobytes())).sub(torch.tensor(list(last.convert("RGB").tobytes()))).abs()
        assert difference.float().mean() < 12 and film.info["duration"] >= 1000
    assert animate(run, tmp_path / "short.gif", max_frames=2) == 3


def test_the_exported_generator_draws_the_same(run: Path, tmp_path: Path) -> None:
    sample_run(run, count=4, out=tmp_path / "a.png", export=tmp_path / "g.safetensors")
    sample_run(tmp_path / "g.safetensors", count=4, out=tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    latents = torch.randn(3, 8)
    with torch.no_grad():
        ours, theirs = (find_source(path).generator(latents) for path in (run, tmp_path / "g.safetensors"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_checkpoint_by_step_or_by_directory(run: Path, tmp_path: Path) -> None:
    sample_run(run, step=6, count=4, out=tmp_path / "a.png")
    sample_run(run / "checkpoints" / "step-00000006", count=4, out=tmp_path / "b.png")
    sample_run(run, count=4, out=tmp_path / "c.png")
    contents = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_bad_options_are_refused_before_anything_is_written(run: Path, dataset: Path, tmp_path: Path) -> None:
    weights = tmp_path / "g.safetensors"
    sample_run(run, count=1, out=tmp_path / "x.png", export=weights)
    (tmp_path / "x.png").unlink()
    out = tmp_path / "x.png"
    with pytest.raises(UserError, match="--count"):
        sample_run(run, count=0, out=out)
    same: Any
    for same in (
        {"individual": out},
        {"neighbours": out},
        {"walk": tmp_path / "a.gif", "animation": tmp_path / "a.gif"},
    ):
        with pytest.raises(UserError, match="is to be written twice"):
            sample_run(run, count=1, out=tmp_path / "nowhere" / ".." / "x.png", **same)
    with pytest.raises(UserError, match="--seed: expected a whole number from 0 to 9223372036854775807, found -1"):
        sample_run(run, seed=-1, out=out)
    with pytest.raises(UserError, match="has no training to show"):
        sample_run(weights, out=out, animation=tmp_path / "f.gif")
    with pytest.raises(UserError, match="give --dataset"):
        sample_run(weights, out=out, neighbours=tmp_path / "n.png")
    with pytest.raises(UserError, match="not a run with checkpoints"):
        sample_run(weights, step=3, out=out)
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        sample_run(run, out=out, export=tmp_path / "g.bin")
    with pytest.raises(UserError, match="no run at"):
        sample_run(tmp_path / "nowhere", out=out)
    assert not out.exists()
    (tmp_path / "file").touch()
    (tmp_path / "f.gif").mkdir()
    for asked, fault in (
        ({"out": tmp_path / "file" / "x.png"}, "x.png: .*file is not a folder"),
        ({"walk": tmp_path / "f.gif"}, "f.gif: it is a folder"),
        ({"walk": tmp_path / ("x" * 300 + ".gif")}, "File name too long"),
        ({"individual": tmp_path / "file"}, "file is not a folder"),
        ({"export": tmp_path / "file" / "deep" / "g.safetensors"}, "g.safetensors: .*file is not a folder"),
    ):
        with pytest.raises(UserError, match=f"cannot write .*{fault}"):
            sample_run(run, **{"count": 1, "out": out, **asked})  # type: ignore[arg-type]
        assert not out.exists()
    sample_run(weights, count=4, out=out, neighbours=tmp_path / "n.png", dataset=dataset)
    assert (tmp_path / "n.png").is_file()
