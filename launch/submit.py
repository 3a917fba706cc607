"""Submits jobs: training, preparation as a job array, and the pipeline prepare -> train -> report."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit

from gan_dist.config.base import read_yaml
from gan_dist.config.diff import continuation
from gan_dist.config.schema import Config, load_config, to_yaml
from gan_dist.data.order import check_ranks
from gan_dist.runs.naming import run_and_step, runs_home
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import expand_directory, write_atomically
from launch import slurm, snapshot
from launch.batch_script import Batch, batch_script, interpreter, rank_lines
from launch.job.rank import TrainJob
from launch.job.verdict import FINAL
from launch.options import ClusterOptions, JobOptions


@dataclass(frozen=True)
class Submission:
    """One submitted job, stored as RUN/launch/ID/job.json, where `status` finds it.

    The last five fields say which job of that id it is; earlier versions did not record them.
    """

    id: str
    kind: str
    job: str
    time: float
    commit: str | None
    words: tuple[str, ...]
    ranks: int
    after: str | None = None
    cluster: str | None = None
    name: str | None = None
    directory: str | None = None
    submitted: str | None = None
    user: str | None = None


Check = Callable[[Config, ClusterOptions, Path], None]
"""Raises UserError for what would fail once the job of a run, with this configuration, runs on this cluster."""


def unchecked(settings: Config, cluster: ClusterOptions, run: Path) -> None:
    """Finds nothing."""


class Executor(submitit.SlurmExecutor):
    """Submitit's executor, which pickles the job and files it by id, around our own call of sbatch."""

    def __init__(self, folder: Path, enqueue: Callable[[], Submission]) -> None:
        super().__init__(str(folder).replace("%", "%%"))
        self._enqueue = enqueue

    def _submit_command(self, command: str) -> Any:
        self.made = self._enqueue()
        return self.job_class(folder=self.folder, job_id=self.made.job, tasks=list(range(self.made.ranks)))


def new_id() -> str:
    """Returns a unique name for a submission, sortable by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def training_batch(
    run: Path, submission: Path, cluster: ClusterOptions, name: str, after: str | None = None, python: str | None = None
) -> str:
    """Returns the batch script of a training job, exactly as it will be submitted."""
    words = interpreter(cluster, python or sys.executable)
    lines = rank_lines(words, ["-m", "launch.job.rank", "submitit", str(submission)])
    body = ("export SUBMITIT_EXECUTOR=slurm", *lines)
    return batch_script(Batch(name, run, submission, body, after=after), cluster)


def check_config(config: str, overrides: Sequence[str], cluster: ClusterOptions, run: Path) -> Config:
    """Returns the validated configuration. Raises UserError for what ranks would refuse after hours in the queue."""
    settings = load_config(config, overrides)
    refuse_patterns(run)
    ranks = cluster.slurm.ranks
    check_ranks(ranks, settings.train.global_batch)
    refuse_changes(run, settings)
    return settings


def resolve_parent(from_run: str | None, cluster: ClusterOptions) -> str | None:
    """Returns RUN[@STEP] with the run's absolute path: a job has another working directory."""
    if from_run is None:
        return None
    parent, step = run_and_step(from_run, cluster.job.runs)
    if not (parent / "checkpoints").is_dir():
        raise UserError(f"--from: no run at {parent}; expected the directory or the name of a run")
    return str(parent) if step is None else f"{parent}@{step}"


def refuse_patterns(run: Path) -> None:
    """Raises UserError for a path in which SLURM or Submitit would replace a pattern (%j)."""
    if pattern := re.search(r"%\w", str(run)):
        raise UserError(
            f"{run}: {pattern[0]} in a path is a pattern to SLURM and Submitit; choose another name or directory"
        )


