"""Inception in an evaluation: the images it is shown, features kept beside the dataset, any number of ranks."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan_dist.data.dataset import gather, open_dataset
from gan_dist.data.order import Order
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.data.prepare.verify import verify
from gan_dist.distributed.world import World, join
from gan_dist.evaluation import inception
from gan_dist.evaluation.protocol import Evaluation
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.sampling.generate import draw_latents, generate
from gan_dist.utils.errors import UserError
from tests.helpers.ranks import run_ranks

SAMPLES = 110


@pytest.fixture
def shards(painted: Path, tmp_path: Path) -> Path:
    """120 paintings at 32x32, beside which features may be kept."""
    return Path(shutil.copytree(painted, tmp_path / "shards"))


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painted")
    paint_folder(folder / "paintings", 120)
    prepare([folder / "paintings"], folder / "shards", resolution=32, shard_samples=50)
    return folder / "shards"


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "FEWEST", 100)


class Projection(nn.Module):
    """Stands where Inception would: a few fixed projections of the pixels; keeps the images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 32 * 32, 8, generator=source))
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor) -> tuple[Tensor]:
        self.shown.append(images)
        return (images.flatten(1).float() / 255 @ self.weight,)


def untrained() -> Generator:
    network = Generator(32, 8, 4)
    initialise(network, 0.02, torch.Generator().manual_seed(0))
    return network


def evaluated(
    dataset: Path, *, world: World | None = None, samples: int = SAMPLES, weights: str = "a" * 64, **more: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the images that the network was shown, uint8 [n, 3, 32, 32], and the figures."""
    network = Projection()
    features = inception.Inception(network, weights)
    with open_dataset(dataset) as real:
        evaluation = Evaluation(world or World(), real, samples, features=features, **more)
        figures = evaluation(untrained(), 8, averaged=False)
    assert figures is not None and figures["protocol"]["inception"] == weights
    return torch.cat(network.shown), figures


@pytest.mark.parametrize("seed", [0, 5])
def test_it_is_shown_the_images_that_the_seed_keys(shards: Path, seed: int) -> None:
    shown, figures = evaluated(shards, seed=seed)
    with open_dataset(shards) as real:
        reals = gather(real, Order(real.shard_sizes, seed).indices(0, SAMPLES))
    drawn = generate(untrained(), draw_latents(8, SAMPLES, seed))
    assert torch.equal(shown, torch.cat([reals, drawn]))
    assert figures["protocol"]["seed"] == seed and figures["protocol"]["samples"] == SAMPLES
    rows = torch.split(inception.Inception(Projection(), "").features(shown), SAMPLES)
    assert {key: figures[key] for key in ("fid", "kid", "kid_std", "precision", "recall")} == inception.distances(*rows)


def test_features_of_real_images_are_kept_beside_the_dataset(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def seen(**asked: Any) -> tuple[int, dict[str, Any]]:
        shown, figures = evaluated(shards, log=lines.append, **asked)
        return len(shown), figures

    first, figures = seen()
    assert first == 2 * SAMPLES and figures["fid"] > 0 and {"kid", "precision", "recall"} <= set(figures)
    assert seen() == (SAMPLES, figures)  # the real ones were at hand
    (kept,) = shards.glob("inception-*")
    assert not verify(shards)
    kept.write_bytes(kept.read_bytes()[:1000])
    assert seen() == (2 * SAMPLES, figures)  # a torn file is made anew
    assert not lines
    kept.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_room)
        assert seen() == (2 * SAMPLES, figures) and "cannot be kept" in lines.pop()
    assert not list(shards.glob("inception-*"))  # whole or not at all
    kept.mkdir()  # where nothing can be written, as good as a disk that one may only read
    assert seen() == (2 * SAMPLES, figures) and "cannot be kept" in lines.pop()
    kept.rmdir()
    assert seen()[0] == 2 * SAMPLES and seen()[0] == SAMPLES
    # Another protocol, another file.
    assert seen(seed=1)[0] == seen(weights="b" * 64)[0] == 2 * SAMPLES
    assert seen(samples=SAMPLES - 5)[0] == 2 * (SAMPLES - 5)


def no_room(self: Path, target: Path) -> Path:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_every_metric_has_its_fewest(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "FEWEST", 2049)
    with pytest.raises(UserError, match="holds 120 images; these metrics need 2049 or more"):
        evaluated(shards)


def evaluate_ranks(rank: int, folder: str) -> None:
    inception.FEWEST = 100
    with join("cpu") as world:
        own = Path(folder) / str(world.size)
        shown, figures = evaluated(own / "shards", world=world)
        assert all(other == figures for other in world.gather_objects(figures)), "ranks disagree"
        assert sum(world.gather_objects(len(shown))) == 2 * SAMPLES, "the work is not shared"
        if rank == 0:
            (own / "figures.json").write_text(json.dumps(figures))


@pytest.mark.chaos
def test_the_figures_are_the_same_on_one_two_and_three_ranks(painted: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 3):
        shutil.copytree(painted, tmp_path / str(size) / "shards")  # each makes its features of real images itself
        run_ranks(size, evaluate_ranks, str(tmp_path))
        found.append(json.loads((tmp_path / str(size) / "figures.json").read_text()))
    for other in found[1:]:
        assert other.pop("protocol") == found[0]["protocol"]
        assert other == pytest.approx({key: value for key, value in found[0].items() if key != "protocol"}, rel=1e-5)
