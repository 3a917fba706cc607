"""The options of a cluster: configs/clusters/*.yaml plus `slurm.key=value` and `job.key=value`, validated."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gan_dist.config.base import (
    NonNegative,
    Positive,
    Section,
    parse_overrides,
    read_yaml,
    validate,
    with_overrides,
)
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand, expand_variables, present

FIXED = ("array", "dependency", "error", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "chdir")
"""Options of sbatch that saving and requeueing depend on; `slurm.extra` may not set them."""
COUNTS = ("gpus", "gpus-per-task", "ntasks", "ntasks-per-node", "ntasks-per-gpu")
"""Options of sbatch that decide how many ranks there are, or ask for GPUs in a way that does not say it."""
TYPED_GPUS = r"[\w.-]+:\d+(,[\w.-]+:\d+)*"
Seconds = Annotated[int, Field(ge=10)]


class SlurmOptions(Section):
    """What each job requests from SLURM. A key that is left out has the cluster's default.

    `header` in batch_script.py writes each key into the script; `extra` takes any option that has no key. SMALL_JOBS
    below says what jobs other than training leave out.
    """

    account: str | None = None
    """The account to charge."""
    partition: str | None = None
    """The partition (queue)."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodes: int | str = 1
    """Number of nodes, or a range (2-4): the run takes as many as it gets."""
    gpus_per_node: int | str | None = 0
    """GPUs on each node, or type and number (a100:4); 0 trains on CPUs, null leaves it to the cluster."""
    gres: str | None = None
    """Generic resources on each node, for clusters that count GPUs this way (gpu:a100:4)."""
    tasks_per_node: Positive | None = None
    """Ranks on each node; null means one for each GPU, or one without GPUs."""
    cpus_per_task: Positive | None = 4
    """Processors of each rank; null leaves it to the cluster."""
    mem: str | None = None
    """Memory on each node, as SLURM writes it (64G; 0 means all of it)."""
    time: str | int = 60
    """Time limit of one job: minutes, or [days-]hours:minutes:seconds. A run takes as many jobs as it needs."""
    signal_lead_s: Seconds = 120
    """Seconds before the time limit at which the run is asked to save and end, to be requeued."""
    extra: dict[str, str | int | bool] = Field(default={})
    """Other options of sbatch by their long names (exclude: node7, exclusive: true).

    One of them on the command line: slurm.extra.exclude=node7."""
    srun: dict[str, str | int | bool] = Field(default={})
    """Options of srun for the ranks, by their long names (cpu-bind: cores, container-image: image.sqsh)."""

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_a_time(cls, value: object) -> object:
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", str(value)):
            raise ValueError(f"slurm.time: expected minutes or [days-]hours:minutes:seconds, found {value!r}")
        return value

    @field_validator("nodes", mode="before")
    @classmethod
    def _nodes_are_a_number_or_a_range(cls, value: object) -> object:
        if type(value) is int and value < 1:
            raise ValueError(f"slurm.nodes: expected greater than or equal to 1, found {value}")
        found = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", str(value))
        if type(value) is not int and (found is None or int(found[1]) > int(found[2])):
            raise ValueError(f"slurm.nodes: expected integer, or a range such as 2-4, found {value!r}")
        return value

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _gpus_have_a_number(cls, value: object) -> object:
        if type(value) is int and value < 0:
            raise ValueError(f"slurm.gpus_per_node: expected greater than or equal to 0, found {value}")
        if type(value) is not int and value is not None and not re.fullmatch(TYPED_GPUS, str(value)):
            raise ValueError(
                f"slurm.gpus_per_node: expected integer, or a type with its number (a100:4), found {value!r}"
            )
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
            if key.lstrip("-") in COUNTS and not (self.tasks_per_node or self.gpus):
                raise ValueError(f"slurm.extra: {key} leaves open how many ranks there are; set slurm.tasks_per_node")
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
    def gpus(self) -> int:
        """GPUs on each node, whatever key asks for them; 0 where none does."""
        extra = {key.lstrip("-"): value for key, value in self.extra.items()}
        typed = [self.gpus_per_node, extra.get("gpus-per-node")]
        listed = [f"gpu:{entry}" for value in typed for entry in str(value or "").split(",") if entry]
        return sum(map(gpus_in, [*listed, self.gres or "", str(extra.get("gres", ""))]))

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node, resolved."""
        return self.tasks_per_node or self.gpus or 1

    @property
    def ranks(self) -> int:
        """Ranks of the whole job; the most of them where the number of nodes is a range."""
        return int(str(self.nodes).rpartition("-")[2]) * self.ranks_per_node

    @property
    def planned(self) -> int | None:
        """Ranks that SLURM has to start, or None where the number of nodes is a range."""
        return self.ranks if isinstance(self.nodes, int) else None


def gpus_in(gres: str) -> int:
    """Returns the number of GPUs in a list of generic resources: gpu:4, gpu:a100-sxm4-80gb:2,gpu:v100=2, gpu:1g.5gb."""
    count = 0
    for entry in gres.split(","):
        name, *rest = re.split("[:=]", re.sub(r"^gres[:/]|\(.*", "", entry.strip()))
        if name == "gpu":  # name[[:type]:number]
            count += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return count


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
    unpack: bool = False
    """Whether a submission holds its code as a directory of files instead of one archive: for code of yours that opens
    files beside its modules, or compiled extensions in the checkout."""
    notify: str | None = None
    """Shell command that the batch script runs once a job has ended for good: done, failed, stopped or cancelled.

    It finds GAN_DIST_RUN, GAN_DIST_OUTCOME and GAN_DIST_REASON in its environment, and has a minute. SLURM's own mail,
    slurm.extra.mail-user and mail-type, knows of every requeue too."""
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


class StageOptions(Section):
    """What a stage other than training requests: one process on one node, without GPUs."""

    slurm: dict[str, Any] = Field(default={})
    """Keys of `slurm` for this stage. Others are training's, but for GPUs, memory and exclusive nodes."""


