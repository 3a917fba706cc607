"""Everything `gan-dist evaluate` does: finds checkpoints and real images, evaluates, and keeps what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gan_dist.config.base import check_seed
from gan_dist.config.schema import EvaluateConfig
from gan_dist.data.dataset import Dataset, open_dataset
from gan_dist.distributed.world import World
from gan_dist.evaluation import inception
from gan_dist.evaluation.inception import Inception, load_inception
from gan_dist.evaluation.protocol import FEWEST, Evaluation, accuracy, check_samples
from gan_dist.model.networks import Discriminator
from gan_dist.runs.checkpoint import Loaded, find, load, step_directories
from gan_dist.runs.naming import run_path
from gan_dist.runs.record import merged, read_evaluations
from gan_dist.sampling.generate import build_generator
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import write_atomically
from gan_dist.utils.locks import FileLock
from gan_dist.utils.stop import never_cancelled

UNKNOWN = "epoch, near_copies and accuracy_training are left out"
"""What only the set that a run learned from can tell."""


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
    published: bool = False,
    floor: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Returns one row of figures a checkpoint, oldest first; see Evaluation for what is in it. A collective.

    With `dataset`, distances are from that one; epochs, near copies and training images are those of the run's own set
    all the same, and left out with a line where it is not at hand. With `insist`, missing Inception weights are an
    error; without, a line, and the other metrics alone. Rows are kept in evaluations.jsonl of the run, one a step,
    protocol and held-out set. Of several checkpoints, a damaged one is left out with a line. Raises UserError for a run
    without checkpoints, too few samples, a dataset of another resolution, or training images as held-out ones.
    """
    check_seed(seed)
    path = run_path(run)
    # Rank 0 chooses: a run in progress adds and prunes while others look.
    directories, newest = world.from_first(lambda: _choose(path, step, all_checkpoints))
    for line in () if all_checkpoints else newest.skipped:
        say(f"note: passed over {line}")
    with ExitStack() as opened:
        real, own, others = _open_sets(world, opened, path, newest, dataset, held_out, say)
        fewest = max(inception.FEWEST if with_inception and insist else FEWEST, world.size)
        count = samples if samples is not None else _usual_samples(newest.state["config"], real, fewest, say, floor)
        # Before Inception's weights are fetched, or missed.
        check_samples(count, real, fewest, "--samples" if samples is not None else "evaluate.samples", floor=floor)
        features = _inception(world, weights, count, insist, say) if with_inception else None
        evaluation = Evaluation(
            world,
            real,
            count,
            seed=seed,
            learned_from=own,
            features=features,
            published=published,
            floor=floor,
            say=say,
        )
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
            row = _row(world, evaluation, loaded, averaged, own)
            if others is not None:
                row |= world.from_first(partial(_judge, world, loaded, own, others, count, seed))
            say(f"step {loaded.step}: swd {row['swd']:.4g}")
            rows.append(row)
            if world.rank == 0:
                _keep(path, row, say)
    return rows


def _choose(run: Path, step: int | None, everything: bool) -> tuple[list[Path], Loaded]:
    """Returns the directories of the checkpoints to evaluate, oldest first, and the newest one, without its tensors."""
    found = find(run, step)
    told = replace(found, state={"config": found.state["config"]})
    return (step_directories(run / "checkpoints")[::-1] if everything else [found.path]), told


