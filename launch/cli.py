"""The launcher's command line."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gan_dist.runs.naming import choose_run_dir, runs_home
from gan_dist.utils.errors import GanDistError, UserError
from launch.options import ClusterOptions, load_cluster, split_overrides

app = typer.Typer(
    name="python -m launch",
    help="Training on a SLURM cluster: submit, watch, stop. Run it from the checkout, on a login node.",
    epilog="Exit status: 0 done; 1 failed; 2 bad usage, options or a refusal of SLURM's; 75 stopped: run it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(help="A YAML file, for example configs/paintings64.yaml.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Keys to set: slurm. and job. for the cluster."),
]
ClusterFile = Annotated[
    str | None, typer.Option("--cluster", metavar="FILE", help="The cluster's options: configs/clusters/*.yaml.")
]
Run = Annotated[str, typer.Argument(help="A run's directory, or its name where runs lie.")]
Name = Annotated[str | None, typer.Option(help="The run's name. [default: CONFIG's]")]
RunDir = Annotated[str | None, typer.Option(help="The run's directory, instead of a name.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="End the whole run at this step.")]
FromRun = Annotated[str | None, typer.Option("--from", metavar="RUN[@STEP]", help="Start from another's checkpoint.")]


def main() -> None:
    """Runs the command that the arguments name and exits with its status; a user's mistake is one line on stderr."""
    try:
        app()
    except GanDistError as error:
        print(f"launch: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)


def _options(cluster: str | None, words: list[str] | None) -> tuple[ClusterOptions, list[str]]:
    ours, theirs = split_overrides(words or [])
    return load_cluster(cluster, ours), theirs


@app.command()
def submit(
    config: Config,
    words: Words = None,
    cluster: ClusterFile = None,
    name: Name = None,
    run_dir: RunDir = None,
    max_steps: MaxSteps = None,
    from_run: FromRun = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
) -> None:
    """Queue a training job, or queue the continuation of a run that has ended.

    The job runs a snapshot of code and configuration with this environment's Python, saves before its time is over,
    and is requeued until the run is done.
    """
    from launch.snapshot import CHECKOUT, code_of
    from launch.submit import check_config, new_id, resolve_parent, submit_training, training_batch

    options, overrides = _options(cluster, words)
    run = choose_run_dir(config, name, run_dir, options.job.runs)
    if dry_run:
        check_config(config, overrides, options, run)
        resolve_parent(from_run, options)
        code_of(CHECKOUT, [run, runs_home(options.job.runs)])
        print(training_batch(run, run / "launch" / new_id(), options, run.name), end="")
        return
    made = submit_training(config, overrides, options, run, max_steps=max_steps, from_run=from_run)
    print(f"job {made.job}: {made.ranks} rank(s), code {made.commit or 'without a commit'}, run {run}")
    print(f"  python -m launch status {shlex.quote(str(run))}")
    print(f"  python -m launch logs -f {shlex.quote(str(run))}")


def _find(run: str, cluster: str | None) -> Path:
    """Returns a run's directory; names are looked up where the cluster file says that runs lie."""
    from launch.status import find_run

    return find_run(run, load_cluster(cluster).job.runs if cluster else None)


@app.command(name="status")
def status_command(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs. [default: all]")] = None,
    cluster: ClusterFile = None,
) -> None:
    """Say where runs stand: queue, step, images a second, time left, restarts, and why the last one ended."""
    from launch.status import all_runs, status_lines

    found = [_find(run, cluster) for run in runs or []]
    for run in found or all_runs(load_cluster(cluster).job.runs):
        print("\n".join(status_lines(run)))


@app.command()
def logs(
    run: Run,
    cluster: ClusterFile = None,
    rank: Annotated[str, typer.Option(help="Which rank's, or batch for the batch script's.")] = "0",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is written; Ctrl-C ends it.")] = False,
) -> None:
    """Print the newest log of a rank."""
    from launch import status
    from launch.submit import submissions

    if rank != "batch" and not rank.isdigit():
        raise UserError(f"--rank: expected a number, or batch, found {rank!r}")
    where = _find(run, cluster)
    found = status.logs_of(where, rank)
    if not found and (not follow or not submissions(where)):
        raise UserError(status.no_log(where, rank))
    if follow:
        try:
            for text in status.follow(where, rank):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            return
    print(f"==> {found[-1].name}\n{found[-1].read_text(errors='replace')}", end="")


@app.command()
def stop(run: Run, cluster: ClusterFile = None) -> None:
    """Ask a run to save and end, without being requeued. What still waits, or does not train, is cancelled."""
    from launch import slurm
    from launch.submit import submissions

    where = _find(run, cluster)
    kinds = {each.job: each.kind for each in submissions(where)}
    deadline = time.monotonic() + 40
    while queued := slurm.queue(list(kinds)):
        if time.monotonic() > deadline or all(line.state != "COMPLETING" for line in queued):
            break
        time.sleep(1)  # between two starts: in a moment it waits in the queue again, or is gone
    if not queued:
        raise UserError(f"{where} has no job in the queue; nothing to stop")
    states = {line.job.partition("_")[0]: line.state for line in queued}
    for job in sorted(states, key=int, reverse=True):  # what waits for another goes first, or SLURM cancels it itself
        if kinds[job] != "train":  # nobody there reads a stop file
            slurm.run("scancel", job)
            print(f"job {job} ({kinds[job]}) is cancelled; what it has finished is kept")
        elif states[job] == "PENDING":
            slurm.run("scancel", "--state=PENDING", job)
            print(f"job {job} was waiting; it is cancelled, the run is as its last checkpoint left it")
        else:
            (where / "stop").touch()
            print(f"job {job} is asked to save and end; see: python -m launch status {shlex.quote(str(where))}")


@app.command()
def cancel(run: Run, cluster: ClusterFile = None) -> None:
    """Cancel a run's jobs: they save if that takes less than the cluster's KillWait, and are not requeued."""
    from launch import slurm
    from launch.submit import submissions

    where = _find(run, cluster)
    queued = slurm.queue([each.job for each in submissions(where)])
    if not queued:
        raise UserError(f"{where} has no job in the queue; nothing to cancel")
    for job in sorted({line.job.partition("_")[0] for line in queued}):
        slurm.run("scancel", job)
        print(f"job {job} is cancelled")


@app.command()
def local(
    config: Config,
    words: Words = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a GPU, or one]")] = None,
    name: Name = None,
    run_dir: RunDir = None,
    max_steps: MaxSteps = None,
    from_run: FromRun = None,
) -> None:
    """Train on this machine through torchrun: all its GPUs, or as many ranks as you say."""
    from gan_dist.config.schema import load_config
    from launch.job.torchrun import train_here
    from launch.submit import resolve_parent

    options, overrides = _options(None, words)
    if unused := [word for word in words or [] if word not in overrides and not word.startswith("job.runs=")]:
        print(f"note: {unused[0]} is for jobs and changes nothing here; --ranks says how many", file=sys.stderr)
    run = choose_run_dir(config, name, run_dir, options.job.runs)
    load_config(config, overrides)  # a slip in it is told once, not by every rank
    parent = resolve_parent(from_run, options)
    more = [*(["--max-steps", str(max_steps)] if max_steps else []), *(["--from", parent] if parent else [])]
    raise typer.Exit(train_here(config, overrides, run, ranks, more))


