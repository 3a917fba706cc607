"""Every game that the schema allows can be built and played, saved and continued; the others are refused in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan_dist.config.diff import continuation
from gan_dist.config.schema import (
    WITH_SIGN,
    Blocks,
    ClassSource,
    Config,
    DNorm,
    Init,
    LossName,
    PenaltyMethod,
    Upsample,
    load_config,
    preset,
)
from gan_dist.data.classes import NO_CLASSES
from gan_dist.distributed.world import World
from gan_dist.runs.checkpoint import find
from gan_dist.runs.run_dir import Start
from gan_dist.sampling.generate import build_generator
from gan_dist.sampling.standing import estimate_statistics
from gan_dist.training.setup import build_ema, build_update
from gan_dist.training.trainer import train
from gan_dist.training.update import Update
from gan_dist.utils.errors import UserError
from tests.helpers.games import LATENT_DIM, RESOLUTION, STYLES, batches, moves, tensors
from tests.helpers.training import assert_identical, final_state, small

SMALL = {"resolution": RESOLUTION, "latent_dim": LATENT_DIM, "g_channels": 2, "d_channels": 2}
TARGETS = st.one_of(st.just(1.0), st.sampled_from([0.8, 0.9]))
MODELS = st.fixed_dictionaries(
    {
        "upsample": st.sampled_from(get_args(Upsample)),
        "d_norm": st.sampled_from(get_args(DNorm)),
        "init": st.sampled_from(get_args(Init)),
        "blocks": st.sampled_from(get_args(Blocks)),
        "minibatch_std": st.booleans(),
        "classes": st.sampled_from(get_args(ClassSource)),
    }
)
AUGMENTS = st.fixed_dictionaries(
    {
        **{kind: st.booleans() for kind in ("colour", "translation", "cutout")},
        "probability": st.sampled_from([0.3, 1.0]),
        "target": st.sampled_from([None, 0.6]),
    }
)
PENALTIES = st.fixed_dictionaries(
    {
        "weight": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        "sigma": st.sampled_from([0.01, 0.1]),
        "on": st.sampled_from(["real", "both"]),
        "share": st.sampled_from([1.0, 0.5, 0.25, 0.01]),
        "method": st.sampled_from(get_args(PenaltyMethod)),
    }
)
LOSSES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(get_args(LossName)),
        "real_target": TARGETS,
        "generator_target": st.one_of(st.none(), TARGETS),
        "gradient_penalty": PENALTIES,
    }
)
BETAS = st.sampled_from([(0.5, 0.999), (0.0, 0.99), (0.5, 0.9)])
OPTIMS = st.fixed_dictionaries(
    {
        "g_lr": st.sampled_from([1e-3, 2e-4]),
        "d_lr": st.sampled_from([1e-3, 2e-4]),
        "warmup_images": st.sampled_from([0, 1, 20]),
        "decay": st.sampled_from(["none", "linear", "cosine"]),
        "decay_images": st.sampled_from([0, 1, 30]),
        "decay_to": st.sampled_from([0.0, 0.1]),
        "betas": BETAS,
        "g_betas": st.one_of(st.none(), BETAS),
        "d_betas": st.one_of(st.none(), BETAS),
        "beta2_to": st.sampled_from([None, 0.99]),
        "beta2_images": st.sampled_from([0, 1, 30]),
        "d_steps": st.integers(1, 2),
    }
)
TRAINS = st.fixed_dictionaries(
    {
        "runner": st.sampled_from(["auto", "eager"]),
        "global_batch": st.sampled_from([1, 3, 4]),
        "ema_half_life_images": st.sampled_from([0, 1, 1000]),
        "ema_statistics": st.sampled_from(["averaged", "standing"]),
    }
)


def configured(**sections: Any) -> Config:
    sections["model"] = {**SMALL, **sections.get("model", {})}
    sections["train"] = {"global_batch": 4, **sections.get("train", {})}
    return load_config({**sections, "data": {"shards": "/tmp/none", **sections.get("data", {})}})


def built(config: Config) -> Update:
    classes = STYLES if config.model.classes == "dataset" else NO_CLASSES
    update = build_update(config, World(), "fp32", classes=classes)
    update.augment = replace(update.augment, images_to_full=16)  # so that ten steps move it
    return update


def whole_or_nothing(optim: dict[str, Any], train: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns both with what belongs together made to fit: three independent such pairs would leave little to play."""
    falls, ramps, averages = optim["decay"] != "none", optim["beta2_to"] is not None, train["ema_half_life_images"] > 0
    optim = optim | {
        "decay_images": (optim["decay_images"] or 30) * falls,
        "beta2_images": (optim["beta2_images"] or 30) * ramps,
    }
    return optim, train | {"ema_statistics": train["ema_statistics"] if averages else "averaged"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=MODELS, loss=LOSSES, augment=AUGMENTS, optim=OPTIMS, train=TRAINS, fits=st.sampled_from([True] * 3 + [False])
)
def test_what_the_schema_allows_is_played_and_the_rest_is_refused(
    model: dict[str, Any],
    loss: dict[str, Any],
    augment: dict[str, Any],
    optim: dict[str, Any],
    train: dict[str, Any],
    fits: bool,
) -> None:
    if fits:
        optim, train = whole_or_nothing(optim, train)
    try:
        config = configured(model=model, loss=loss, data={"augment": augment}, optim=optim, train=train)
    except UserError as error:
        line, penalty = str(error), loss["gradient_penalty"]
        assert "\n" not in line
        if line.startswith("configuration: loss.gradient_penalty"):
            assert penalty["weight"] and (
                model["d_norm"] == "batch" or (penalty["method"], train["runner"]) == ("exact", "auto")
            )
        elif line.startswith("configuration: model.minibatch_std"):
            assert penalty["weight"] and model["minibatch_std"]
        elif line.startswith("configuration: data.augment.target"):
            changes = augment["colour"] or augment["translation"] or augment["cutout"]
            assert augment["target"] and (loss["name"] not in WITH_SIGN or not changes)
        elif line.startswith("configuration: optim.decay_images"):
            assert (optim["decay"] == "none") != (optim["decay_images"] == 0)
        elif line.startswith("configuration: optim.beta2_images"):
            assert (optim["beta2_to"] is None) != (optim["beta2_images"] == 0)
        elif line.startswith("configuration: train.ema_statistics"):
            assert train["ema_statistics"] == "standing" and train["ema_half_life_images"] == 0
        else:
            assert loss["name"] in line and (loss["generator_target"] is not None or loss["real_target"] != 1)
        return
    play_ten_steps(config)


