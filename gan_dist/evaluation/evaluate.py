"""The work of `gan-dist evaluate`: finds checkpoints and real images, evaluates, and keeps the figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gan_dist.config.base import check_seed
from gan_dist.data.classes import Classes, Labels
from gan_dist.data.dataset import Dataset, open_dataset
from gan_dist.distributed.world import World
from gan_dist.evaluation import encoder, inception
from gan_dist.evaluation.encoder import Encoder, load_encoder
from gan_dist.evaluation.inception import Inception, load_inception
from gan_dist.evaluation.protocol import FEWEST, Evaluation, accuracy, check_samples
from gan_dist.model.networks import Generator, build_discriminator
from gan_dist.runs.checkpoint import Loaded, find, load, step_directories
from gan_dist.runs.naming import run_path
from gan_dist.runs.record import merged, read_evaluations
from gan_dist.sampling.generate import build_generator
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import expand, write_atomically
from gan_dist.utils.locks import FileLock
from gan_dist.utils.stop import never_cancelled

AUTO, NONE = "auto", "none"
USUAL_SAMPLES = 10_000
"""Samples for a run whose configuration is older than evaluate.samples."""
PER_CLASS = 1000
"""Real images that a class must have for figures of its own, and images that these are from."""
LEFT_OUT = "epoch, near_copies and accuracy_training are left out"
"""The figures that need the very dataset that the run was trained on."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, compared with what. Raises UserError for a seed out of range and for contradictions."""

    step: int | None = None
    """The checkpoint to evaluate; None: the newest."""
    all_checkpoints: bool = False
    """Evaluate every checkpoint of the run instead of one."""
    samples: int | None = None
    """Generated images, and as many real ones; None: the run's evaluate.samples, or all of a smaller dataset."""
    seed: int = 0
    """Keys the latents, the choice of real images, and the patches and directions of the distance."""
    dataset: str | None = None
    """The real images to compare with; None: the dataset that the run was trained on."""
    held_out: str | None = None
    """A dataset that the run has never seen, on which its discriminator is tried."""
    encoder: str = AUTO
    """A file that `gan-dist encoder` wrote. `auto`: the one in the folder of the real images, where there is one.
    `none`: go without."""
    inception: str = AUTO
    """A file of Inception's weights, which has to be there. `auto`: the public weights, downloaded once; without a
    network, a note and the other metrics alone. `none`: the other metrics alone."""
    averaged: bool = True
    """Evaluate the averaged generator, where the run has one."""
    published: bool = False
    """Add the sliced Wasserstein distance in the form of the ProGAN paper's program; takes several times as long."""
    classes: bool = False
    """Add figures of each class with PER_CLASS images or more, from as many images."""
    floor: bool = False
    """Add the distance between the real images and as many others, which no generator need beat."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.step is not None and self.all_checkpoints:
            raise UserError("--step and --all-checkpoints say different things; give one of them")

    @property
    def inception_file(self) -> str | None:
        return None if self.inception in (AUTO, NONE) else self.inception


def evaluate_run(
    world: World,
    run: str | Path,
    options: EvaluationOptions = EvaluationOptions(),
    log: Log = lambda line: None,
) -> list[dict[str, Any]]:
    """Returns one row of figures a checkpoint, oldest first; see Evaluation for its keys. A collective.

    Epochs, near copies and training images are always those of the run's own dataset; where that is not at hand they
    are left out, with a note in the log. Rows are kept in evaluations.jsonl of the run, one a step, protocol and
    held-out set. Of several checkpoints, a damaged one is left out with a note. Raises UserError for a run without
    checkpoints, too few samples, a dataset of another resolution, or training images as held-out ones.
    """
    path = run_path(run)
    # Rank 0 chooses: a run in progress adds and prunes checkpoints meanwhile.
    directories, newest = world.from_first(lambda: _choose(path, options))
    for line in () if options.all_checkpoints else newest.skipped:
        log(f"note: passed over {line}")
    if options.classes and newest.state["config"]["model"].get("classes", "none") == "none":
        raise UserError(f"--classes: {path} knows no classes; a run with model.classes=dataset learns them")
    with ExitStack() as opened:
        real, own, held_out = _open_datasets(world, opened, path, newest, options, log)
        # Before Inception's weights are downloaded, or missed.
        samples = _num_samples(world, newest.state["config"], real, options, log)
        evaluation = Evaluation(
            world,
            real,
            samples,
            seed=options.seed,
            learned_from=own,
            features=_load_inception(world, samples, options, log),
            encoder=choose_encoder(world, options.encoder, "--encoder", real, samples, log),
            published=options.published,
            floor=options.floor,
            log=log,
        )
        rows: list[dict[str, Any]] = []
        for number, directory in enumerate(directories, 1):
            log(f"checkpoint {number} of {len(directories)}: {samples} images against as many of {real.root}")
            try:
                loaded = world.together(partial(load, directory))
            except GanDistError as error:
                if number == len(directories) and not rows:
                    raise
                log(f"note: left out: {error}")
                continue
            state = loaded.state
            if not options.averaged:
                state = {key: value for key, value in state.items() if key != "generator_ema"}
            generator = build_generator(state, world.device)
            row = _row(evaluation, generator, loaded, "generator_ema" in state, own)
            if options.classes:
                row["classes"] = _class_rows(world, real, generator, evaluation, options.seed)
            if held_out is not None:
                row |= world.from_first(partial(_accuracies, world, loaded, own, held_out, samples, options.seed))
            log(f"step {loaded.step}: swd {row['swd']:.4g}")
            rows.append(row)
            if world.rank == 0:
                _keep(path, row, log)
    return rows


def _choose(run: Path, options: EvaluationOptions) -> tuple[list[Path], Loaded]:
    """Returns the directories of the checkpoints to evaluate, oldest first, and the newest one, without its tensors."""
    newest = find(run, options.step)
    directories = step_directories(run / "checkpoints")[::-1] if options.all_checkpoints else [newest.path]
    return directories, replace(newest, state={"config": newest.state["config"]})


def _open_datasets(
    world: World, opened: ExitStack, run: Path, newest: Loaded, options: EvaluationOptions, log: Log
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Returns the real images to compare with, those that the run was trained on (None, with a note, where they are not
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

    real = ready(options.dataset or home, "--dataset")
    own: Dataset | None = real
    if options.dataset and real.identity != recorded:
        try:
            own = ready(home, "--dataset")
        except (GanDistError, OSError) as error:
            own = None
            log(f"note: the dataset that the run was trained on is not at hand ({error}): {LEFT_OUT}")
    if own and recorded not in (None, own.identity):
        log(
            f"note: {home} has manifest {own.identity[:12]}, the run was trained on the one with {recorded[:12]}: "
            f"{LEFT_OUT}"
        )
        own = None
    held_out = ready(options.held_out, "--held-out") if options.held_out else None
    if held_out and held_out.identity in (recorded, own and own.identity):
        raise UserError(f"--held-out: {run} was trained on {options.held_out}; name a dataset that it has never seen")
    return real, own, held_out


def _num_samples(world: World, config: dict[str, Any], real: Dataset, options: EvaluationOptions, log: Log) -> int:
    """Returns how many images to compare. Raises UserError where they, or the dataset, are too few for the metrics."""
    fewest = max(inception.FEWEST if options.inception_file else FEWEST, world.size)
    if options.samples is not None:
        check_samples(options.samples, real, fewest, "--samples", floor=options.floor)
        return options.samples
    usual = int(config.get("evaluate", {}).get("samples", USUAL_SAMPLES))
    most = real.num_samples // 2 if options.floor else real.num_samples
    if fewest <= most < usual:
        log(f"note: {real.root} holds {real.num_samples} images, so {most} are compared, not {usual}")
    samples = min(usual, most)
    check_samples(samples, real, fewest, floor=options.floor)
    return samples


def _load_inception(world: World, samples: int, options: EvaluationOptions, log: Log) -> Inception | None:
    if options.inception == NONE:
        return None
    file = options.inception_file
    try:
        if samples < inception.FEWEST:
            raise UserError(f"Inception's metrics need {inception.FEWEST} samples or more, found {samples}")
        world.from_first(lambda: load_inception(file, world.device) and None)  # downloads once
        return world.together(lambda: load_inception(file, world.device))
    except UserError as error:
        if file:
            raise
        log(f"note: {error}; sliced Wasserstein distance alone")
        return None


def choose_encoder(world: World, wanted: str, option: str, real: Dataset, samples: int, log: Log) -> Encoder | None:
    """Returns the encoder that `wanted` names: a file, `auto` (the one in the folder of the real images, where there is
    one) or `none`. A collective. Raises UserError, about `option`, for a file that holds none, and for few samples."""
    path = real.root / encoder.FILE if wanted == AUTO else expand(wanted)
    if wanted == NONE or (wanted == AUTO and not world.from_first(path.is_file)):
        return None
    if samples < encoder.FEWEST and wanted == AUTO:
        log(f"note: {path} is not used: its figures need {encoder.FEWEST} samples or more, found {samples}")
        return None
    if samples < encoder.FEWEST:
        raise UserError(f"{option}: its figures need {encoder.FEWEST} samples or more, found {samples}")
    return world.together(lambda: load_encoder(path, real.resolution, world.device))


def _row(
    evaluation: Evaluation, generator: Generator, loaded: Loaded, averaged: bool, own: Dataset | None
) -> dict[str, Any]:
    """Returns the figures of a checkpoint, and how far it had come; in epochs, too, where its `own` set is known."""
    latent_dim = loaded.state["config"]["model"]["latent_dim"]
    figures = evaluation(generator, latent_dim, averaged=averaged, near_copies=own is not None)
    assert figures is not None  # nobody asks to stop
    seen = int(loaded.state["images_seen"])
    epoch = {"epoch": round(seen / own.num_samples, 2)} if own else {}
    return {"step": loaded.step, "images_seen": seen, **epoch, **figures}


def _class_rows(
    world: World, real: Dataset, generator: Generator, evaluation: Evaluation, seed: int
) -> dict[str, dict[str, Any]]:
    """Returns figures of each class that has PER_CLASS images or more in `real`, by name: its real images, the distance
    and the diversity of PER_CLASS images, and in what share of those asked of it a classifier sees it, where there is
    an encoder."""
    labels = world.from_first(lambda: Labels(real, generator.classes).of(np.arange(real.num_samples)))
    rows: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(generator.classes.names, start=1):
        members = np.flatnonzero(labels == label)
        if len(members) < PER_CLASS:
            continue
        alone = Evaluation(world, real, PER_CLASS, seed=seed, label=label, members=members)
        figures = alone(generator, generator.latent_dim, averaged=False, near_copies=False)
        assert figures is not None  # nobody asks to stop
        rows[name] = {"images": len(members), "swd": figures["swd"], "diversity": figures["diversity"]}
        if label in evaluation.agreements:
            rows[name]["agreement"] = evaluation.agreements[label][1]
    return rows


def _accuracies(
    world: World, loaded: Loaded, own: Dataset | None, held_out: Dataset, samples: int, seed: int
) -> dict[str, Any]:
    """Returns the accuracy of a checkpoint's discriminator on its training images and on held-out ones."""
    judge = build_discriminator(loaded.state["config"]["model"], Classes.of_state(loaded.state))
    judge.load_state_dict(loaded.state["discriminator"])
    judge.to(device=world.device).eval()
    training = {"accuracy_training": accuracy(judge, own, samples, seed)} if own else {}
    held_out_accuracy = accuracy(judge, held_out, samples, seed)
    return {**training, "accuracy_held_out": held_out_accuracy, "held_out": held_out.identity}


def _keep(run: Path, row: dict[str, Any], log: Log) -> None:
    """Adds `row` to the run's evaluations.jsonl, merged with earlier figures of the same step, protocol and held-out
    set; a figure that was measured again replaces the older one."""
    try:
        with FileLock(run / ".evaluations.lock") as lock:  # another evaluation of the run may be at the same point
            lock.take(exclusive=True, wait=never_cancelled)
            try:
                content = "".join(json.dumps(one) + "\n" for one in merged([*read_evaluations(run), row]))
                write_atomically(run / "evaluations.jsonl", content.encode())
            finally:
                lock.path.unlink(missing_ok=True)
    except OSError as error:
        log(f"note: the figures could not be kept in {run}: {error.strerror}")
