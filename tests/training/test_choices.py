"""Every game that the schema allows can be built and played, saved and continued; the others are refused in a line."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan_dist.config.schema import Config, DNorm, Init, LossName, PenaltyMethod, Upsample, load_config
from gan_dist.distributed.world import World
from gan_dist.training.setup import build_update
from gan_dist.training.update import Update
from gan_dist.utils.errors import UserError
from tests.helpers.games import LATENT_DIM, RESOLUTION, batches, moves, tensors

SMALL = {"resolution": RESOLUTION, "latent_dim": LATENT_DIM, "g_channels": 2, "d_channels": 2}
TARGETS = st.one_of(st.just(1.0), st.sampled_from([0.8, 0.9]))
MODELS = st.fixed_dictionaries(
    {
        "upsample": st.sampled_from(get_args(Upsample)),
        "d_norm": st.sampled_from(get_args(DNorm)),
        "init": st.sampled_from(get_args(Init)),
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


def configured(**sections: Any) -> Config:
    sections["model"] = {**SMALL, **sections.get("model", {})}
    sections["train"] = {"global_batch": 4, **sections.get("train", {})}
    return load_config({"data": {"shards": "/tmp/none"}, **sections})


def built(config: Config) -> Update:
    return build_update(config, World(), "fp32")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=MODELS, loss=LOSSES, d_steps=st.integers(1, 2), runner=st.sampled_from(["auto", "eager"]))
def test_what_the_schema_allows_is_played_and_the_rest_is_refused(
    model: dict[str, Any], loss: dict[str, Any], d_steps: int, runner: str
) -> None:
    try:
        config = configured(model=model, loss=loss, optim={"d_steps": d_steps}, train={"runner": runner})
    except UserError as error:
        line, penalty = str(error), loss["gradient_penalty"]
        assert "\n" not in line
        if line.startswith("configuration: loss.gradient_penalty"):
            assert penalty["weight"] and (
                model["d_norm"] == "batch" or (penalty["method"], runner) == ("exact", "auto")
            )
        else:
            assert loss["name"] in line and (loss["generator_target"] is not None or loss["real_target"] != 1)
        return
    update = built(config)
    for step in range(10):
        stats = update.step(*moves(update, step))
        assert torch.isfinite(stats).all() and stats[-1] == 0, (step, stats)


@pytest.mark.parametrize("d_norm", get_args(DNorm))
@pytest.mark.parametrize("upsample", get_args(Upsample))
def test_a_state_continues_bit_for_bit(d_norm: DNorm, upsample: Upsample) -> None:
    penalty = {"weight": 0.0 if d_norm == "batch" else 0.1, "share": 0.5}
    loss = {"name": "hinge", "gradient_penalty": penalty}
    config = configured(model={"d_norm": d_norm, "upsample": upsample}, loss=loss)
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
