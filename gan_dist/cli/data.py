"""`gan-dist prepare` and `gan-dist verify`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from gan_dist.cli.common import console, print_lines, resumable
from gan_dist.utils.errors import EXIT_FAILED, UserError


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE... OUT", help="Folders, zips, tars, WebDataset shards; last, the new dataset."),
    ],
    resolution: Annotated[int, typer.Option(help="Side of the square images in pixels.")] = 64,
    resample: Annotated[str, typer.Option(help="lanczos, bicubic, bilinear or box.")] = "lanczos",
    replacements: Annotated[
        str | None, typer.Option(help="A source whose files replace those of the same name.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="CSV:FILECOL:LABELCOL|folders", help="A class for each image: a table, or its folder."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read and decode; a slow disk wants more. [default: one a CPU]")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts (a SLURM array).")] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Of files with the same bytes, keep one.")] = False,
    max_reject_fraction: Annotated[float, typer.Option(help="Fail when more than this share is rejected.")] = 0.05,
    shard_samples: Annotated[int, typer.Option(help="Samples in a shard.")] = 4096,
    min_side: Annotated[int, typer.Option(help="Reject images whose short side is below this.")] = 1,
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Keep, flagged, what can be decoded of truncated files.")
    ] = False,
    full_decode: Annotated[
        bool,
        typer.Option(
            "--full-decode",
            help="Decode JPEGs at full scale: slower; with bilinear, equal to torchvision's Resize and CenterCrop.",
        ),
    ] = False,
    fast_checks: Annotated[
        bool,
        typer.Option(
            "--fast-checks", help="Leave out checks that are dear: those of AVIFs and of TIFFs' packed strips."
        ),
    ] = False,
) -> None:
    """Turn images into a dataset of WebDataset shards.

    The same command continues where it stopped. Every source file is accounted for.

    A picture may take 800 MiB to decode, as a PNG of 160 million pixels does; larger ones are rejected. JPEGs are
    decoded at a reduced scale: only progressive ones have a limit, of 130 million pixels.
    """
    from gan_dist.config.schema import RESOLUTIONS
    from gan_dist.data.prepare.account import TooManyRejects
    from gan_dist.data.prepare.prepare import prepare as prepare_dataset
    from gan_dist.utils.progress import progress

    if len(sources) < 2:
        raise UserError("expected SOURCE... OUT: one source or more, then the dataset's directory")
    if resolution not in RESOLUTIONS:
        trained = ", ".join(map(str, RESOLUTIONS))
        print(f"note: {resolution} pixels are for other programs; gan-dist trains on {trained}", file=sys.stderr)
    account = None
    try:
        with resumable(), progress(console) as show:
            account = prepare_dataset(
                sources[:-1],
                sources[-1],
                resolution=resolution,
                resample=resample,
                replacements=replacements,
                labels=labels,
                workers=workers,
                task=_task(task),
                dedupe=dedupe,
                max_reject_fraction=max_reject_fraction,
                shard_samples=shard_samples,
                min_side=min_side,
                keep_truncated=keep_truncated,
                full_decode=full_decode,
                fast_checks=fast_checks,
                show=show,
                log=partial(console.print, markup=False),
            )
    except TooManyRejects as error:
        account = error.account
        raise
    finally:
        print_lines(account.lines() if account else [])


def _task(text: str | None) -> tuple[int, int] | None:
    """Returns (i, n) of `--task i/n`."""
    if text is None:
        return None
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise UserError(f"--task: expected I/N with I from 0 to N-1 (0/3, 1/3, 2/3), found {text}")
    return int(part), int(parts)


def verify(dataset: Annotated[str, typer.Argument(help="A dataset that prepare wrote.")]) -> None:
    """Read a whole dataset again and report what is wrong."""
    from gan_dist.data.prepare.verify import verify as verify_dataset
    from gan_dist.utils.progress import progress

    with progress(console) as show:
        faults = verify_dataset(dataset, progress=partial(show, "verifying"))
    print_lines(map(str, faults))
    if faults:
        raise typer.Exit(EXIT_FAILED)
    console.print(f"{dataset}: sound", markup=False)
