"""What a cluster is like: configs/clusters/*.yaml plus `slurm.key=value` and `job.key=value`, validated."""

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

OURS = ("array", "dependency", "error", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "chdir")
"""sbatch options that the protocol of saving and requeueing sets; `slurm.extra` may not."""
Seconds = Annotated[int, Field(ge=10)]


class SlurmOptions(Section):
    """What each job asks of SLURM. A key left out is left to the cluster's default."""

    account: str | None = None
    """Whom to charge."""
    partition: str | None = None
    """Which queue."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    nodes: Positive = 1
    """Machines."""
    gpus_per_node: NonNegative = 0
    """GPUs on each machine; 0 trains on CPUs."""
    gres: str | None = None
    """Generic resources on each machine, where the cluster counts GPUs that way (gpu:a100:4)."""
    tasks_per_node: Positive | None = None
    """Ranks on each machine; null means one a GPU, or one where there is none."""
    cpus_per_task: Positive = 4
    """Processors for each rank."""
    mem: str | None = None
    """Memory on each machine, as SLURM writes it (64G; 0 is all of it)."""
    time: str | int = 60
    """Time limit of one job: minutes, or [days-]hours:minutes:seconds. A run goes on in as many jobs as it takes."""
    signal_lead_s: Seconds = 120
    """Seconds before the time limit at which the run is told to save and make room for its next job."""
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
                "ask for more time"
            )
        if self.gpus_per_node and self.gres:
            raise ValueError("slurm.gres: slurm.gpus_per_node asks for GPUs already; set one of the two")
        for key in self.extra:
            if key.lstrip("-") in OURS:
                raise ValueError(f"slurm.extra: {key} belongs to the protocol of saving and requeueing; leave it out")
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
        """Ranks on each machine, resolved."""
        in_gres = re.search(r"gpu(?::\w+)?:(\d+)", self.gres or "")
        return self.tasks_per_node or self.gpus_per_node or (int(in_gres[1]) if in_gres else 1)


class JobOptions(Section):
    """How a job runs, whatever SLURM gives it."""

    python: str | None = None
    """The interpreter of the ranks; null takes the one that submits. Jobs install nothing.

    A path is one from where you submit; with a container it is the container's, and only `~` and `$VAR` expand."""
    setup: list[str] = Field(default=[])
    """Shell lines before anything else (module load cuda)."""
    env: dict[str, str] = Field(default={})
    """Environment of all ranks (NCCL_SOCKET_IFNAME: ib0). Nothing is set here for you."""
    container: str | None = None
    """Words before the interpreter (apptainer exec --nv image.sif); the batch script itself stays outside.

    `~` and `$VAR` expand, and a word that is an existing relative path becomes absolute, where you submit; a word with
    blanks is left alone, and so is a path within one (-B ./data:/data)."""
    runs: str | None = None
    """Where runs lie, on a file system that all nodes share; null: $GAN_DIST_RUNS, or ./runs."""
    max_requeues: NonNegative = 100
    """How often one submission may be requeued after it has saved and stopped."""
    max_crashes: NonNegative = 3
    """How often one submission may be started again after a crash or a lost host."""

    @field_validator("env")
    @classmethod
    def _variables_have_names(cls, value: dict[str, str]) -> dict[str, str]:
        if odd := [name for name in value if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
            raise ValueError(f"job.env: expected names of variables such as NCCL_DEBUG, found {odd[0]!r}")
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
    """A cluster file."""

    slurm: SlurmOptions = SlurmOptions()
    job: JobOptions = JobOptions()


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns (the words for the cluster, the words for the training configuration)."""
    ours: list[str] = []
    theirs: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        (ours if equals and key.partition(".")[0] in ClusterOptions.model_fields else theirs).append(word)
    return ours, theirs


def load_cluster(path: str | Path | None, overrides: Sequence[str] = ()) -> ClusterOptions:
    """Returns the validated options of a cluster file (defaults without one) with `section.key=value` words applied.

    Raises UserError with one line naming the key, its nearest valid name, or expected and found.
    """
    values: dict[str, Any] = read_yaml(expand(path), "configs/clusters/slurm.yaml") if path else {}
    values = with_overrides(ClusterOptions, values, overrides)
    options = validate(ClusterOptions, values, str(path) if path else "cluster options", overrides)
    return options.model_copy(update={"job": _located(options.job)})


def _located(job: JobOptions) -> JobOptions:
    """Returns `job` with paths that mean the same in a job, which runs in another directory and quotes its words."""
    python = expand_variables(job.python, "job.python") if job.python else None
    if python and "/" in python and not job.container:
        python = os.path.abspath(python)  # noqa: PTH100 (resolve() would leave the virtual environment)
    words = [_container_word(number, word) for number, word in enumerate(shlex.split(job.container or ""))]
    return job.model_copy(update={"python": python, "container": shlex.join(words) or None})


def _container_word(number: int, word: str) -> str:
    if re.search(r"\s", word):  # bash -c 'exec "$@"'
        return word
    word = expand_variables(word, "job.container")
    # A program is looked for on PATH, as by a shell; and "exec" is no file, even if there is one.
    path_like = "/" in word or ("." in word and number > 0)
    return os.path.abspath(word) if path_like and present(Path(word)) else word  # noqa: PTH100