def play_ten_steps(config: Config) -> None:
    """Plays as the loop does: rates that move, and an averaged generator that follows."""
    update, images = built(config), config.train.global_batch * config.optim.d_steps
    ema = build_ema(config, update, Start(), STYLES if update.num_classes else NO_CLASSES)
    for step in range(10):
        update.begin(step * images)
        stats = update.step(*moves(update, step))
        assert torch.isfinite(stats).all() and stats[-1] == 0, (step, stats)
        if ema is not None:
            ema.update((step + 1) * images)
    networks = [update.g.network, update.d.network]
    for network in networks if ema is None else [*networks, ema.network]:
        assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    if ema is not None and config.train.ema_statistics == "standing":
        estimate_statistics(ema.network)  # type: ignore[arg-type]
    rates = [update.schedule(10 * images), update.schedule(0)]
    assert all(0 <= rate <= 1 for rate in rates) and rates[1] > 0


def assert_continues(config: Config) -> None:
    """Asserts that a game of two steps, saved and continued for two, has the state of one of four."""
    through, first = built(config), built(config)
    for step in range(4):
        through.step(*moves(through, step))
    for step in range(2):
        first.step(*moves(first, step))
    second = built(config)
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        second.step(*moves(second, step))
    theirs = tensors(second)
    for name, value in tensors(through).items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("blocks", get_args(Blocks))