def refuse_changes(run: Path, settings: Config) -> None:
    """Raises UserError, naming keys and both values, unless the run in `run` may be continued with `settings`."""
    if not (run / "config.yaml").is_file():
        return
    refused, _ = continuation(read_yaml(run / "config.yaml"), settings.to_dict())
    if refused:
        raise UserError(
            f"{run} holds a run with another configuration ({'; '.join(refused)}); to start it as a new run, submit it "
            "with --name or --run-dir"
        )


def submit_training(
    config: str,
    overrides: Sequence[str],
    cluster: ClusterOptions,
    run: Path,
    *,
    max_steps: int | None = None,
    from_run: str | None = None,
    after: str | None = None,
    alone: bool = True,
    check: Check = unchecked,
    like: Path | None = None,
) -> Submission:
    """Returns the submission of a training job, which runs a snapshot of code and configuration.

    `like` is an earlier submission whose code it runs instead. `check` raises UserError for what would fail on the
    cluster. Raises UserError when the run has a job already, when its directory cannot be written, and with sbatch's
    message when it refuses the job.
    """
    settings, parent = check_config(config, overrides, cluster, run), resolve_parent(from_run, cluster)
    slurm.require("sbatch", "srun", "scontrol")
    check(settings, cluster, run)
    if alone:
        refuse_busy(run)
    with new_submission(run, cluster.job, like) as folder:
        (run / "stop").unlink(missing_ok=True)  # one that came too late for an earlier job
        write_atomically(folder / "config.yaml", to_yaml(settings).encode())
        ranks, text = cluster.slurm.ranks, training_batch(run, folder, cluster, run.name, after)

        def queue() -> Submission:
            return enqueue(run, folder, "train", text, [config, *overrides], ranks, after)

        return pickled(run, folder, cluster, max_steps, parent, queue)


