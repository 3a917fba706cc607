"""The text of batch scripts, made by pure functions from validated options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.options import ClusterOptions, SlurmOptions
from launch.snapshot import ARCHIVE, UNPACKED


@dataclass(frozen=True)
class Batch:
    """What differs between the batch scripts of one cluster."""

    name: str
    run: Path
    """The run directory, or DATASET.launch for a preparation: holds logs/ and is the working directory."""
    submission: Path
    """The directory of this submission: its code as `snapshot.take` puts it there, and how each of its starts ended."""
    body: tuple[str, ...]
    """Shell lines after the set-up."""
    array: int | str | None = None
    """Number of elements of a job array, which are numbered from 0; or their numbers, as sbatch takes them."""
    home: Path | None = None
    """The working directory, where it is not the run's: paths in `body` may be relative to it."""
    output: Path | None = None
    """The dataset that a preparation writes: its shards are the progress of the job."""
    after: str | None = None
    """Ids of jobs, joined by colons: start when all have succeeded, and be cancelled when one cannot."""


def batch_script(batch: Batch, cluster: ClusterOptions, slurm: SlurmOptions | None = None) -> str:
    """Returns the whole script; `slurm` replaces the cluster file's options for a job that needs less than training."""
    job = cluster.job
    code = batch.submission / (UNPACKED if job.unpack else ARCHIVE)
    shell = code if job.unpack else batch.submission
    srun = (slurm or cluster.slurm).srun
    places = [batch.run, batch.submission, *([batch.output] if batch.output else [])]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{line}" for line in header(batch, slurm or cluster.slurm)),
            "",
            f"export GAN_DIST_MAX_REQUEUES={job.max_requeues} GAN_DIST_MAX_STARTS={job.max_starts}",
            *([f"export GAN_DIST_NOTIFY={shlex.quote(job.notify)}"] if job.notify else []),
            # Where a node has no Python of its own, that of the ranks decides what becomes of the job.
            *([] if job.container else [f"export GAN_DIST_PYTHON={shlex.quote(job.python or sys.executable)}"]),
            f"source {shlex.quote(str(shell))}/slurm/lib.sh",
            f"gan_dist_begin {shlex.join(map(str, places))}",
            *([f"gan_dist_srun_options=({shlex.join(long_options(srun))})"] if srun else []),
            "",
            *(f"export {key}={shlex.quote(value)}" for key, value in job.env.items()),
            *(["gan_dist_setup", *job.setup, "gan_dist_ready"] if job.setup else []),
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "",
            *batch.body,
            "",
        ]
    )


def header(batch: Batch, slurm: SlurmOptions) -> list[str]:
    """Returns sbatch's options as `name=value`: the user's, then those that saving and requeueing need."""
    requested = {
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.ranks_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
        "gres": slurm.gres,
        "mem": slurm.mem,
        "time": slurm.time,
        **{key.lstrip("-"): value for key, value in slurm.extra.items()},
    }
    logs = str(batch.run / "logs").replace("%", "%%")
    required: dict[str, str | int | bool | None] = {
        "job-name": batch.name,
        "chdir": str(batch.home or batch.run),
        "output": f"{logs}/%A_%a-batch.log" if batch.array else f"{logs}/%j-batch.log",
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR2@{slurm.signal_lead_s}",
        "array": f"0-{batch.array - 1}" if batch.array and isinstance(batch.array, int) else batch.array or None,
        "dependency": f"afterok:{batch.after}" if batch.after else None,
        "kill-on-invalid-dep": "yes" if batch.after else None,
    }
    options = {key: value for key, value in (requested | required).items() if value is not None and value is not False}
    return [key if value is True else f"{key}={shlex.quote(str(value))}" for key, value in options.items()]


def long_options(options: Mapping[str, str | int | bool]) -> list[str]:
    """Returns options by their long names as words of a command; one that is false is left out."""
    given = [(key.lstrip("-"), value) for key, value in options.items() if value is not False]
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given]


def interpreter(cluster: ClusterOptions, python: str) -> list[str]:
    """Returns the command that starts Python in a job: the container's words, then the interpreter."""
    return [*shlex.split(cluster.job.container or ""), cluster.job.python or python]


def rank_lines(words: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Returns the lines that start one rank a task: `words` start Python, `more` are its arguments."""
    return (
        f"gan_dist_preflight {shlex.join(words)}",
        f"gan_dist_srun {shlex.join([*words, '-u', *more])}",
        "gan_dist_finish $?",
    )
