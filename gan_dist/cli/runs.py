"""`gan-dist demo`, `train`, `sample` and `report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gan_dist.cli.common import console, listen_for_signals, print_lines
from gan_dist.utils.errors import EXIT_STOPPED
from gan_dist.utils.stop import StopRequest


def demo(
    directory: Annotated[Path, typer.Option("--out", help="The directory for everything.")] = Path("gan-dist-demo"),
) -> None:
    """Try it all on painted pictures in about a minute.

    Paints a small set, prepares it, trains on it on this machine, and shows where the results are.
    """
    from gan_dist.cli.demo import run_demo

    stop = StopRequest()
    listen_for_signals(stop)
    outcome, lines = run_demo(directory, stop, console.print)
    _print_closing_lines(outcome.run_dir)
    print_lines(lines)
    if outcome.stopped:
        raise typer.Exit(EXIT_STOPPED)


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, for example configs/paintings64.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Configuration keys to set.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name under $GAN_DIST_RUNS. [default: CONFIG's]")] = None,
    run_dir: Annotated[str | None, typer.Option(help="The run's directory, instead of a name.")] = None,
    from_run: Annotated[
        str | None, typer.Option("--from", metavar="RUN[@STEP]", help="Start a new run from another's checkpoint.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End the run with a checkpoint at this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every figure that is logged.")] = False,
) -> None:
    """Train a run, or continue it where it stopped.

    The same command continues the run and never starts it anew.

    Under torchrun each process joins the world: torchrun --nproc-per-node 4 -m gan_dist train CONFIG.
    """
    stop = StopRequest()
    listen_for_signals(stop)
    words = ["gan-dist", "train", config, *(overrides or [])]
    from gan_dist.config.schema import load_config, to_yaml
    from gan_dist.data.shards import read_manifest
    from gan_dist.runs.naming import choose_run_dir
    from gan_dist.utils.files import is_address

    # Torch takes seconds to load: mistakes in the configuration and a missing dataset are reported before.
    settings = load_config(config, overrides or [])
    if dry_run:
        console.print(to_yaml(settings), end="", markup=False)
        return
    if "RANK" not in os.environ and not is_address(settings.data.shards):
        read_manifest(settings.data.shards)
    directory = choose_run_dir(config, name, run_dir)
    from gan_dist.training.trainer import train_in

    outcome = train_in(
        directory,
        settings,
        from_run=from_run,
        max_steps=max_steps,
        stop=stop,
        verbosity=int(verbose) - int(quiet),
        command=words,
    )
    if int(os.environ.get("RANK") or 0) == 0 and not quiet:
        _print_closing_lines(outcome.run_dir)
    if outcome.stopped:
        raise typer.Exit(EXIT_STOPPED)


def sample(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or a file of generator weights.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint to draw from. [default: the newest]")] = None,
    count: Annotated[int, typer.Option(help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="The seed of the latents.")] = 0,
    image: Annotated[Path, typer.Option("--out", help="The grid to write.")] = Path("grid.png"),
    class_name: Annotated[str | None, typer.Option("--class", metavar="NAME", help="Images of this class.")] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="A row of images for each of these classes.")
    ] = None,
    strength: Annotated[
        float,
        typer.Option(metavar="W", help="How much of its class: 1 as learned, more exaggerates it, 0 is no class."),
    ] = 1.0,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Each row goes from one latent to another, or through --classes.")
    ] = False,
    walk: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a film, .mp4 or .gif, of the grid on a closed walk.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long the walk takes.")] = 8.0,
    fps: Annotated[int, typer.Option(help="The walk's frames a second.")] = 25,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side of each image, a multiple of the generator's. [default: these]")
    ] = None,
    truncation: Annotated[
        float, typer.Option(metavar="PSI", help="Scale latents by this, up to 1: less variety, more usual images.")
    ] = 1.0,
    standing_statistics: Annotated[
        bool, typer.Option("--standing-statistics", help="First measure batch norm's statistics on these weights.")
    ] = False,
    individual: Annotated[Path | None, typer.Option(help="Also write each image into this directory.")] = None,
    export: Annotated[Path | None, typer.Option(help="Also write the generator, with a card, as .safetensors.")] = None,
    animation: Annotated[Path | None, typer.Option(help="Also write the run's grids as a GIF.")] = None,
    neighbours: Annotated[Path | None, typer.Option(help="Also show each image beside its nearest real one.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The real images of --neighbours. [default: the run's]")] = None,
) -> None:
    """Draw images from a run's or another program's generator."""
    from gan_dist.sampling.sample import sample_run
    from gan_dist.utils.progress import progress

    with progress() as shown:
        lines = sample_run(
            run,
            step=step,
            count=count,
            seed=seed,
            out=image,
            class_name=class_name,
            classes=classes,
            strength=strength,
            interpolate=interpolate,
            walk=walk,
            seconds=seconds,
            fps=fps,
            size=size,
            truncation=truncation,
            standing_statistics=standing_statistics,
            individual=individual,
            export=export,
            animation=animation,
            neighbours=neighbours,
            dataset=dataset,
            progress=shown,
        )
    print_lines(lines)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One run, several side by side, or a sweep.")],
    page: Annotated[
        Path | None, typer.Option("--out", help="The page. [default: RUN/report.html; several: report.html]")
    ] = None,
) -> None:
    """Write one self-contained page on a run, or several.

    Samples, curves, evaluations, dataset, configuration and history; it needs no network.
    """
    from gan_dist.config.schema import presets
    from gan_dist.report.report import make_report
    from gan_dist.report.sweep import make_sweep_report
    from gan_dist.runs.naming import run_path
    from gan_dist.runs.study import is_sweep
    from gan_dist.utils.errors import UserError

    paths = [run_path(run) for run in runs]
    if len(paths) == 1 and is_sweep(paths[0]):
        console.print(str(make_sweep_report(paths[0], page)), markup=False)
        return
    if sweeps := [run for run, path in zip(runs, paths, strict=True) if is_sweep(path)]:
        raise UserError(f"{sweeps[0]} is a sweep, which has a page of its own: gan-dist report {sweeps[0]}")
    console.print(str(make_report(paths, page, presets())), markup=False)


def _print_closing_lines(run_dir: Path) -> None:
    """Prints what was done, where things are and what to do next."""
    from gan_dist.report.history import closing_lines
    from gan_dist.runs.record import read_run

    print_lines(closing_lines(read_run(run_dir)))
