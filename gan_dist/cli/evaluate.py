"""`gan-dist evaluate`: how good a run's generator is, at one checkpoint or at all of them."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gan_dist.cli.common import print_table
from gan_dist.utils.errors import UserError

TIMEOUT_S = 7200.0
"""Precision and recall of 50,000 samples take rank 0 this long on a slow CPU; a rank that dies is noticed at once."""


def evaluate(
    run: Annotated[str, typer.Argument(help="A run: its directory, or its name under $GAN_DIST_RUNS.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint to evaluate. [default: the newest]")] = None,
    all_checkpoints: Annotated[bool, typer.Option("--all-checkpoints", help="Evaluate every checkpoint.")] = False,
    samples: Annotated[
        int | None, typer.Option(help="Generated and real images to compare. [default: the run's evaluate.samples]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Keys latents, real images, patches and directions.")] = 0,
    dataset: Annotated[str | None, typer.Option(help="Real images to compare with. [default: the run's]")] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="Images the run has never seen, to test its discriminator on."),
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(metavar="FILE", help="An encoder's file; auto: the dataset's own; none: go without."),
    ] = "auto",
    inception: Annotated[
        str, typer.Option(metavar="FILE", help="Inception's weights; auto: download them; none: go without.")
    ] = "auto",
    averaged: Annotated[bool, typer.Option(help="Evaluate the averaged generator, where there is one.")] = True,
    published: Annotated[
        bool, typer.Option("--progan", help="Add the distance in ProGAN's published form; takes several times as long.")
    ] = False,
    floor: Annotated[
        bool, typer.Option("--floor", help="Add the distance between real images and as many other real ones.")
    ] = False,
    classes: Annotated[
        bool, typer.Option("--classes", help="Add figures of each class that has 1,000 images or more.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, or with --all-checkpoints a list.")
    ] = False,
) -> None:
    """Measure the quality of a run's generator.

    Sliced Wasserstein distance, FID, KID, precision, recall, the feature distance where the dataset has an encoder, and
    signs of collapse and copying. Under torchrun the ranks share the work; the figures are the same. They are kept in
    RUN/evaluations.jsonl, and `gan-dist report RUN` shows them.
    """
    from gan_dist.distributed.world import join
    from gan_dist.evaluation.evaluate import PER_CLASS, EvaluationOptions, evaluate_run
    from gan_dist.evaluation.protocol import warnings

    check_device(device)
    options = EvaluationOptions(
        step=step,
        all_checkpoints=all_checkpoints,
        samples=samples,
        seed=seed,
        dataset=dataset,
        held_out=held_out,
        encoder=encoder,
        inception=inception,
        averaged=averaged,
        published=published,
        floor=floor,
        classes=classes,
    )
    with join(device, timeout_s=TIMEOUT_S) as world:
        console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=world.rank != 0)
        with console.status("starting") as status:  # on a terminal alone

            def log(line: str) -> None:
                console.print(line, markup=False)
                status.update(escape(line))

            rows = evaluate_run(world, run, options, log)
        if world.rank != 0:
            return
        if as_json:
            print(json.dumps(rows if all_checkpoints else rows[0], indent=2))
        else:
            heads = [key for key in rows[0] if key not in ("protocol", "held_out", "classes")]
            print_table(heads, ([_cell(row.get(key)) for key in heads] for row in rows))
            if found := rows[-1].get("classes"):
                heads = list(next(iter(found.values())))
                print_table(
                    ["class", *heads], ([name, *(_cell(one.get(k)) for k in heads)] for name, one in found.items())
                )
        if classes and not rows[-1].get("classes"):
            print(f"note: --classes: no class has {PER_CLASS:,} images, so none has figures", file=sys.stderr)
        for line in warnings(rows[-1], max((row["diversity"] for row in rows[:-1]), default=0.0)):
            print(f"WARNING: {line}", file=sys.stderr)


def encoder(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="What `gan-dist prepare` wrote, or its address.")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where it is written. [default: DATASET/encoder.safetensors]")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to learn from, in as many epochs as it takes.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Keys the weights at the start, the order and the views.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Learn the features that `gan-dist evaluate` compares, from the dataset itself.

    Once a dataset, without labels and without a network; some minutes. Where a dataset has an encoder, every evaluation
    has the feature distance, precision and recall. Figures of two encoders do not compare.
    """
    from gan_dist.config.base import check_seed
    from gan_dist.data.dataset import open_dataset
    from gan_dist.distributed.world import choose_device
    from gan_dist.evaluation.encoder import FILE, make_encoder
    from gan_dist.utils.files import expand, is_address
    from gan_dist.utils.progress import progress

    check_seed(seed)
    check_device(device)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("gan-dist encoder learns in one process; start it without torchrun")
    if out is None and is_address(dataset):
        raise UserError(f"{dataset} is an address; name a file for the encoder with --out FILE")
    path = expand(out) if out else expand(dataset) / FILE
    with open_dataset(dataset) as real, progress() as shown:
        new = make_encoder(real, path, images, seed, choose_device(device, 0), shown)
    print(f"{'wrote' if new else 'there already:'} {path}")


def check_device(device: str) -> None:
    """Raises UserError unless --device is one that there may be."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, found {device}")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
