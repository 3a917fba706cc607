"""Standing statistics: measured on the weights that draw, the same everywhere, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.runs.checkpoint import find
from gan_dist.sampling.generate import build_generator, draw_latents, generate
from gan_dist.sampling.sample import sample_run
from gan_dist.sampling.standing import BATCH, Standing, estimate_statistics
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.helpers.training import small

STANDING = ["train.ema_half_life_images=64", "train.ema_statistics=standing"]


def _generator(blocks: Any = "plain") -> Generator:
    network = Generator(32, 8, 4, blocks=blocks)
    initialise(network, 0.5, torch.Generator().manual_seed(1))
    return network.double().eval()


def _state(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("blocks", ["plain", "residual"])
def test_maps_are_normalised_by_statistics_of_their_own(blocks: Any) -> None:
    """Of maps drawn from other latents: mean 0 and variance 1 before scale and shift, as in training."""
    network = _generator(blocks)
    estimate_statistics(network)
    assert not network.training
    latents = torch.randn(4000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    x = (latents @ network.convt1.weight.permute(0, 2, 3, 1).flatten(1)).view(4000, 4, 4, -1).permute(0, 3, 1, 2)
    layer = network.get_submodule("bn1")
    moments = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(layer.running_mean, moments[1], rtol=0, atol=0.1)
    torch.testing.assert_close(layer.running_var, moments[0], rtol=0.15, atol=0)
    before = _state(network)
    estimate_statistics(network, 0.5)  # of latents half as large
    torch.testing.assert_close(network.get_buffer("bn1.running_var"), before["bn1.running_var"] / 4, rtol=1e-9, atol=0)


def test_equal_weights_have_equal_statistics_and_no_random_state_moves() -> None:
    one, other = _generator(), _generator()
    with torch.no_grad():  # other statistics before
        other.get_buffer("bn2.running_mean").fill_(7)
    state = torch.get_rng_state()
    for network in (one, other):
        estimate_statistics(network)
    assert torch.equal(torch.get_rng_state(), state)
    tracked = {name: value for name, value in _state(one).items() if not name.endswith("tracked")}
    assert all(torch.equal(value, _state(other)[name]) for name, value in tracked.items())


def test_a_twin_draws_and_its_source_stays() -> None:
    source = _generator()
    before = _state(source)
    standing = Standing(source, Generator(32, 8, 4))
    standing.refresh()
    assert all(torch.equal(value, before[name]) for name, value in _state(source).items())
    latents = torch.randn(BATCH, 8)
    assert not torch.equal(generate(standing.network, latents), generate(source, latents))
    with torch.no_grad():
        source.get_parameter("convt2.weight").mul_(3)
    drawn = generate(standing.network, latents)
    standing.refresh()
    source_like = _generator()
    source_like.load_state_dict(source.state_dict())
    estimate_statistics(source_like)
    assert torch.equal(generate(standing.network, latents), generate(source_like, latents))
    assert not torch.equal(generate(source_like, latents), drawn)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "standing"
    train(small(dataset), STANDING, run_dir=directory, max_steps=8, console=False)
    return directory


def test_training_is_not_touched(dataset: Path, run: Path, tmp_path: Path) -> None:
    """The checkpoint is that of a run whose statistics are averaged; its pictures are not."""
    train(small(dataset), STANDING[:1], run_dir=tmp_path / "averaged", max_steps=8, console=False)
    one, other = find(run).state, find(tmp_path / "averaged").state
    for part in ("generator", "discriminator", "generator_ema"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items()), part
    pictures = [(home / "samples" / "step-00000008.png").read_bytes() for home in (run, tmp_path / "averaged")]
    assert pictures[0] != pictures[1]


def test_checkpoints_draw_and_are_exported_with_them(run: Path, tmp_path: Path) -> None:
    sample_run(run, count=4, out=tmp_path / "a.png", export=tmp_path / "g.safetensors")
    card = (tmp_path / "g.md").read_text()
    assert "- weights: averaged over training" in card
    assert "- batch norm's statistics: measured on these weights, over 1,024 latents" in card
    sample_run(tmp_path / "g.safetensors", count=4, out=tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    state = find(run).state
    plain = {
        **state,
        "config": {**state["config"], "train": {**state["config"]["train"], "ema_statistics": "averaged"}},
    }
    latents = torch.randn(4, 8)
    assert not torch.equal(generate(build_generator(state), latents), generate(build_generator(plain), latents))


def test_truncation_scales_latents_and_is_said(run: Path, tmp_path: Path) -> None:
    whole, half = draw_latents(8, 5, 3), draw_latents(8, 5, 3, truncation=0.5)
    torch.testing.assert_close(half, whole / 2)
    words: dict[str, Any] = {"truncation": 0.5, "standing_statistics": True, "export": tmp_path / "g.safetensors"}
    sample_run(run, count=4, out=tmp_path / "a.png", **words)
    assert "over 1,024 latents scaled by 0.5" in (tmp_path / "g.md").read_text()
    sample_run(run, count=4, out=tmp_path / "b.png", truncation=0.5)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"^--truncation: expected a number above 0 and up to 1, found "):
            sample_run(run, out=tmp_path / "c.png", truncation=wrong)


def test_residual_blocks_are_drawn_but_not_exported(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), ["model.blocks=residual"], run_dir=tmp_path / "run", max_steps=2, console=False)
    sample_run(tmp_path / "run", count=4, out=tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--export: a generator with model\.blocks=residual is no plain stack"):
        sample_run(tmp_path / "run", count=4, out=tmp_path / "b.png", export=tmp_path / "g.safetensors")
    assert not (tmp_path / "b.png").exists()