def pickled(
    run: Path,
    folder: Path,
    cluster: ClusterOptions,
    max_steps: int | None,
    parent: str | None,
    queue: Callable[[], Submission],
) -> Submission:
    """Returns the submission that `queue` makes, once what each rank runs is pickled into its directory `folder`."""
    job = TrainJob(str(folder / "config.yaml"), (), str(run), cluster.slurm.planned, max_steps, parent)
    executor = Executor(folder, queue)
    executor.update_parameters(time=max(1, cluster.slurm.seconds // 60))
    executor.submit(job)
    return executor.made


def command_lines(cluster: ClusterOptions, commands: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Returns the lines of a batch script that run gan-dist commands in turn, as its only task."""
    words = [*interpreter(cluster, sys.executable), "-u", "-m", "launch.job.command"]
    for number, command in enumerate(commands):
        words += ["--then"] * (number > 0) + list(command)
    preflight = f"gan_dist_preflight {shlex.join(interpreter(cluster, sys.executable))}"
    return (preflight, f"gan_dist_srun --ntasks=1 {shlex.join(words)}", "gan_dist_finish $?")


@dataclass(frozen=True)
class Stage:
    """gan-dist commands as one CPU job, or as a job array of `tasks` elements; `output`: the dataset they prepare."""

    kind: str
    commands: Sequence[Sequence[str]]
    tasks: int | None = None
    output: Path | None = None
    after: str | None = None


def preparation(sources: Sequence[str], out: Path, tasks: int) -> Stage:
    """Returns the stage that prepares a dataset; `sources` may hold options of gan-dist prepare."""
    return Stage("prepare", [["prepare", *sources, str(out)]], tasks, out)


def report_of(run: Path, after: str) -> Stage:
    """Returns a pipeline's last stage."""
    commands = [["sample", str(run), "--out", str(run / "grid.png")], ["report", str(run)]]
    return Stage("report", commands, after=after)


def stage_batch(run: Path, submission: Path, stage: Stage, cluster: ClusterOptions) -> str:
    """Returns the batch script of a stage."""
    lines = command_lines(cluster, stage.commands)
    placed = {"array": stage.tasks, "home": Path.cwd(), "output": stage.output, "after": stage.after}
    batch = Batch(f"{run.name}-{stage.kind}", run, submission, lines, **placed)  # type: ignore[arg-type]
    return batch_script(batch, cluster, cluster.stage(stage.kind))


def submit_stage(run: Path, stage: Stage, cluster: ClusterOptions) -> Submission:
    """Returns the submission of a stage."""
    slurm.require("sbatch", "srun", "scontrol")
    with new_submission(run, cluster.job) as folder:
        text = stage_batch(run, folder, stage, cluster)
        words = [word for command in stage.commands for word in command]
        return enqueue(run, folder, stage.kind, text, words, stage.tasks or 1, stage.after)


def prepare_array(words: Sequence[str], out: Path, tasks: int, cluster: ClusterOptions) -> tuple[Path, Submission]:
    """Returns (DATASET.launch with the logs, the submission) of a preparation as a job array."""
    if tasks < 1:
        raise UserError(f"--tasks: expected 1 or more, found {tasks}")
    beside = logs_beside(out)
    refuse_busy(beside)
    return beside, submit_stage(beside, preparation(words, out, tasks), cluster)


def logs_beside(out: Path) -> Path:
    """Returns the directory of the jobs that prepare the dataset `out`."""
    return out.with_name(f"{out.name}.launch")


def pipeline_scripts(
    config: str, overrides: Sequence[str], sources: Sequence[str], tasks: int, cluster: ClusterOptions, run: Path
) -> list[str]:
    """Returns the batch scripts of a pipeline as they would be submitted, but for the ids of jobs."""
    out = expand_directory(check_config(config, overrides, cluster, run).data.shards)
    folder = run / "launch" / new_id()
    return [
        stage_batch(run, folder, preparation(sources, out, tasks), cluster),
        training_batch(run, folder, cluster, run.name, "ID_OF_PREPARE"),
        stage_batch(run, folder, report_of(run, "ID_OF_TRAIN"), cluster),
    ]


def submit_pipeline(
    config: str,
    overrides: Sequence[str],
    sources: Sequence[str],
    tasks: int,
    cluster: ClusterOptions,
    run: Path,
    *,
    max_steps: int | None = None,
    check: Check = unchecked,
) -> list[Submission]:
    """Returns the submissions of prepare -> train -> sample and report; each waits for the success of the one before.

    SLURM cancels a job that can no longer start. When one cannot be submitted, the earlier ones are cancelled. Raises
    UserError when the run has a job already.
    """
    settings = check_config(config, overrides, cluster, run)
    out = expand_directory(settings.data.shards)  # it is prepared first, and so no address
    slurm.require("sbatch", "srun", "scontrol")
    check(settings, cluster, run)
    refuse_busy(run)
    made: list[Submission] = []
    try:
        made.append(submit_stage(run, preparation(sources, out, tasks), cluster))
        made.append(
            submit_training(config, overrides, cluster, run, max_steps=max_steps, after=made[-1].job, alone=False)
        )
        made.append(submit_stage(run, report_of(run, made[-1].job), cluster))
    except BaseException:  # Ctrl-C included
        for each in made:
            with suppress(GanDistError):
                slurm.run("scancel", each.job)
        raise
    return made


def refuse_busy(run: Path) -> None:
    """Raises UserError when a job of the run is in the queue: two would write the same files."""
    view = slurm.look(jobs_of(run))
    if busy := view.lines:
        ending = f"python -m launch stop {shlex.quote(str(run))}"
        raise UserError(f"{run} has job {busy[0].job} already ({busy[0]}); wait for it, or end it: {ending}")
    for job in view.hidden:
        if not has_ended(run, job.id):
            raise UserError(
                f"{run} has job {job.id} of {job.user}, which SLURM shows to its owner only (PrivateData): ask "
                f"{job.user} whether it has ended, or start a run of your own with --name and --from"
            )


@contextmanager
def new_submission(run: Path, job: JobOptions, like: Path | None = None) -> Iterator[Path]:
    """Yields the directory of a new submission with the snapshot in it; removes it when the submission fails.

    The snapshot copies nothing of `job.runs`. `like` is another run's submission: it gives the name, if that is free
    here, and the snapshot as links to the same files.
    """
    refuse_patterns(run)
    folder = run / "launch" / (like.name if like and not (run / "launch" / like.name).exists() else new_id())
    try:
        folder.mkdir(parents=True)
        (run / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the run directory {run}: {error.strerror}") from None
    try:
        if like:
            snapshot.link(like, folder)
        else:
            snapshot.take(snapshot.CHECKOUT, folder, [run, runs_home(job.runs)], job.unpack)
        yield folder
    except BaseException as error:
        for made in submissions(run):  # interrupted just after it was queued
            if made.id == folder.name:
                with suppress(GanDistError):
                    slurm.run("scancel", made.job)
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (folder.parent, run / "logs", run):
            try:
                empty.rmdir()
            except OSError:
                break
        if isinstance(error, OSError):
            where = error.filename2 or error.filename or run
            raise GanDistError(
                f"cannot write the submission: {error.strerror or error} ({where}); nothing is queued; "
                "free some space, or put runs elsewhere (job.runs)"
            ) from None
        raise


def enqueue(
    run: Path, folder: Path, kind: str, text: str, words: Sequence[str], ranks: int, after: str | None = None
) -> Submission:
    """Returns the submission of the batch script `text`: both queued and recorded in its directory, or neither."""
    commit = snapshot.commit_in(folder)
    write_atomically(folder / "submission.sh", text.encode())
    made: list[Submission] = []

    def note(job: slurm.Job) -> None:
        made.append(record(folder, kind, job, job.id, commit, words, ranks, after))

    slurm.submit(text, note, [each.job for each in submissions(run)])
    return made[-1]


def record(
    folder: Path,
    kind: str,
    job: slurm.Job,
    number: str,
    commit: str | None,
    words: Sequence[str],
    ranks: int,
    after: str | None = None,
) -> Submission:
    """Returns the submission of a queued job, or of its element `number`, once it is recorded in `folder`."""
    fields = (folder.name, kind, number, time.time(), commit, tuple(words), ranks, after)
    made = Submission(*fields, job.cluster, job.name, job.directory, job.submitted, job.user)
    write_atomically(folder / "job.json", (json.dumps(asdict(made), indent=2) + "\n").encode())
    return made


def jobs_of(run: Path) -> list[slurm.Job]:
    """Returns the jobs of a run as SLURM is to be asked for them, oldest first."""
    jobs = []
    for each in submissions(run):
        folder = run / "launch" / each.id
        user = each.user or slurm.user_name((folder / "job.json").stat().st_uid)
        began = (folder / "attempts").is_dir()
        identity = (each.job, each.cluster, each.name, each.directory, each.submitted, user)
        jobs.append(slurm.Job(*identity, time=each.time, began=began))
    return jobs


def has_ended(run: Path, job: str) -> bool:
    """Returns whether a job has written down that it ended, for all of its elements that began."""
    histories = [
        folder / "history" for each in submissions(run) if each.job == job for folder in attempts_of_job(run, each.id)
    ]
    last = [file.read_text(errors="replace").splitlines()[-1:] for file in histories if file.exists()]
    ended = [line[0].split("\t")[1:2] for line in last if line]
    return bool(histories) and len(ended) == len(histories) and all(cell and cell[0] in FINAL for cell in ended)


def attempts_of_job(run: Path, submission: str) -> list[Path]:
    """Returns the directories of a submission's job, or of the elements of its array."""
    return [folder for folder in (run / "launch" / submission / "attempts").glob("*") if folder.is_dir()]


def submissions(run: Path) -> list[Submission]:
    """Returns the submissions of a run, oldest first, without those that cannot be read."""
    made = []
    for file in (run / "launch").glob("*/job.json"):
        try:
            made.append(Submission(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(made, key=lambda each: (each.time, each.id))  # ids have seconds only, too coarse for a pipeline
