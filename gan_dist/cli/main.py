"""The command line. The only module that parses arguments, installs signal handlers, prints results and exits."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gan_dist.cli.bench import bench
from gan_dist.cli.evaluate import evaluate
from gan_dist.utils.errors import EXIT_FAILED, EXIT_STOPPED, GanDistError, UserError
from gan_dist.utils.stop import StopRequest

app = typer.Typer(
    name="gan-dist",
    help="Paintings in, generated paintings out: one synchronised DCGAN game on any number of ranks.",
    epilog="Exit status: 0 done; 1 failed; 2 bad usage, config or input; 75 stopped with a checkpoint: run it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.add_typer(bench, name="bench")
app.command()(evaluate)


@app.callback()
def _gan_dist() -> None:
    """Makes `gan-dist COMMAND` the shape of every call, however many commands there are."""


out = Console(highlight=False, soft_wrap=True, emoji=False)


def main() -> None:
    """Runs the command that the arguments name and exits with its status; a user's mistake is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may be "Naïve Art" where a terminal knows ASCII
    threading.excepthook = _quiet_about_disks(threading.excepthook)
    try:
        app()
    except GanDistError as error:
        if not error.reported_elsewhere:
            _complain(str(error))
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_about_disks(otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a hook for exceptions in threads that leaves out OSErrors: our own threads hand theirs over.

    The one that does not is TensorBoard's writer, which telemetry tells of in one line when it stops.
    """

    def hook(told: Any) -> None:
        if not issubclass(told.exc_type, OSError):
            otherwise(told)

    return hook


def _complain(line: str) -> None:
    print(f"gan-dist: {line}", file=sys.stderr, flush=True)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        out.print(line, markup=False)


def listen_for_signals(stop: StopRequest) -> None:
    """Turns Ctrl-C, SIGTERM and SIGUSR2 into a wish to stop; a second Ctrl-C ends at once."""

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop:
            raise SystemExit(128 + number)
        stop.ask(signal.Signals(number).name)

    for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends work that can be continued on Ctrl-C, SIGTERM or SIGUSR2, with one line and status 75; on a second Ctrl-C at
    once."""

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        raise KeyboardInterrupt(signal.Signals(number).name)

    for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    try:
        yield
    except KeyboardInterrupt as stopped:
        _complain(f"stopped by {stopped}; what is finished is kept: run the same command again to continue")
        raise typer.Exit(EXIT_STOPPED) from None


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("gan-dist-demo"),
) -> None:
    """Paint a small set, prepare it and train on it, on this machine, in about a minute; then show where to look."""
    from gan_dist.cli.demo import run_demo

    stop = StopRequest()
    listen_for_signals(stop)
    outcome, lines = run_demo(directory, stop, out.print)
    _tell(outcome.run_dir)
    _print(lines)
    if outcome.stopped:
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE... OUT", help="Folders, zips, tars or WebDataset shards; last, the dataset."),
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
        int | None, typer.Option(help="Processes that read and decode; more help on a slow disk. [default: one a CPU]")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts (a SLURM array).")] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Keep one of files with the same bytes.")] = False,
    max_reject_fraction: Annotated[float, typer.Option(help="Fail when more than this share is rejected.")] = 0.05,
    shard_samples: Annotated[int, typer.Option(help="Samples in a shard.")] = 4096,
    min_side: Annotated[int, typer.Option(help="Reject images whose short side is below this.")] = 1,
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Keep what can be decoded of cut-off files, flagged.")
    ] = False,
    full_decode: Annotated[
        bool, typer.Option("--full-decode", help="No scaled JPEG decoding: slower; exact with bilinear.")
    ] = False,
) -> None:
    """Turn images into a dataset of WebDataset shards, once. Run it again to continue; every file is accounted for.

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
        with _interruptible(), progress(out) as show:
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
                progress=partial(show, "preparing"),
            )
    except TooManyRejects as error:
        account = error.account
        raise
    finally:
        _print(account.lines() if account else [])


def _task(text: str | None) -> tuple[int, int] | None:
    """Returns (i, n) of `--task i/n`."""
    if text is None:
        return None
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise UserError(f"--task: expected I/N with I from 0 to N-1 (0/3, 1/3, 2/3), found {text}")
    return int(part), int(parts)


@app.command()
def verify(dataset: Annotated[str, typer.Argument(help="A dataset that prepare wrote.")]) -> None:
    """Re-read a whole dataset and name what is wrong with it."""
    from gan_dist.data.prepare.verify import verify as verify_dataset
    from gan_dist.utils.progress import progress

    with progress(out) as show:
        faults = verify_dataset(dataset, progress=partial(show, "verifying"))
    _print(map(str, faults))
    if faults:
        raise typer.Exit(EXIT_FAILED)
    out.print(f"{dataset}: sound", markup=False)


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or a file of generator weights.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint to draw from. [default: the newest]")] = None,
    count: Annotated[int, typer.Option(help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="Keys the latents.")] = 0,
    image: Annotated[Path, typer.Option("--out", help="The grid to write.")] = Path("grid.png"),
    interpolate: Annotated[bool, typer.Option("--interpolate", help="Rows that walk between two latents.")] = False,
    individual: Annotated[Path | None, typer.Option(help="Also write each image into this directory.")] = None,
    export: Annotated[Path | None, typer.Option(help="Also write the generator, with a card, as .safetensors.")] = None,
    animation: Annotated[Path | None, typer.Option(help="Also write the run's grids as a GIF.")] = None,
    neighbours: Annotated[Path | None, typer.Option(help="Also show each image beside its nearest real one.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Where --neighbours looks. [default: the run's]")] = None,
) -> None:
    """Draw images from a run's generator, or from another program's."""
    from gan_dist.sampling.sample import sample_run

    lines = sample_run(
        run,
        step=step,
        count=count,
        seed=seed,
        out=image,
        interpolate=interpolate,
        individual=individual,
        export=export,
        animation=animation,
        neighbours=neighbours,
        dataset=dataset,
    )
    _print(lines)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One run, or several side by side.")],
    page: Annotated[
        Path | None, typer.Option("--out", help="The page. [default: RUN/report.html; several: report.html]")
    ] = None,
) -> None:
    """Make one self-contained page of a run: pictures, curves, data, configuration, history."""
    from gan_dist.config.schema import presets
    from gan_dist.report.report import make_report
    from gan_dist.runs.naming import run_path

    out.print(str(make_report([run_path(run) for run in runs], page, presets())), markup=False)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Say what this machine and environment can do, and what is wrong with them."""
    from gan_dist.doctor import diagnose, healthy

    findings = diagnose()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(f"{f.state:<8} {f.topic:<9} {f.found}" + (f"; {f.advice}" if f.advice else "") for f in findings)
    if not healthy(findings):
        raise typer.Exit(EXIT_FAILED)


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Keys to set.")]


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, for example configs/paintings64.yaml.")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="The run's name under $GAN_DIST_RUNS. [default: CONFIG's]")] = None,
    run_dir: Annotated[str | None, typer.Option(help="The run's directory, instead of a name.")] = None,
    from_run: Annotated[
        str | None, typer.Option("--from", metavar="RUN[@STEP]", help="Start a new run from another's checkpoint.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End the whole run at this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every figure that is logged.")] = False,
) -> None:
    """Train a run, or continue it: the same command again goes on where it stopped.

    Under torchrun each process joins the world: torchrun --nproc-per-node 4 -m gan_dist train CONFIG.
    """
    stop = StopRequest()
    listen_for_signals(stop)
    words = ["gan-dist", "train", config, *(overrides or [])]
    from gan_dist.config.schema import load_config, to_yaml
    from gan_dist.data.shards import read_manifest
    from gan_dist.utils.files import is_address

    settings = load_config(config, overrides or [])  # a slip in it is told before torch has loaded
    if dry_run:
        out.print(to_yaml(settings), end="", markup=False)
        return
    if "RANK" not in os.environ and not is_address(settings.data.shards):
        read_manifest(settings.data.shards)  # so is a dataset that is not there
    from gan_dist.training.trainer import train as train_run

    outcome = train_run(
        config,
        overrides or [],
        name=name,
        run_dir=run_dir,
        from_run=from_run,
        max_steps=max_steps,
        stop=stop,
        verbosity=int(verbose) - int(quiet),
        command=words,
    )
    if int(os.environ.get("RANK") or 0) == 0 and not quiet:
        _tell(outcome.run_dir)
    if outcome.stopped:
        raise typer.Exit(EXIT_STOPPED)


def _tell(run_dir: Path) -> None:
    """Prints what a training command did, where things are and what to do next."""
    from gan_dist.report.history import closing_lines
    from gan_dist.runs.record import read_run

    _print(closing_lines(read_run(run_dir)))


if __name__ == "__main__":
    main()