class ClusterOptions(Section):
    """The contents of a cluster file."""

    slurm: SlurmOptions = SlurmOptions()
    job: JobOptions = JobOptions()
    prepare: StageOptions = StageOptions()
    report: StageOptions = StageOptions()

    def stage(self, kind: str, explicit: Collection[str] = ()) -> SlurmOptions:
        """Returns what a job of this kind (train, or one of SMALL_JOBS) requests. Raises UserError naming a wrong key.

        The keys in `explicit` (slurm.mem) were given for this job, and not for training.
        """
        if kind not in SMALL_JOBS:
            return self.slurm
        training = self.slurm.model_dump()
        given = {key: value for key, value in training.items() if f"slurm.{key}" in explicit}
        given |= getattr(self, kind, StageOptions()).slurm
        values = {**training, **SMALL_JOBS[kind], **given}
        if isinstance(given.get("extra", {}), dict):
            small = {key: value for key, value in self.slurm.extra.items() if not re.search(LARGE, key)}
            values["extra"] = {**small, **given.get("extra", {})}
        try:
            return validate(ClusterOptions, {"slurm": values}, f"{kind}.slurm").slurm
        except UserError as error:
            line = str(error).removeprefix(f"{kind}.slurm: ")
            raise UserError(re.sub(r"\bslurm\.", f"{kind}.slurm.", line)) from None


ONE_PROCESS: dict[str, Any] = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "gres": None, "mem": None}
SMALL_JOBS = {
    "prepare": ONE_PROCESS,
    "report": ONE_PROCESS,
    "tensorboard": {**ONE_PROCESS, "cpus_per_task": 1, "constraint": None},
}
"""What each kind of job of one process does not inherit from training."""
LARGE = "gpu|gres|tres|mem|exclusive|ntasks|nodelist|switches"
"""Matches the options of sbatch that ask for more than one processor on any node."""


SINGLE = re.compile(r"(slurm\.(?:extra|srun)|(?:prepare|report)\.slurm(?:\.extra|\.srun)?)\.([\w-]+)=(.*)", re.DOTALL)
"""Matches a word that sets one option of a group: slurm.extra.exclude=node7, prepare.slurm.time=30."""


def _with_single_options(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Returns `values` with the words applied that SINGLE matches."""
    for found in filter(None, map(SINGLE.fullmatch, words)):
        path, last, text, at = found[1].split("."), found[2], found[3], values
        for name in path:
            if not isinstance(at.get(name) or {}, dict):
                raise UserError(f"{found[1]}: expected keys with values, found {at[name]!r}")
            at[name] = {**(at.get(name) or {})}
            at = at[name]
        at[last] = parse_overrides([f"{'.'.join(path)}={text}"])[".".join(path)]
    return values


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
    others = [word for word in overrides if not SINGLE.fullmatch(word)]
    values = _with_single_options(with_overrides(ClusterOptions, values, others), overrides)
    options = validate(ClusterOptions, values, str(path) if path else "cluster options", others)
    for kind in SMALL_JOBS:
        options.stage(kind)
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
