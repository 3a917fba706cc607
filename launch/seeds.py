"""The same training with several seeds: a run each, all of them elements of one job array."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from gan_dist.config.base import parse_overrides
from gan_dist.config.schema import Config, to_yaml
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import write_atomically
from launch import slurm, snapshot
from launch.batch_script import Batch, batch_script, interpreter, rank_lines
from launch.options import ClusterOptions
from launch.submit import (
    Check,
    Submission,
    check_config,
    new_submission,
    pickled,
    record,
    refuse_busy,
    resolve_parent,
    submissions,
    unchecked,
)

MOST = 1000
SEED = "@ SEED @"
"""Stands for an element's seed in paths; the blanks have every path quoted for the shell."""


def read_seeds(text: str) -> list[int]:
    """Returns the seeds in a list such as 0-4 or 3,7,10-12, in order. Raises UserError for anything else."""
    seeds: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first or last - first >= MOST:
            raise UserError(f"--seeds: expected numbers and ranges such as 0-4 or 3,7, found {text!r}")
        seeds.update(range(first, last + 1))
    return sorted(seeds)


def run_of(base: Path, seed: int | str) -> Path:
    """Returns the directory of a seed's run, which lies where `base`, the run without a seed, would."""
    return base.with_name(f"{base.name}-seed-{seed}")


def seed_batch(base: Path, name: str, seeds: Sequence[int], cluster: ClusterOptions) -> str:
    """Returns the batch script of all seeds: an element's number is its seed, and names its run.

    `name` is the submission's in each run.
    """
    run = run_of(base, SEED)
    folder = run / "launch" / name
    words = interpreter(cluster, sys.executable)
    body = ("export SUBMITIT_EXECUTOR=slurm", *rank_lines(words, ["-m", "launch.job.rank", "submitit", str(folder)]))
    batch = Batch(base.name, run, folder, body, array=_as_array(seeds), home=base.parent)
    lines = batch_script(batch, cluster).split("\n")
    quoted = "'\"$SLURM_ARRAY_TASK_ID\"'"
    return "\n".join(line.replace(SEED, "%a" if line.startswith("#SBATCH") else quoted) for line in lines)


def _as_array(seeds: Sequence[int]) -> str:
    return f"{seeds[0]}-{seeds[-1]}" if seeds[-1] - seeds[0] == len(seeds) - 1 else ",".join(map(str, seeds))


def submit_seeds(
    config: str,
    overrides: Sequence[str],
    cluster: ClusterOptions,
    base: Path,
    seeds: Sequence[int],
    max_steps: int | None = None,
    from_run: str | None = None,
    check: Check = unchecked,
) -> list[tuple[Path, Submission]]:
    """Returns (run, its submission) of each seed, which are the elements of one job array. All are queued, or none.

    Raises UserError as submit_training does.
    """
    parent, runs = resolve_parent(from_run, cluster), {seed: run_of(base, seed) for seed in seeds}
    settings = check_seeds(config, overrides, cluster, base, seeds)
    slurm.require("sbatch", "srun", "scontrol")
    check(settings[seeds[0]], cluster, runs[seeds[0]])
    for run in runs.values():
        refuse_busy(run)
    with ExitStack() as opened:
        folders: dict[int, Path] = {}
        for seed, run in runs.items():
            like = folders.get(seeds[0])
            folders[seed] = opened.enter_context(new_submission(run, cluster.job, like))
            (run / "stop").unlink(missing_ok=True)
            write_atomically(folders[seed] / "config.yaml", to_yaml(settings[seed]).encode())
        text = seed_batch(base, folders[seeds[0]].name, seeds, cluster)
        made = _enqueue(runs, folders, text, [config, *overrides], cluster.slurm.ranks)
        return [
            (run, pickled(run, folders[seed], cluster, max_steps, parent, partial(made.__getitem__, seed)))
            for seed, run in runs.items()
        ]


def check_seeds(
    config: str, overrides: Sequence[str], cluster: ClusterOptions, base: Path, seeds: Sequence[int]
) -> dict[int, Config]:
    """Returns the validated configuration of each seed. Raises UserError as check_config does, and for a seed besides
    them."""
    if "seed" in parse_overrides(overrides):
        raise UserError("--seeds and seed=N say different things; give one of them")
    return {seed: check_config(config, [*overrides, f"seed={seed}"], cluster, run_of(base, seed)) for seed in seeds}


def _enqueue(
    runs: dict[int, Path], folders: dict[int, Path], text: str, words: Sequence[str], ranks: int
) -> dict[int, Submission]:
    """Returns each seed's submission, once all are queued and recorded, each in its own run."""
    commit = snapshot.commit_in(next(iter(folders.values())))
    known = [each.job.partition("_")[0] for run in runs.values() for each in submissions(run)]
    for folder in folders.values():
        write_atomically(folder / "submission.sh", text.encode())
    made: dict[int, Submission] = {}

    def note(job: slurm.Job) -> None:
        for seed, folder in folders.items():
            made[seed] = record(folder, "train", job, f"{job.id}_{seed}", commit, [*words, f"seed={seed}"], ranks)

    slurm.submit(text, note, known)
    return made
