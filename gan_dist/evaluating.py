"""Everything `gan-dist evaluate` does: finds checkpoints and real images, evaluates, and keeps what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gan_dist.config import expand_path
from gan_dist.data.shards import open_dataset
from gan_dist.distributed import World
from gan_dist.errors import UserError
from gan_dist.evaluate import Evaluation, accuracy
from gan_dist.metrics.inception import FEWEST, Inception, load_inception
from gan_dist.model.networks import Discriminator
from gan_dist.train.checkpoint import Loaded, find, load, step_directories
from gan_dist.train.rundir import run_path
from gan_dist.watch.pictures import write_atomically
from gan_dist.watch.record import read_evaluations
from gan_dist.watch.sample import build_generator


def evaluate_run(
    world: World,
    run: str | Path,
    *,
    step: int | None = None,
    all_checkpoints: bool = False,
    samples: int | None = None,
    seed: int = 0,
    dataset: str | None = None,
    held_out: str | None = None,
    weights: Path | None = None,
    with_inception: bool = True,
    insist: bool = False,
    averaged: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Returns one row of figures a checkpoint, oldest first; see Evaluation for what is in it. A collective.

    With `insist`, missing Inception weights are an error; without, a line, and the other metrics alone. Rows are kept
    in evaluations.jsonl of the run, one a step. Raises UserError for a run without checkpoints, too few samples, or a
    dataset of another resolution.
    """
    path = run_path(run)
    found = [load(one) for one in reversed(step_directories(path / "checkpoints"))] if all_checkpoints else []
    found = found or [find(path, step)]
    config = found[-1].state["config"]
    real = open_dataset(dataset or config["data"]["shards"])
    others = open_dataset(held_out) if held_out else None
    for one in (real, others):
        if one is not None and one.resolution != config["model"]["resolution"]:
            raise UserError(
                f"{one.root} holds {one.resolution}x{one.resolution} images, but {path} draws "
                f"{config['model']['resolution']}x{config['model']['resolution']} ones; name another --dataset"
            )
    count = samples if samples is not None else config["evaluate"]["samples"]
    features = _inception(world, weights, count, insist, say) if with_inception else None
    evaluation = Evaluation(world, real, count, seed=seed, features=features)
    rows = []
    for loaded in found:
        rows.append(_row(world, evaluation, loaded, averaged))
        if others is not None:
            judge = _discriminator(loaded, world)
            rows[-1]["accuracy_training"] = accuracy(judge, real, count, seed)
            rows[-1]["accuracy_held_out"] = accuracy(judge, others, count, seed)
        say(f"step {loaded.step}: swd {rows[-1]['swd']:.4g}")
    if world.rank == 0:
        _keep(path, rows, say)
    return rows


def _row(world: World, evaluation: Evaluation, loaded: Loaded, averaged: bool) -> dict[str, Any]:
    state = loaded.state if averaged else {k: v for k, v in loaded.state.items() if k != "generator_ema"}
    generator = build_generator(state, world.device)
    latent_dim = state["config"]["model"]["latent_dim"]
    figures = evaluation(generator, latent_dim, averaged="generator_ema" in state)
    assert figures is not None  # nobody asks to stop
    return {"step": loaded.step, "images_seen": int(loaded.state["images_seen"]), **figures}


def _inception(
    world: World, weights: Path | None, count: int, insist: bool, say: Callable[[str], None]
) -> Inception | None:
    try:
        if count < FEWEST and not insist:
            raise UserError(f"Inception's metrics need {FEWEST} samples or more, found {count}")
        world.from_first(lambda: load_inception(weights, world.device) and None)  # downloads once
        return world.together(lambda: load_inception(weights, world.device))
    except UserError as error:
        if insist:
            raise
        say(f"note: {error}; sliced Wasserstein distance alone")
        return None


def _discriminator(loaded: Loaded, world: World) -> Discriminator:
    model = loaded.state["config"]["model"]
    judge = Discriminator(model["resolution"], model["d_channels"], model["leaky_slope"])
    judge.load_state_dict(loaded.state["discriminator"])
    return judge.to(device=world.device).eval()


def _keep(run: Path, rows: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Adds `rows` to the run's evaluations.jsonl, each in the place of an earlier one of the same step and protocol."""
    everything = [*read_evaluations(run), *rows]
    kept = {json.dumps([row["step"], row.get("protocol")], sort_keys=True): row for row in everything}
    content = "".join(json.dumps(row) + "\n" for row in sorted(kept.values(), key=lambda row: int(row["step"])))
    try:
        write_atomically(run / "evaluations.jsonl", content.encode())
    except OSError as error:
        say(f"note: the figures could not be kept in {expand_path(str(run))}: {error.strerror}")
