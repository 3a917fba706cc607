"""Everything around training: preparation as a job array, and prepare -> train -> report as a chain of jobs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import expand_directory
from launch import slurm
from launch.batch_script import Batch, batch_script, interpreter
from launch.options import ClusterOptions, SlurmOptions
from launch.submit import Submission, check_config, enqueue, fresh, refuse_busy, submit_training


def on_cpus(options: SlurmOptions) -> SlurmOptions:
    """Returns what a job of one process asks for where training asks for `options`: a node's share without GPUs."""
    extra = {key: value for key, value in options.extra.items() if not re.search("gpu|gres|tres", key)}
    one = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "gres": None, "extra": extra}
    return options.model_copy(update=one)


def command_lines(cluster: ClusterOptions, commands: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Returns the lines of a batch script that run gan-dist commands one after the other as its only task."""
    words = [*interpreter(cluster, sys.executable), "-u", "-m", "launch.job.command"]
    for number, command in enumerate(commands):
        words += ["--then"] * (number > 0) + list(command)
    return (f"gan_dist_srun --ntasks=1 {shlex.join(words)}", "gan_dist_finish $?")


def submit_commands(
    run: Path,
    kind: str,
    commands: Sequence[Sequence[str]],
    cluster: ClusterOptions,
    *,
    array: int | None = None,
    after: str | None = None,
) -> Submission:
    """Returns the submission of gan-dist commands as one CPU job, or as an array of `array` elements."""
    slurm.need("sbatch", "srun", "scontrol")
    with fresh(run, cluster.job.runs) as folder:
        lines = command_lines(cluster, commands)
        name = f"{run.name}-{kind}"
        batch = Batch(name, run, folder, folder / "code", lines, array=array, home=Path.cwd(), after=after)
        text = batch_script(batch, cluster, on_cpus(cluster.slurm))
        return enqueue(run, folder, kind, text, [word for command in commands for word in command], array or 1, after)


def prepare_array(words: Sequence[str], out: Path, tasks: int, cluster: ClusterOptions) -> tuple[Path, Submission]:
    """Returns (the directory of logs and words beside the dataset, the submission) of preparation as an array."""
    if tasks < 1:
        raise UserError(f"--tasks: expected 1 or more, found {tasks}")
    beside = out.with_name(f"{out.name}.launch")
    refuse_busy(beside)
    return beside, submit_commands(beside, "prepare", [["prepare", *words, str(out)]], cluster, array=tasks)


def submit_pipeline(
    config: str,
    overrides: Sequence[str],
    sources: Sequence[str],
    tasks: int,
    cluster: ClusterOptions,
    run: Path,
    *,
    max_steps: int | None = None,
) -> list[Submission]:
    """Returns the submissions of prepare -> train -> sample and report; each waits for the one before to end well.

    A stage that cannot run any more is cancelled by SLURM. When a later one cannot be submitted, earlier ones are taken
    back. Raises UserError for a run that has a job already.
    """
    out = str(expand_directory(check_config(config, overrides, cluster, run).data.shards))
    refuse_busy(run)
    made: list[Submission] = []
    try:
        made.append(submit_commands(run, "prepare", [["prepare", *sources, out]], cluster, array=tasks))
        made.append(
            submit_training(config, overrides, cluster, run, max_steps=max_steps, after=made[-1].job, alone=False)
        )
        grid = ["sample", str(run), "--out", str(run / "grid.png")]
        commands = [grid, ["report", str(run)]]
        made.append(submit_commands(run, "report", commands, cluster, after=made[-1].job))
    except BaseException:  # Ctrl-C is one
        for each in made:
            with suppress(GanDistError):
                slurm.ask("scancel", each.job)
        raise
    return made
