"""`gan-dist bench`: this machine's figures beside its physical limits; gan_dist.bench measures them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from gan_dist.cli.common import print_table

bench = typer.Typer(help="Measure this machine, beside its physical limits.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _figures(figures: Mapping[str, Any], as_json: bool, indent: str = "") -> None:
    """Prints what a benchmark measured: a JSON object, or a line a figure."""
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            _figures(value, False, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            if len(value) > 1:  # the figures of a single row have been printed already
                print()
                _print_rows(value)
        else:
            print(f"{indent}{name:<24} {_short(value)}")


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the keys of `rows` whose values are numbers or single words, in columns."""
    keys = dict.fromkeys(key for row in rows for key in row)
    cells = {key: [_short(row.get(key, "")) for row in rows] for key in keys}
    kept = [
        key
        for key in keys
        if not any(isinstance(row.get(key), Mapping) for row in rows) and " " not in "".join(cells[key])
    ]
    print_table(kept, zip(*(cells[key] for key in kept), strict=True))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_short, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


@bench.command("prepare")
def bench_prepare(
    source: Annotated[str, typer.Argument(help="Images: a folder, a zip or a tar.")],
    resolution: Annotated[int, typer.Option(help="Side of the square images in pixels.")] = 64,
    workers: Annotated[int | None, typer.Option(help="Processes that decode. [default: one a CPU]")] = None,
    samples: Annotated[int, typer.Option(help="Images to measure with, spread over the source.")] = 1000,
    as_json: Json = False,
) -> None:
    """Images a second of preparation, and its costliest stages.

    Nothing is kept.
    """
    from gan_dist.bench.prepare import bench_prepare as measure

    _figures(measure(source, resolution=resolution, workers=workers, samples=samples), as_json)


@bench.command("loader")
def bench_loader(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset: a directory or an address.")],
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    window_shards: Annotated[int, typer.Option(help="Shards in a window of the windowed placement.")] = 4,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement; there are three.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch. [default: torch's choice]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache_dir: Annotated[str | None, typer.Option(help="Where a remote dataset is staged.")] = None,
    as_json: Json = False,
) -> None:
    """Images a second that reach the device in random order.

    By placement, beside memcpy and plain reads.
    """
    import torch

    from gan_dist.bench.loader import bench_loader as measure
    from gan_dist.data.dataset import open_dataset
    from gan_dist.distributed.world import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    with open_dataset(dataset, cache_dir) as opened:
        figures = measure(
            opened, batch=batch, window_shards=window_shards, seconds=seconds, device=choose_device(device, 0)
        )
    _figures(figures, as_json)


@bench.command("step")
def bench_step(
    batch: Annotated[list[int] | None, typer.Option(help="Global batch; repeat for more.")] = None,
    runner: Annotated[list[str] | None, typer.Option(help="A train.runner; repeat for more. [default: auto]")] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16, tf32, fp32 or fp64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 64,
    channels: Annotated[int, typer.Option(min=1, help="model.g_channels and model.d_channels.")] = 64,
    max_channels: Annotated[int | None, typer.Option(min=1, help="model.max_channels. [default: no cap]")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 5.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch. [default: torch's choice]")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure a range of batches.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="With train.deterministic's kernels.")] = False,
    as_json: Json = False,
) -> None:
    """Images a second of the whole update.

    Under torchrun, also how it scales over the ranks.
    """
    import torch

    from gan_dist.bench.step import SWEEP
    from gan_dist.bench.step import bench_step as measure
    from gan_dist.distributed.world import join
    from gan_dist.training.runner import resolve_precision
    from gan_dist.training.torch_settings import torch_settings

    batches = batch or (list(SWEEP) if sweep else [128])
    if threads is not None:
        torch.set_num_threads(threads)
    with join(device) as world, ExitStack() as settings:
        chosen, _ = resolve_precision(precision, world.device)
        settings.enter_context(torch_settings(world.device, deterministic, chosen))
        first = world.rank == 0
        figures = measure(
            world,
            batches=batches,
            runners=runner or ["auto"],
            precision=precision,
            resolution=resolution,
            channels=channels,
            max_channels=max_channels,
            seconds=seconds,
            log=(lambda line: print(line, file=sys.stderr)) if first else (lambda line: None),
        )
        if first:
            _figures(figures, as_json)