Tasks = Annotated[int, typer.Option(min=1, help="Elements of the job array that prepares.")]
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=PASSED_ON)
def prepare(
    context: typer.Context,
    words: Annotated[
        list[str], typer.Argument(metavar="SOURCE... OUT [OPTIONS]", help="As for gan-dist prepare, options too.")
    ],
    cluster: ClusterFile = None,
    tasks: Tasks = 8,
) -> None:
    """Prepare a dataset as a job array; finished shards are kept whatever happens to an element."""
    from gan_dist.utils.files import expand_directory
    from launch.submit import prepare_array

    options, given = _options(cluster, [*words, *context.args])
    plain = [number for number, word in enumerate(given) if not word.startswith("-")]
    if len(plain) < 2:
        raise UserError("expected SOURCE... OUT: one source or more, then the dataset's directory, then options")
    # Sources and OUT come first; what follows the first option is the options'.
    end = next((number for number, word in enumerate(given) if word.startswith("-")), len(given))
    if end < 2:
        raise UserError("expected SOURCE... OUT before the options of gan-dist prepare")
    out, rest = expand_directory(given[end - 1]), given[end:]
    beside, made = prepare_array([*given[: end - 1], *rest], out, tasks, options)
    print(f"job {made.job}: {tasks} element(s) into {out}\n  python -m launch status {shlex.quote(str(beside))}")


