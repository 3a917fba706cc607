"""The launcher's command line."""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gan_dist.runs.naming import choose_run_dir, runs_home
from gan_dist.utils.errors import GanDistError, UserError
from launch.options import ClusterOptions, load_cluster, split_overrides

app = typer.Typer(
    name="python -m launch",
    help="Train on a SLURM cluster. Run this from the checkout, on a login node.",
    epilog="Exit status: 0 done; 1 failed; 2 bad usage or options, or refused by SLURM; 75 stopped: run it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(help="A YAML file, for example configs/paintings64.yaml.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Keys to set; slurm.* and job.* override the cluster file."),
]
ClusterFile = Annotated[
    str | None,
    typer.Option("--cluster", metavar="FILE", help="The cluster's options, as in configs/clusters/slurm.yaml."),
]
Run = Annotated[str, typer.Argument(help="The directory or the name of a run.")]
Name = Annotated[str | None, typer.Option(help="The name of the run. [default: CONFIG's]")]
RunDir = Annotated[str | None, typer.Option(help="The directory of the run, instead of a name.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="End the whole run at this step.")]
FromRun = Annotated[
    str | None, typer.Option("--from", metavar="RUN[@STEP]", help="Start from another run's checkpoint.")
]
Tasks = Annotated[int, typer.Option(min=1, help="Number of elements of the job array.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the batch script without submitting it.")]
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Runs the command that the arguments name and exits with its status; an expected error is one line on stderr."""
    try:
        app()
    except GanDistError as error:
        print(f"launch: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)


def _options(cluster: str | None, words: list[str] | None) -> tuple[ClusterOptions, list[str]]:
    of_cluster, others = split_overrides(words or [])
    return load_cluster(cluster, of_cluster), others


def _find(run: str, cluster: str | None) -> Path:
    """Returns the directory of a run; the cluster file may say where runs known by name are."""
    from launch.status import find_run

    return find_run(run, load_cluster(cluster).job.runs if cluster else None)


@app.command()
def doctor(
    words: Words = None,
    cluster: ClusterFile = None,
    limit_minutes: Annotated[float, typer.Option(help="Cancel the job after this time, queueing included.")] = 30,
) -> None:
    """Check the nodes with a short job. It runs gan-dist doctor on each, then ten training steps on all."""
    from launch.doctor import run_trial
    from launch.submit import new_id

    options, rest = _options(cluster, words)
    if rest:
        raise UserError(f"expected slurm. and job. keys only, found {rest[0]}")
    home = runs_home(options.job.runs) / f".doctor-{new_id()}"  # hidden: it is no run
    for line in run_trial(home, options, 60 * limit_minutes):
        print(line, flush=True)


@app.command(context_settings=PASSED_ON)
def prepare(
    context: typer.Context,
    words: Annotated[
        list[str], typer.Argument(metavar="SOURCE... OUT [OPTIONS]", help="As for gan-dist prepare, with its options.")
    ],
    cluster: ClusterFile = None,
    tasks: Tasks = 8,
    dry_run: DryRun = False,
) -> None:
    """Prepare a dataset with a job array. Finished shards are kept when an element fails."""
    from gan_dist.utils.files import expand_directory
    from launch.submit import logs_beside, new_id, preparation, prepare_array, stage_batch

    options, given = _options(cluster, [*words, *context.args])
    plain = [number for number, word in enumerate(given) if not word.startswith("-")]
    if len(plain) < 2:
        raise UserError("expected SOURCE... OUT: one source or more, then the dataset's directory, then options")
    # Sources and OUT come first; everything from the first option on belongs to the options.
    end = next((number for number, word in enumerate(given) if word.startswith("-")), len(given))
    if end < 2:
        raise UserError("expected SOURCE... OUT before the options of gan-dist prepare")
    out, rest = expand_directory(given[end - 1]), given[end:]
    if dry_run:
        beside, stage = logs_beside(out), preparation([*given[: end - 1], *rest], out, tasks)
        print(stage_batch(beside, beside / "launch" / new_id(), stage, options), end="")
        return
    home, made = prepare_array([*given[: end - 1], *rest], out, tasks, options)
    print(f"job {made.job}: {tasks} element(s) into {out}\n  python -m launch status {shlex.quote(str(home))}")


@app.command()
def submit(
    config: Config,
    words: Words = None,
    cluster: ClusterFile = None,
    name: Name = None,
    run_dir: RunDir = None,
    max_steps: MaxSteps = None,
    from_run: FromRun = None,
    dry_run: DryRun = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="LIST", help="A run for each seed (0-4, or 3,7), as one job array.")
    ] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Queue it even if the dataset is not seen from here, or the like.")
    ] = False,
) -> None:
    """Submit a training job that starts or continues a run.

    The job runs a snapshot of code and configuration with the Python of this environment. It saves before its time
    limit and is requeued until the run is done. Dataset, interpreter, shape and disk are checked before it is queued.
    """
    from launch.checks import check_all
    from launch.snapshot import CHECKOUT, code_of
    from launch.submit import check_config, new_id, resolve_parent, submit_training, training_batch
    from launch.submit import unchecked as check_nothing

    options, overrides = _options(cluster, words)
    run = choose_run_dir(config, name, run_dir, options.job.runs)
    check = check_nothing if unchecked else check_all
    if seeds is not None:
        from launch.seeds import check_seeds, read_seeds, seed_batch, submit_seeds

        numbers = read_seeds(seeds)
        if dry_run:
            check_seeds(config, overrides, options, run, numbers)
            resolve_parent(from_run, options)
            print(seed_batch(run, new_id(), numbers, options), end="")
            return
        for of_seed, made in submit_seeds(config, overrides, options, run, numbers, max_steps, from_run, check):
            print(f"job {made.job}: run {of_seed}")
        return
    if dry_run:
        check_config(config, overrides, options, run)
        resolve_parent(from_run, options)
        code_of(CHECKOUT, [run, runs_home(options.job.runs)], options.job.unpack)
        print(training_batch(run, run / "launch" / new_id(), options, run.name), end="")
        return
    made = submit_training(config, overrides, options, run, max_steps=max_steps, from_run=from_run, check=check)
    print(f"job {made.job}: {made.ranks} rank(s), code {made.commit or 'without a commit'}, run {run}")
    print(f"  python -m launch status {shlex.quote(str(run))}")
    print(f"  python -m launch logs -f {shlex.quote(str(run))}")


@app.command()
def pipeline(
    config: Config,
    words: Words = None,
    source: Annotated[list[str], typer.Option(help="A source to prepare; may be repeated.")] = [],  # noqa: B006
    preparing: Annotated[
        str, typer.Option("--prepare", metavar="OPTIONS", help="Options of gan-dist prepare, in quotes.")
    ] = "",
    cluster: ClusterFile = None,
    tasks: Tasks = 8,
    name: Name = None,
    run_dir: RunDir = None,
    max_steps: MaxSteps = None,
    dry_run: DryRun = False,
) -> None:
    """Submit prepare, train and report as three jobs. Each waits for the success of the one before."""
    from launch.checks import check_cluster
    from launch.submit import pipeline_scripts, submit_pipeline

    if not source:
        raise UserError("--source: expected one source or more, found none")
    options, overrides = _options(cluster, words)
    run = choose_run_dir(config, name, run_dir, options.job.runs)
    try:
        prepare_words = [*source, *shlex.split(preparing)]
    except ValueError as error:
        raise UserError(f"--prepare: expected options as for a shell, found {preparing!r}: {error}") from None
    if dry_run:
        print("\n".join(pipeline_scripts(config, overrides, prepare_words, tasks, options, run)), end="")
        return
    made_of = (config, overrides, prepare_words, tasks, options, run)
    for made in submit_pipeline(*made_of, max_steps=max_steps, check=check_cluster):
        print(f"job {made.job}: {made.kind}" + (f", after {made.after}" if made.after else ""))
    print(f"  python -m launch status {shlex.quote(str(run))}")


@app.command()
def local(
    config: Config,
    words: Words = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks. [default: one per GPU, or one]")] = None,
    name: Name = None,
    run_dir: RunDir = None,
    max_steps: MaxSteps = None,
    from_run: FromRun = None,
) -> None:
    """Train on this machine with torchrun. Uses all GPUs unless --ranks says otherwise."""
    from gan_dist.config.schema import load_config
    from launch.job.torchrun import train_here
    from launch.submit import resolve_parent

    options, overrides = _options(None, words)
    if unused := [word for word in words or [] if word not in overrides and not word.startswith("job.runs=")]:
        print(f"note: {unused[0]} is for jobs and has no effect here; use --ranks", file=sys.stderr)
    run = choose_run_dir(config, name, run_dir, options.job.runs)
    load_config(config, overrides)  # so that an error in it is printed once, not by each rank
    parent = resolve_parent(from_run, options)
    more = [*(["--max-steps", str(max_steps)] if max_steps else []), *(["--from", parent] if parent else [])]
    raise typer.Exit(train_here(config, overrides, run, ranks, more))


@app.command()
def sweep(
    config: Config,
    space: Annotated[str, typer.Argument(help="A YAML file: the keys to search, and where; see docs/sweep.md.")],
    words: Words = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials in all.")] = 40,
    parallel: Annotated[int, typer.Option(min=1, help="Trials that this command runs at once.")] = 1,
    cluster: ClusterFile = None,
    name: Name = None,
    run_dir: RunDir = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of each trial on this machine.")] = 1,
    pruner: Annotated[str, typer.Option(help="median, hyperband or none: how soon a bad trial is ended.")] = "median",
    seed: Annotated[int, typer.Option(help="The seed of the search.")] = 0,
) -> None:
    """Search configurations. Each trial is a run; TPE chooses it, and it is ended early if it falls behind.

    Trials run on this machine; with --cluster, or any slurm.KEY, each is a job. The same command continues a sweep that
    was stopped or killed, and joins one that runs elsewhere.
    """
    from gan_dist.cli.common import listen_for_signals
    from gan_dist.config.base import check_seed
    from gan_dist.config.schema import load_config
    from gan_dist.runs.study import BEST, read_sweep
    from gan_dist.utils.errors import EXIT_FAILED, EXIT_STOPPED
    from gan_dist.utils.stop import StopRequest
    from launch.checks import check_all, check_fit, find_manifest
    from launch.space import read_space
    from launch.status import trial_lines
    from launch.stopping import STOP
    from launch.sweep import Worker
    from launch.trials import Here, Jobs, Place

    options, overrides = _options(cluster, words)
    check_seed(seed)
    as_jobs = cluster is not None or any(word.startswith("slurm.") for word in words or [])
    name = name if name or run_dir else f"{Path(config).stem}-{Path(space).stem}"
    folder = choose_run_dir(config, name, run_dir, options.job.runs)
    base = load_config(config, overrides)
    manifest = functools.cache(lambda: find_manifest(base))
    ranks_each = options.slurm.ranks if as_jobs else ranks
    searched = read_space(space, base, overrides, ranks_each, lambda settings: check_fit(settings, manifest()))
    place: Place = Jobs(options, check_all) if as_jobs else Here(parallel, ranks)
    stop = StopRequest()
    listen_for_signals(stop)
    worker = Worker(
        folder,
        searched,
        place,
        trials=trials,
        parallel=parallel,
        seed=seed,
        pruner=pruner,
        dataset=found.identity if (found := manifest()) else "",
        log=_say,
    )
    print(f"sweep {folder}: {trials} trials over {', '.join(each.key for each in searched)}", flush=True)
    ended = worker.work(stop)
    made = read_sweep(folder)
    print("\n".join(trial_lines(made)))
    if not ended:
        go_on = as_jobs and not (folder / STOP).exists()
        on = f"; its jobs go on: python -m launch stop {shlex.quote(str(folder))} ends them" if go_on else ""
        print(f"stopped; the same command continues{on}", flush=True)
        raise typer.Exit(EXIT_STOPPED)
    print(f"  gan-dist report {shlex.quote(str(folder))}")
    if made.best is None:
        raise typer.Exit(EXIT_FAILED)
    print(f"  gan-dist train {shlex.quote(str(folder / BEST))} --name NAME")


def _say(line: str) -> None:
    print(line, flush=True)


@app.command(name="status")
def status_command(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs to show. [default: all]")] = None,
    cluster: ClusterFile = None,
) -> None:
    """Show the state of runs. Queue, step, images per second, time left, restarts, and why the last start ended."""
    from launch.status import all_runs, look, status_lines

    chosen = [_find(run, cluster) for run in runs or []] or all_runs(load_cluster(cluster).job.runs)
    queue = look(chosen)
    for run in chosen:
        print("\n".join(status_lines(run, queue)))


@app.command(name="ls")
def list_command(
    cluster: ClusterFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List all runs with state, step, images per second, best distance, node, and why a run waits or ended."""
    import json
    from dataclasses import asdict

    from launch import listing

    rows = listing.list_runs(load_cluster(cluster).job.runs)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(listing.table_lines(rows)))


@app.command()
def logs(
    run: Run,
    cluster: ClusterFile = None,
    rank: Annotated[str, typer.Option(help="A rank, or batch for the batch script.")] = "0",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines as they come, until Ctrl-C.")] = False,
) -> None:
    """Print the latest log of a rank."""
    from launch import status
    from launch.submit import submissions

    if rank != "batch" and not rank.isdigit():
        raise UserError(f"--rank: expected a number, or batch, found {rank!r}")
    directory = _find(run, cluster)
    files = status.rank_logs(directory, rank)
    if not files and (not follow or not submissions(directory)):
        raise UserError(status.why_no_log(directory, rank))
    if follow:
        try:
            for text in status.follow(directory, rank):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            return
    print(f"==> {files[-1].name}\n{files[-1].read_text(errors='replace')}", end="")


@app.command()
def tensorboard(
    runs: Annotated[str, typer.Argument(help="A directory of runs, or one run.")],
    words: Words = None,
    port: Annotated[int | None, typer.Option(help="A port of the loopback address. [default: a free one]")] = None,
    cluster: ClusterFile = None,
) -> None:
    """Start TensorBoard and print how to reach it. Runs here, or with --cluster as a small CPU job."""
    from gan_dist.utils.files import expand
    from launch.tensorboard import serve, submit_tensorboard

    directory = expand(runs)
    if not directory.is_dir():
        raise UserError(f"no directory {directory}; expected a directory of runs, or one run")
    options, rest = _options(cluster, words)
    if rest or (words and cluster is None):
        raise UserError(f"expected slurm. and job. keys, with --cluster, found {(rest or words or [])[0]}")
    if cluster is None:
        raise typer.Exit(serve(directory, port))
    for line in submit_tensorboard(directory, options, {word.partition("=")[0] for word in words or []}, port):
        print(line, flush=True)


@app.command()
def stop(run: Run, cluster: ClusterFile = None) -> None:
    """Ask a run or a sweep to save and end. It is not requeued; jobs that wait or do not train are cancelled."""
    from launch import stopping

    print("\n".join(stopping.stop(_find(run, cluster))))


@app.command()
def cancel(run: Run, cluster: ClusterFile = None) -> None:
    """Cancel the jobs of a run or a sweep. They save if the cluster's KillWait is long enough, and are not requeued."""
    from launch import stopping

    for line in stopping.cancel(_find(run, cluster)):
        print(line)


if __name__ == "__main__":
    main()
