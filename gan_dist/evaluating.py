"""Everything `gan-dist evaluate` does: finds checkpoints and real images, evaluates, and keeps what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from gan_dist.config import EvaluateConfig
from gan_dist.data.shards import Dataset, open_dataset
from gan_dist.distributed import World
from gan_dist.errors import GanDistError, UserError
from gan_dist.evaluate import Evaluation, accuracy
from gan_dist.metrics.inception import FEWEST, Inception, load_inception
from gan_dist.model.networks import Discriminator
from gan_dist.naming import run_path
from gan_dist.train.checkpoint import Loaded, find, load, step_directories
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
    in evaluations.jsonl of the run, one a step and protocol. Of several checkpoints, a damaged one is left out with a
    line. Raises UserError for a run without checkpoints, too few samples, or a dataset of another resolution.
    """
    path = run_path(run)
    # Rank 0 chooses: a run in progress adds and prunes while others look.
    directories, config, passed_over = world.from_first(lambda: _choose(path, step, all_checkpoints))
    for line in passed_over:
        say(f"note: passed over {line}")

    def open_as_the_run(address: str | None) -> Dataset | None:
        return open_dataset(address, config["data"].get("cache_dir")) if address else None

    with ExitStack() as opened:
        real, others = world.together(
            lambda: [open_as_the_run(one) for one in (dataset or config["data"]["shards"], held_out)]
        )
        assert real is not None
        for one in (real, others):
            if one is not None:
                opened.enter_context(one)
                _must_fit(one, path, config["model"]["resolution"])
        count = samples if samples is not None else _usual_samples(config, real, say)
        features = _inception(world, weights, count, insist, say) if with_inception else None
        evaluation = Evaluation(world, real, count, seed=seed, features=features, say=say)
        rows: list[dict[str, Any]] = []
        for number, directory in enumerate(directories, 1):
            say(f"checkpoint {number} of {len(directories)}: {count} images against as many of {real.root}")
            try:
                loaded = world.together(partial(load, directory))
            except GanDistError as error:
                if number == len(directories) and not rows:
                    raise
                say(f"note: left out: {error}")
                continue
            row = _row(world, evaluation, loaded, averaged, real.num_samples)
            if others is not None:
                row |= world.from_first(partial(_judge, world, loaded, real, others, count, seed))
            say(f"step {loaded.step}: swd {row['swd']:.4g}")
            rows.append(row)
            if world.rank == 0:
                _keep(path, row, say)
    return rows


def _choose(run: Path, step: int | None, everything: bool) -> tuple[list[Path], dict[str, Any], tuple[str, ...]]:
    """Returns the checkpoints to evaluate, oldest first, the newest one's configuration, and what was passed over."""
    found = find(run, step)
    if not everything:
        return [found.path], found.state["config"], found.skipped
    return step_directories(run / "checkpoints")[::-1], found.state["config"], ()


def _must_fit(dataset: Dataset, run: Path, resolution: int) -> None:
    if dataset.resolution != resolution:
        raise UserError(
            f"{dataset.root} holds {dataset.resolution}x{dataset.resolution} images, but {run} draws "
            f"{resolution}x{resolution} ones; name another --dataset"
        )


def _usual_samples(config: dict[str, Any], real: Dataset, say: Callable[[str], None]) -> int:
    """Returns how many images to compare where nobody said: the run's evaluate.samples, or all of a smaller dataset."""
    usual = int(config.get("evaluate", EvaluateConfig().model_dump())["samples"])
    if real.num_samples < usual:
        say(f"note: {real.root} holds {real.num_samples} images, so that many are compared, not {usual}")
    return min(usual, real.num_samples)


def _row(world: World, evaluation: Evaluation, loaded: Loaded, averaged: bool, epoch: int) -> dict[str, Any]:
    """Returns the figures of a checkpoint, and how far it had come; an `epoch` has so many images."""
    state = loaded.state if averaged else {k: v for k, v in loaded.state.items() if k != "generator_ema"}
    generator = build_generator(state, world.device)
    latent_dim = state["config"]["model"]["latent_dim"]
    figures = evaluation(generator, latent_dim, averaged="generator_ema" in state)
    assert figures is not None  # nobody asks to stop
    seen = int(loaded.state["images_seen"])
    return {"step": loaded.step, "images_seen": seen, "epoch": round(seen / epoch, 2), **figures}


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


def _judge(world: World, loaded: Loaded, real: Dataset, others: Dataset, count: int, seed: int) -> dict[str, float]:
    """Returns how well a checkpoint's discriminator knows its training images, and others."""
    model = loaded.state["config"]["model"]
    judge = Discriminator(model["resolution"], model["d_channels"], model["leaky_slope"])
    judge.load_state_dict(loaded.state["discriminator"])
    judge.to(device=world.device).eval()
    return {
        "accuracy_training": accuracy(judge, real, count, seed),
        "accuracy_held_out": accuracy(judge, others, count, seed),
    }


def _keep(run: Path, row: dict[str, Any], say: Callable[[str], None]) -> None:
    """Adds `row` to the run's evaluations.jsonl, in the place of an earlier one of the same step and protocol."""
    rows = {
        json.dumps([one["step"], one.get("protocol")], sort_keys=True): one for one in [*read_evaluations(run), row]
    }
    content = "".join(json.dumps(one) + "\n" for one in sorted(rows.values(), key=lambda one: int(one["step"])))
    try:
        write_atomically(run / "evaluations.jsonl", content.encode())
    except OSError as error:
        say(f"note: the figures could not be kept in {run}: {error.strerror}")