@app.command()
def pipeline(
    config: Config,
    words: Words = None,
    source: Annotated[list[str], typer.Option(help="What to prepare; may be given several times.")] = [],  # noqa: B006
    preparing: Annotated[
        str, typer.Option("--prepare", metavar="OPTIONS", help="gan-dist prepare's options, as one word.")
    ] = "",
    cluster: ClusterFile = None,
    tasks: Tasks = 8,
    name: Name = None,
    run_dir: RunDir = None,
    max_steps: MaxSteps = None,
) -> None:
    """Prepare, then train, then sample and report: three jobs, each waiting for the one before to end well."""
    from launch.submit import submit_pipeline

    if not source:
        raise UserError("--source: expected one source or more; what shall be prepared?")
    options, overrides = _options(cluster, words)
    run = choose_run_dir(config, name, run_dir, options.job.runs)
    try:
        told = [*source, *shlex.split(preparing)]
    except ValueError as error:
        raise UserError(f"--prepare: expected options as for a shell, found {preparing!r}: {error}") from None
    for made in submit_pipeline(config, overrides, told, tasks, options, run, max_steps=max_steps):
        print(f"job {made.job}: {made.kind}" + (f", after {made.after}" if made.after else ""))
    print(f"  python -m launch status {shlex.quote(str(run))}")


@app.command()
def tensorboard(
    runs: Annotated[str, typer.Argument(help="A directory of runs, or one run.")],
    words: Words = None,
    port: Annotated[int | None, typer.Option(help="Port on the loopback address. [default: a free one]")] = None,
    cluster: ClusterFile = None,
) -> None:
    """Start TensorBoard here, or with --cluster as a small CPU job, and print the way to it from your laptop."""
    from gan_dist.utils.files import expand
    from launch.tensorboard import serve, submit_tensorboard

    where = expand(runs)
    if not where.is_dir():
        raise UserError(f"no directory {where}; expected where runs lie, or one run")
    options, rest = _options(cluster, words)
    if rest or (words and cluster is None):
        raise UserError(f"expected slurm. and job. keys, with --cluster, found {(rest or words or [])[0]}")
    if cluster is None:
        raise typer.Exit(serve(where, port))
    for line in submit_tensorboard(where, options, {word.partition("=")[0] for word in words or []}, port):
        print(line, flush=True)


@app.command()
def doctor(
    words: Words = None,
    cluster: ClusterFile = None,
    limit_minutes: Annotated[float, typer.Option(help="Give up after this long, most of it in the queue.")] = 30,
) -> None:
    """Run a short job on every node asked for: gan-dist doctor, an all-reduce and ten steps; print a line a node."""
    from launch.doctor import run_trial
    from launch.submit import new_id

    options, rest = _options(cluster, words)
    if rest:
        raise UserError(f"expected slurm. and job. keys only, found {rest[0]}")
    home = choose_run_dir("doctor", f"doctor-{new_id()}", None, options.job.runs)
    for line in run_trial(home, options, 60 * limit_minutes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