def _open_sets(
    world: World,
    opened: ExitStack,
    run: Path,
    newest: Loaded,
    dataset: str | None,
    held_out: str | None,
    say: Callable[[str], None],
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Returns the real images to compare with, those that the run learned from (None, with a line, where they are not
    at hand), and the held-out ones; `opened` closes them."""
    config, recorded = newest.state["config"], newest.manifest.get("dataset")
    home, side = config["data"]["shards"], config["model"]["resolution"]

    def ready(address: str, option: str) -> Dataset:
        one = opened.enter_context(world.together(lambda: open_dataset(address, config["data"].get("cache_dir"))))
        if one.resolution != side:
            raise UserError(
                f"{one.root} holds {one.resolution}x{one.resolution} images, but {run} draws {side}x{side} ones; "
                f"name another {option}"
            )
        return one

    real = ready(dataset or home, "--dataset")
    own: Dataset | None = real
    if dataset and real.identity != recorded:
        try:
            own = ready(home, "--dataset")
        except (GanDistError, OSError) as error:
            own = None
            say(f"note: the set that the run learned from is not at hand ({error}): {UNKNOWN}")
    if own and recorded not in (None, own.identity):
        say(
            f"note: {home} has manifest {own.identity[:12]}, the run learned from the set with {recorded[:12]}: "
            f"{UNKNOWN}"
        )
        own = None
    others = ready(held_out, "--held-out") if held_out else None
    if others and others.identity in (recorded, own and own.identity):
        raise UserError(f"--held-out: {run} learned from {held_out} itself; name a set that it never saw")
    return real, own, others


def _usual_samples(config: dict[str, Any], real: Dataset, fewest: int, say: Callable[[str], None], floor: bool) -> int:
    """Returns how many images to compare where nobody said: the run's evaluate.samples, or all of a smaller dataset;
    half of it where a `floor` takes the other half."""
    usual = int(config.get("evaluate", EvaluateConfig().model_dump())["samples"])
    most = real.num_samples // 2 if floor else real.num_samples
    if fewest <= most < usual:
        say(f"note: {real.root} holds {real.num_samples} images, so {most} are compared, not {usual}")
    return min(usual, most)


def _row(world: World, evaluation: Evaluation, loaded: Loaded, averaged: bool, own: Dataset | None) -> dict[str, Any]:
    """Returns the figures of a checkpoint, and how far it had come; in epochs, too, where its `own` set is known."""
    state = loaded.state if averaged else {k: v for k, v in loaded.state.items() if k != "generator_ema"}
    generator = build_generator(state, world.device)
    latent_dim = state["config"]["model"]["latent_dim"]
    drawn_by_average = "generator_ema" in state
    figures = evaluation(generator, latent_dim, averaged=drawn_by_average, near_copies=own is not None)
    assert figures is not None  # nobody asks to stop
    seen = int(loaded.state["images_seen"])
    epoch = {"epoch": round(seen / own.num_samples, 2)} if own else {}
    return {"step": loaded.step, "images_seen": seen, **epoch, **figures}


def _inception(
    world: World, weights: Path | None, count: int, insist: bool, say: Callable[[str], None]
) -> Inception | None:
    try:
        if count < inception.FEWEST:
            raise UserError(f"Inception's metrics need {inception.FEWEST} samples or more, found {count}")
        world.from_first(lambda: load_inception(weights, world.device) and None)  # downloads once
        return world.together(lambda: load_inception(weights, world.device))
    except UserError as error:
        if insist:
            raise
        say(f"note: {error}; sliced Wasserstein distance alone")
        return None


def _judge(world: World, loaded: Loaded, own: Dataset | None, others: Dataset, count: int, seed: int) -> dict[str, Any]:
    """Returns how well a checkpoint's discriminator knows its training images, and others, and which those are."""
    model = loaded.state["config"]["model"]
    judge = Discriminator(model["resolution"], model["d_channels"], model["leaky_slope"])
    judge.load_state_dict(loaded.state["discriminator"])
    judge.to(device=world.device).eval()
    training = {"accuracy_training": accuracy(judge, own, count, seed)} if own else {}
    return {**training, "accuracy_held_out": accuracy(judge, others, count, seed), "held_out": others.identity}


def _keep(run: Path, row: dict[str, Any], say: Callable[[str], None]) -> None:
    """Adds `row` to the run's evaluations.jsonl, in one with earlier figures of the same step, protocol and held-out
    set; a figure that was measured again is the newer one."""
    try:
        with FileLock(run / ".evaluations.lock") as lock:  # another evaluation of the run may be at the same point
            lock.take(exclusive=True, wait=never_cancelled)
            try:
                content = "".join(json.dumps(one) + "\n" for one in merged([*read_evaluations(run), row]))
                write_atomically(run / "evaluations.jsonl", content.encode())
            finally:
                lock.path.unlink(missing_ok=True)
    except OSError as error:
        say(f"note: the figures could not be kept in {run}: {error.strerror}")
