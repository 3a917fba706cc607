"""The options of a cluster: configs/clusters/*.yaml plus `slurm.key=value` and `job.key=value`, validated."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gan_dist.config.base import NonNegative, Positive, Section, read_yaml, validate, with_overrides
from gan_dist.utils.files import expand, expand_variables, present

FIXED = ("array", "dependency", "error", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "chdir")
"""Options of sbatch that saving and requeueing depend on; `slurm.extra` may not set them."""
Seconds = Annotated[int, Field(ge=10)]


class SlurmOptions(Section):
    """What each job requests from SLURM. A key that is left out has the cluster's default.

    `header` in batch_script.py writes each key into the script. Small jobs leave out what they do not need: `on_cpus`
    in submit.py, `one_processor` in tensorboard.py.
    """

    account: str | None = None
    """The account to charge."""
    partition: str | None = None
    """The partition (queue)."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodes: Positive = 1
    """Number of nodes."""
    gpus_per_node: NonNegative = 0
    """GPUs on each node; 0 trains on CPUs."""
    gres: str | None = None
    """Generic resources on each node, for clusters that count GPUs this way (gpu:a100:4)."""
    tasks_per_node: Positive | None = None
    """Ranks on each node; null means one for each GPU, or one without GPUs."""
    cpus_per_task: Positive = 4
    """Processors of each rank."""
    mem: str | None = None
    """Memory on each node, as SLURM writes it (64G; 0 means all of it)."""
    time: str | int = 60
    """Time limit of one job: minutes, or [days-]hours:minutes:seconds. A run takes as many jobs as it needs."""
    signal_lead_s: Seconds = 120
    """Seconds before the time limit at which the run is asked to save and end, to be requeued."""
    extra: dict[str, str | int | bool] = Field(default={})
    """Other options of sbatch by their long names (exclude: node7, exclusive: true)."""

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_a_time(cls, value: object) -> object:
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", str(value)):
            raise ValueError(f"slurm.time: expected minutes or [days-]hours:minutes:seconds, found {value!r}")
        return value

    @model_validator(mode="after")
    def _facts_agree(self) -> SlurmOptions:
        if self.signal_lead_s >= self.seconds:
            raise ValueError(
                f"slurm.signal_lead_s: {self.signal_lead_s} s is all of slurm.time ({self.seconds} s); lower it, or "
                "raise slurm.time"
            )
        if self.gpus_per_node and self.gres:
            raise ValueError("slurm.gres: slurm.gpus_per_node requests GPUs already; set one of the two")
        for key in self.extra:
            if key.lstrip("-") in FIXED:
                raise ValueError(f"slurm.extra: {key} is reserved for saving and requeueing; leave it out")
        return self

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        if isinstance(self.time, int):
            return 60 * self.time
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:  # days-hours[:minutes[:seconds]]
            parts += [0] * (3 - len(parts))
        elif len(parts) < 3:  # minutes[:seconds]
            parts = [0, *parts, *([0] if len(parts) == 1 else [])]
        return int(days or 0) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node, resolved."""
        in_gres = re.search(r"gpu(?::\w+)?:(\d+)", self.gres or "")
        return self.tasks_per_node or self.gpus_per_node or (int(in_gres[1]) if in_gres else 1)


class JobOptions(Section):
    """How a job runs on the nodes that it gets."""

    python: str | None = None
    """The Python of the ranks; null means the one that submits. Jobs install nothing.

    A path is relative to where you submit. With a container it is a path in the container, and only `~` and `$VAR`
    expand."""
    setup: list[str] = Field(default=[])
    """Shell lines at the start of the job (module load cuda)."""
    env: dict[str, str] = Field(default={})
    """Environment variables of all ranks (NCCL_SOCKET_IFNAME: ib0). Nothing is set by default."""
    container: str | None = None
    """Command before the interpreter (apptainer exec --nv image.sif); the batch script itself runs outside.

    `~` and `$VAR` expand, and a word that is an existing relative path becomes absolute, both when you submit. A word
    with blanks stays as it is, and so does a path within a word (-B ./data:/data)."""
    runs: str | None = None
    """The directory of all runs, on a file system that all nodes share; null: $GAN_DIST_RUNS, or ./runs."""
    max_requeues: NonNegative = 100
    """How often a submission may be requeued in all."""
    max_starts_without_progress: Positive = 3
    """After so many starts in a row without a newer checkpoint (a preparation: a further shard), whatever ended them,
    a submission is not requeued any more. A newer checkpoint begins the count anew."""
    max_crashes: NonNegative | None = None
    """An older name of the same bound, counted in restarts: 3 allows 4 starts in a row without a newer checkpoint."""

    @property
    def max_starts(self) -> int:
        """Starts in a row that may end without a newer checkpoint, by whichever name the bound was given."""
        return self.max_starts_without_progress if self.max_crashes is None else self.max_crashes + 1

    @field_validator("env")
    @classmethod
    def _variables_have_names(cls, value: dict[str, str]) -> dict[str, str]:
        if invalid := [name for name in value if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
            raise ValueError(f"job.env: expected names of variables such as NCCL_DEBUG, found {invalid[0]!r}")
        return value

    @field_validator("container")
    @classmethod
    def _container_is_words(cls, value: str | None) -> str | None:
        try:
            shlex.split(value or "")
        except ValueError as error:
            raise ValueError(f"job.container: expected words as for a shell, found {value!r}: {error}") from None
        return value


class ClusterOptions(Section):
    """The contents of a cluster file."""

    slurm: SlurmOptions = SlurmOptions()
    job: JobOptions = JobOptions()


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns (overrides of the cluster file, overrides of the training configuration)."""
    cluster: list[str] = []
    training: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        (cluster if equals and key.partition(".")[0] in ClusterOptions.model_fields else training).append(word)
    return cluster, training


def load_cluster(path: str | Path | None, overrides: Sequence[str] = ()) -> ClusterOptions:
    """Returns the validated options of a cluster file (defaults without one) with `section.key=value` words applied.

    Raises UserError with one line naming the key, its nearest valid name, or expected and found.
    """
    values: dict[str, Any] = read_yaml(expand(path), "configs/clusters/slurm.yaml") if path else {}
    values = with_overrides(ClusterOptions, values, overrides)
    options = validate(ClusterOptions, values, str(path) if path else "cluster options", overrides)
    return options.model_copy(update={"job": _located(options.job)})


def _located(job: JobOptions) -> JobOptions:
    """Returns `job` with absolute paths: the job runs in another directory, and its words are quoted."""
    python = expand_variables(job.python, "job.python") if job.python else None
    if python and "/" in python and not job.container:
        python = os.path.abspath(python)  # noqa: PTH100 (resolve() would leave the virtual environment)
    words = [_container_word(number, word) for number, word in enumerate(shlex.split(job.container or ""))]
    return job.model_copy(update={"python": python, "container": shlex.join(words) or None})


def _container_word(number: int, word: str) -> str:
    if re.search(r"\s", word):  # bash -c 'exec "$@"'
        return word
    word = expand_variables(word, "job.container")
    # A program is searched on PATH, as by a shell; and "exec" means no file, even if there is one of that name.
    path_like = "/" in word or ("." in word and number > 0)
    return os.path.abspath(word) if path_like and present(Path(word)) else word  # noqa: PTH100