@pytest.mark.parametrize("d_norm", get_args(DNorm))
@pytest.mark.parametrize("upsample", get_args(Upsample))
def test_a_state_continues_bit_for_bit(d_norm: DNorm, upsample: Upsample, blocks: Blocks) -> None:
    penalty = {"weight": 0.0 if d_norm == "batch" else 0.1, "share": 0.5}
    loss = {"name": "hinge", "gradient_penalty": penalty}
    model: dict[str, Any] = {
        "d_norm": d_norm,
        "upsample": upsample,
        "blocks": blocks,
        "minibatch_std": d_norm == "batch",
    }
    model["classes"] = "dataset" if upsample == "nearest" else "none"
    config = configured(model=model, loss=loss, data={"augment": {"translation": True, "cutout": True, "target": 0.6}})
    assert_continues(config)


def test_the_modern_game_continues_bit_for_bit() -> None:
    made = preset("paintings64-modern").to_dict()
    rates = {"decay_images": 60}  # which fall within these steps
    optim, augment = made["optim"] | rates, made["data"]["augment"]
    config = configured(model=made["model"] | SMALL, loss=made["loss"], optim=optim, data={"augment": augment})
    assert_continues(config)


@pytest.mark.parametrize("d_norm", get_args(DNorm))
def test_a_skipped_step_leaves_nothing_behind(d_norm: DNorm) -> None:
    """Spectral norm's vectors move in a forward pass, as running statistics do."""
    update = built(configured(model={"d_norm": d_norm}))
    reals, latents = batches(update, 0)
    update.step(reals, latents)
    before = tensors(update)
    latents[0][0, 0] = torch.nan
    assert update.step(reals, latents)[-1] == 2
    after = tensors(update)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


KIT = [
    "model.d_norm=none",
    "loss.gradient_penalty.weight=0.1",
    "loss.gradient_penalty.share=0.5",
    "data.augment.translation=true",
    "data.augment.colour=true",
    "data.augment.target=0.6",
    "train.ema_half_life_images=32",
    "train.ema_statistics=standing",
]


def test_a_run_with_all_of_it_that_is_interrupted_ends_as_one_that_is_not(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), KIT, run_dir=tmp_path / "through", max_steps=8, console=False)
    train(small(dataset), KIT, run_dir=tmp_path / "cut", max_steps=3, console=False)
    train(small(dataset), KIT, run_dir=tmp_path / "cut", max_steps=8, console=False)
    assert_identical(tmp_path / "through", tmp_path / "cut")
    for one in ("through", "cut"):
        assert final_state(tmp_path / one)["augment"]["probability"] > 0
    pictures = [(tmp_path / one / "samples" / "step-00000008.png").read_bytes() for one in ("through", "cut")]
    assert pictures[0] == pictures[1]
    metrics = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    moved = [line["augment/probability"] for line in metrics if "augment/probability" in line]
    assert len(moved) > 2 and 0 <= moved[0] < moved[-1] <= 1


@pytest.mark.parametrize("word", ["loss.gradient_penalty.share=1", "data.augment.target=null"])
def test_that_comparison_sees_another_game(dataset: Path, tmp_path: Path, word: str) -> None:
    train(small(dataset), KIT, run_dir=tmp_path / "one", max_steps=2, console=False)
    train(small(dataset), [*KIT, word], run_dir=tmp_path / "other", max_steps=2, console=False)
    with pytest.raises(AssertionError):
        assert_identical(tmp_path / "one", tmp_path / "other")


def test_a_run_from_before_these_keys_goes_on(dataset: Path, tmp_path: Path) -> None:
    """Its checkpoint's configuration lacks them, which means their defaults."""
    train(small(dataset), run_dir=tmp_path / "run", max_steps=3, console=False)
    file = find(tmp_path / "run").path / "state.pt"
    state = torch.load(file)
    del state["config"]["loss"]["gradient_penalty"], state["config"]["data"]["augment"]
    for key in ("classes", "classes_min_images", "blocks", "minibatch_std", "upsample", "d_norm", "init"):
        del state["config"]["model"][key]
    refused, notes = continuation(state["config"], load_config(small(dataset)).to_dict())
    assert not refused and not notes
    refused, _ = continuation(state["config"], load_config(small(dataset), ["data.augment.colour=true"]).to_dict())
    assert refused == ["data.augment.colour was False, now True"]
    assert build_generator(state).blocks == "plain"
