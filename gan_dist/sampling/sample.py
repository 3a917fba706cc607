"""The work of `gan-dist sample`: a run, a checkpoint or a file -> its generator -> what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gan_dist.config.base import check_seed
from gan_dist.data.dataset import open_dataset
from gan_dist.model.networks import Generator
from gan_dist.runs.checkpoint import find, load
from gan_dist.runs.naming import run_path
from gan_dist.sampling.classes import arrange, ask
from gan_dist.sampling.export import check_exportable, export_generator, load_weights
from gan_dist.sampling.generate import animate, build_generator, draw, has_standing_statistics, page
from gan_dist.sampling.neighbours import draw_neighbours
from gan_dist.sampling.standing import NUM_LATENTS, estimate_statistics
from gan_dist.sampling.walk import check_walk, write_walk
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand, why_not_writable
from gan_dist.utils.pictures import grid_side

MAX_PAGE = 16384
"""Pixels a side of a grid."""
MEASURED = f"measured on these weights, over {NUM_LATENTS:,} latents"


@dataclass(frozen=True)
class Source:
    """A generator to draw from: what to call it, where it came from (for the card), and its run, where it has one."""

    name: str
    generator: Generator
    facts: dict[str, Any]
    dataset: str | None = None
    run: Path | None = None


def find_source(run: str | Path, step: int | None = None, device: torch.device | str = "cpu") -> Source:
    """Returns what RUN means: a run's directory or name (at `step` or its newest checkpoint), the directory of one
    checkpoint, or a file of weights (exported here, or another program's).

    Raises UserError when there is no such thing.
    """
    path = run_path(run)
    if path.is_file():
        if step is not None:
            raise UserError(f"--step: {path} is one generator, not a run with checkpoints")
        return Source(path.name, load_weights(path, device), {"file": path.name})
    loaded = load(path) if (path / "state.pt").is_file() and step is None else find(path, step)
    config = loaded.state["config"]
    home = loaded.path.parent.parent
    averaged = bool(loaded.state.get("generator_ema"))
    standing = has_standing_statistics(loaded.state)
    facts = {
        "run": home.name,
        "step": loaded.step,
        "images seen": loaded.state["images_seen"],
        "weights": "averaged over training" if averaged else "as trained",
        "batch norm's statistics": MEASURED if standing else "averaged too" if averaged else "as trained",
        "dataset (sha256 of its manifest)": loaded.manifest.get("dataset"),
        "torch": loaded.manifest.get("torch"),
        "model": config["model"],
        "loss": config["loss"],
        "optim": config["optim"],
    }
    shards = config.get("data", {}).get("shards")
    return Source(f"step {loaded.step} of {home.name}", build_generator(loaded.state, device), facts, shards, home)


def sample_run(
    run: str | Path,
    *,
    step: int | None = None,
    count: int = 64,
    seed: int = 0,
    out: str | Path = "grid.png",
    class_name: str | None = None,
    classes: str | None = None,
    strength: float = 1.0,
    interpolate: bool = False,
    walk: str | Path | None = None,
    seconds: float = 8.0,
    fps: int = 25,
    size: int | None = None,
    truncation: float = 1.0,
    standing_statistics: bool = False,
    individual: str | Path | None = None,
    export: str | Path | None = None,
    animation: str | Path | None = None,
    neighbours: str | Path | None = None,
    dataset: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda verb, done, total: None,
) -> list[str]:
    """Returns a line for each file or folder written.

    Always the grid `out` of `count` images, of latents scaled by `truncation`, arranged as `class_name`, `classes`,
    `strength` and `interpolate` ask, see classes.arrange; `standing_statistics` first measures
    batch norm's statistics on the weights, over such latents. Besides, as asked: each image alone in the folder
    `individual`; the grid as a film `walk` (.mp4 or .gif), whose latents leave those of the grid and come back to them
    after `seconds`, in `fps` frames a second; the generator as `export` (safetensors, with a card beside it); the run's
    own grids as the GIF `animation`; each sample beside its nearest real image as the PNG `neighbours`, from `dataset`
    (default: the one the run was trained on). Grid, film and single images are enlarged to `size` pixels for each
    image, a multiple of the generator's.
    Raises UserError for options that do not fit, before anything is written.
    """
    if count < 1:
        raise UserError(f"--count: expected 1 or more, found {count}")
    check_seed(seed)
    if not 0 < truncation <= 1:
        raise UserError(f"--truncation: expected a number above 0 and up to 1, found {truncation:g}")
    source = find_source(run, step)
    if animation is not None and source.run is None:
        raise UserError(f"--animation: {source.name} has no training to show; name a run")
    asked = ask(source.generator, source.name, class_name, classes, strength)
    if export is not None and expand(export).suffix != ".safetensors":
        raise UserError(f"--export: expected a file name ending in .safetensors, found {export}")
    if export is not None:
        check_exportable(source.generator)
    side = source.generator.resolution
    if size is not None and (size < side or size % side):
        raise UserError(f"--size: expected a multiple of {side}, the pixels that {source.name} draws, found {size}")
    if count * side**2 > MAX_PAGE**2:
        most = (MAX_PAGE // side) ** 2
        raise UserError(f"--count: expected {most:,} or fewer, a grid of {MAX_PAGE:,} pixels a side, found {count:,}")
    plan = arrange(source.generator, asked, count, seed, interpolate, truncation)
    if (width := grid_side(len(plan), size or side, plan.columns)) > MAX_PAGE:
        raise UserError(
            f"{'--size' if size else '--count'}: a grid is at most {MAX_PAGE:,} pixels wide, {len(plan)} images of "
            f"{size or side} would make {width:,}; lower {'--size or ' if size else ''}--count"
        )
    if walk is not None:
        check_walk(expand(walk), seconds, fps, grid_side(len(plan), size or side, plan.columns))
    reals = None
    if neighbours is not None:
        if dataset is None and source.dataset is None:
            raise UserError(f"--neighbours: the dataset that {source.name} was trained on is not known; give --dataset")
        reals = open_dataset(str(dataset or source.dataset))
        if reals.resolution != source.generator.resolution:
            raise UserError(
                f"--neighbours: {source.name} draws {source.generator.resolution} pixels a side, "
                f"{reals.root} holds {reals.resolution}; give the dataset it was trained on"
            )
    files = [out, walk, export, animation, neighbours, *([Path(individual, "0.png")] if individual else [])]
    named = [
        expand(file).resolve() for file in (out, walk, export, animation, neighbours, individual) if file is not None
    ]
    if twice := next((file for file in named if named.count(file) > 1), None):
        raise UserError(f"{twice} is to be written twice: give each of the files another name")
    for file in files:
        if file is not None and (fault := why_not_writable(expand(file))):
            raise UserError(f"cannot write {file}: {fault}")
    if standing_statistics:
        estimate_statistics(source.generator, truncation)
        scaled = "" if truncation == 1 else f" scaled by {truncation:g}"
        source.facts["batch norm's statistics"] = f"{MEASURED}{scaled}"
    try:
        folder = expand(individual) if individual is not None else None
        images = draw(source.generator, plan.inputs(), expand(out), plan.columns, individual=folder, size=size)
        lines = [f"{len(images)} images of {source.name} in {out}"]
        if asked.labels:
            names = [source.generator.classes.name(label) for label in asked.labels]
            ways = "from left to right" if interpolate and len(names) > 1 else "from top to bottom"
            lines.append(f"{ways}: {', '.join(names)}")
        if walk is not None:
            lines.append(
                write_walk(
                    lambda latents: page(source.generator, plan.inputs(latents), size, plan.columns),
                    plan.latents,
                    expand(walk),
                    seed=seed,
                    seconds=seconds,
                    fps=fps,
                    truncation=truncation,
                    progress=progress,
                )
            )
        if individual is not None:
            lines.append(f"each alone in {individual}")
        if export is not None:
            weights, card = export_generator(source.generator, export, source.facts)
            lines.append(f"the generator in {weights}, described in {card}")
        if animation is not None and source.run is not None:
            lines.append(f"{animate(source.run, expand(animation))} moments of training in {animation}")
        if neighbours is not None and reals is not None:
            pairs = draw_neighbours(images, reals, expand(neighbours))
            lines += [f"each sample beside its nearest real image in {neighbours}", *pairs.lines()]
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None
    return lines
