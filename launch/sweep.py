"""A sweep: trials of one configuration, chosen by TPE, pruned early, each an ordinary run; workers share one journal.

A worker takes trials, starts their runs, reads evaluate/swd from what they log, and tells the study. What it knows is
all on the disk: the journal, and the runs. So it may be killed at any time. The same command takes up its trials, of
which those that run are only watched; and more workers may run the same command at once, on other machines too. A
trial belongs to the worker that its entry in the journal names, for as long as that one's lease is renewed.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from gan_dist.config.base import read_yaml
from gan_dist.config.diff import continuation, flatten, with_defaults
from gan_dist.config.schema import Config, to_yaml
from gan_dist.runs import study as files
from gan_dist.runs.lease import Lease, Observer
from gan_dist.runs.record import step_of
from gan_dist.runs.study import load_optuna, read_objective, trial_path
from gan_dist.telemetry import hparams
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import write_atomically
from gan_dist.utils.stop import StopRequest
from launch.space import Space, word
from launch.stopping import STOP
from launch.trials import Place, Standing

Pruner = Literal["median", "hyperband", "none"]
MAX_STARTS = 3
"""Starts in a row without a newer checkpoint, after which a trial has failed."""
MAX_FAILURES = 5
"""Trials that fail before any does not, since the command began, after which it gives up: it is not their settings."""
WARM_UP = 2
"""Evaluations before the median prunes; what a GAN draws at first says little."""
RETRY_S = 60.0
"""Seconds until a job that SLURM did not take is submitted again."""


def make_sampler(seed: int, number: int) -> Any:
    """Returns the sampler of one trial: TPE (Bergstra et al. 2011), multivariate, seeded by the trial's number.

    A sweep that was killed and continued draws what it would have drawn, and no two workers draw the same.
    """
    source = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return load_optuna().samplers.TPESampler(multivariate=True, constant_liar=True, seed=source)


def make_pruner(name: str) -> Any:
    """Returns the pruner of that name. Raises UserError for an unknown one."""
    pruners = load_optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_warmup_steps=WARM_UP)
    if name == "hyperband":
        return pruners.HyperbandPruner()
    if name == "none":
        return pruners.NopPruner()
    raise UserError(f"--pruner: expected {', '.join(get_args(Pruner))}, found {name!r}")


def ask(study: Any, space: Space, seed: int) -> Any:
    """Returns a new trial of the study's with a value for each key of the space."""
    study.sampler = make_sampler(seed, len(study.get_trials(deepcopy=False)))
    trial = study.ask()
    space.settings(trial)
    return trial


@contextmanager
def in_one_line(folder: Path, kind: type[GanDistError], then: str = "") -> Iterator[None]:
    """A context in which a disk that refuses raises `kind`, with one line that ends with what happens `then`."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise kind(f"cannot write the sweep's directory {folder}: {where}: {error.strerror or error}{then}") from None


def open_sweep(folder: Path, space: Space, pruner: Any, trials: int, dataset: str = "") -> Any:
    """Returns the study in `folder`, which is made if there is none; `dataset` is the identity of its images, if known.

    Raises UserError where `folder` holds another sweep, where one is being stopped there, or it cannot be written.
    """
    optuna = load_optuna()
    record = {"space": space.to_dict(), "config": space.base.to_dict(), "dataset": dataset}
    if files.is_sweep(folder):
        _refuse_changes(folder, record)
    elif folder.is_dir() and not all(_is_left(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no sweep; choose another --name or --run-dir")
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    if not files.is_sweep(folder):
        write_atomically(folder / files.RECORD, yaml.safe_dump(record, sort_keys=False).encode())
    _forget_stop(folder)
    with turn(folder):
        study = optuna.create_study(
            study_name=files.STUDY, storage=files.open_journal(folder), pruner=pruner, load_if_exists=True
        )
        if study.user_attrs.get("trials") != trials:
            study.set_user_attr("trials", trials)
    return study


def _forget_stop(folder: Path) -> None:
    """Removes the stop file of a sweep whose workers have ended: it was for them, and not for this one.

    Raises UserError while they have not: without the file they would not end.
    """
    if (folder / STOP).exists() and (working := files.workers_of(folder)):
        raise UserError(
            f"{folder} is asked to stop, and {len(working)} worker(s) have not ended yet ({', '.join(working)}); run "
            f"this again once they have, or remove {folder / STOP} to go on beside them"
        )
    (folder / STOP).unlink(missing_ok=True)


def _is_left(name: str) -> bool:
    """Returns whether a directory that has this is free all the same: hidden, or left by a sweep that did not begin."""
    return name.startswith(".") or name == "workers" or (name.startswith(files.RECORD) and name.endswith(".tmp"))


def _refuse_changes(folder: Path, record: dict[str, Any]) -> None:
    """Raises UserError unless the sweep in `folder` may be continued with this space around this configuration."""
    stored = read_yaml(folder / files.RECORD)
    different, _ = continuation(stored.get("config", {}), record["config"])
    before, now = (one.get("space", {}) for one in (stored, yaml.safe_load(yaml.safe_dump(record))))
    different += [
        f"{key} was {before.get(key, 'not searched')}, now {now.get(key, 'not searched')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    # A run may be evaluated otherwise and go on for longer, and its dataset may move; trials must compare.
    configs = [with_defaults(stored.get("config", {})), flatten(record["config"])]
    same = [key for key in configs[1] if key.startswith("evaluate.") or key == "train.epochs"]
    if not (stored.get("dataset") and record["dataset"]):
        same.append("data.shards")
    elif stored["dataset"] != record["dataset"]:
        different.append(f"the dataset was another (manifest {stored['dataset'][:12]}, now {record['dataset'][:12]})")
    told = {line.partition(" was ")[0] for line in different}
    different += [
        f"{key} was {configs[0].get(key)}, now {configs[1].get(key)}"
        for key in same
        if key not in told and configs[0].get(key) != configs[1].get(key)
    ]
    if different:
        raise UserError(
            f"{folder} holds a sweep of something else ({'; '.join(different)}); start a new one with --name"
        )


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """A context in which no other worker takes a trial. A worker that dies in it holds up the others for 30 s."""
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str(folder / "workers"))
    lock.acquire()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # another has taken it for abandoned
            lock.release()


class Worker:
    """One process that takes trials until all have ended."""

    def __init__(
        self,
        folder: Path,
        space: Space,
        place: Place,
        *,
        trials: int = 40,
        parallel: int = 1,
        seed: int = 0,
        pruner: str = "median",
        dataset: str = "",
        log: Callable[[str], None] = print,
    ) -> None:
        """`log` gets a line whenever a trial starts or ends. Raises UserError where `folder` holds something else."""
        self._folder, self._space, self._place = folder, space, place
        self._total, self._parallel, self._seed, self._log = trials, parallel, seed, log
        domains = {each.key: each.domain for each in space}
        self._is_new = not folder.exists()
        with in_one_line(folder, UserError):
            self._study = open_sweep(folder, space, make_pruner(pruner), trials, dataset)
            hparams.write_experiment(folder, domains)
        self._storage = self._study._storage
        self._study_id = self._storage.get_study_id_from_name(files.STUDY)
        self._name = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._observer = Observer()
        self._mine: set[int] = set()
        self._left: set[int] = set()
        """Trials that somebody stopped by hand: this worker leaves them be."""
        self._watched: set[int] = set()
        """Trials whose runs this worker has started, or seen running."""
        self._gone: dict[int, float] = {}
        """Since when the runs of trials are gone."""
        self._not_before = 0.0
        self._stop = StopRequest()
        self._before = {trial.number for trial in self._trials() if trial.state.is_finished()}
        """Trials that had ended when this worker began."""
        self._configs: dict[int, Config] = {}
        self._texts = [key for key, domain in domains.items() if isinstance(domain, list) and not _alike(domain)]

    def work(self, stop: StopRequest) -> bool:
        """Returns whether all trials have ended; False when `stop`, or somebody who stopped a trial, came first.

        Raises GanDistError when the first trials all fail, when none can be started, and when the disk refuses.
        """
        self._stop = stop
        with in_one_line(self._folder, GanDistError, "; what runs goes on, and the same command continues"):
            return self._work()

    def _work(self) -> bool:
        home = self._folder / "workers" / self._name
        home.mkdir()
        lease = Lease.take(home)
        began = True
        try:
            while not self._ended():
                if self._is_to_end():
                    self._wind_up(jobs=(self._folder / STOP).exists())
                    return False
                self._tend_all()
                self._fill()
                if self._left and not self._mine and self._next_is_none():
                    return False
                _pause(self._stop, self._place.poll_s)
            return True
        except GanDistError:
            with suppress(GanDistError):
                self._wind_up(jobs=True)
            began = not self._is_new or any(map(_has_a_past, self._trials()))
            raise
        finally:
            lease.release()
            with suppress(OSError):
                home.rmdir()
            if began or files.workers_of(self._folder):
                self._write_best()
            else:  # the first start was refused: nothing of it is left
                shutil.rmtree(self._folder, ignore_errors=True)

    def _is_to_end(self) -> bool:
        return bool(self._stop) or (self._folder / STOP).exists()

    def _ended(self) -> bool:
        trials = self._trials()
        return len(trials) >= self._total and all(trial.state.is_finished() for trial in trials)

    def _trials(self) -> list[Any]:
        found: list[Any] = self._study.get_trials(deepcopy=False)
        return found

    def _fill(self) -> None:
        """Takes trials up to the number that may run at once."""
        while len(self._mine) < self._parallel and time.monotonic() >= self._not_before and not self._is_to_end():
            number = self._take()
            if number is None:
                return
            self._mine.add(number)
            self._tend_all([number])

    def _take(self) -> int | None:
        """Returns a trial that nobody tends, else a new one, which is this worker's now; None if there is neither."""
        with turn(self._folder):
            trials = self._trials()
            number = next((trial.number for trial in trials if self._is_orphan(trial)), None)
            if number is None:
                if len(trials) >= self._total:
                    return None
                self._refuse_hopeless(trials)
                number = int(ask(self._study, self._space, self._seed).number)
            elif self._read(number).params.keys() != {each.key for each in self._space}:  # killed while it was asked
                self._study.sampler = make_sampler(self._seed, number)
                self._space.settings(load_optuna().trial.Trial(self._study, self._id(number)))
            self._note(number, worker=self._name)
            return number

    def _is_orphan(self, trial: Any) -> bool:
        if trial.state.is_finished() or trial.number in self._mine | self._left:
            return False
        worker = trial.user_attrs.get("worker")
        return not worker or not self._observer.held(self._folder / "workers" / worker)

    def _next_is_none(self) -> bool:
        trials = self._trials()
        others = (trial for trial in trials if trial.number not in self._left)
        return len(trials) >= self._total and all(trial.state.is_finished() for trial in others)

    def _refuse_hopeless(self, trials: list[Any]) -> None:
        ended = [trial for trial in trials if trial.state.is_finished()]
        since = [trial for trial in ended if trial.number not in self._before]
        if len(since) >= MAX_FAILURES and all(trial.state.name == "FAIL" for trial in ended):
            raise GanDistError(
                f"all {len(ended)} trials that ended have failed, the last one because: "
                f"{ended[-1].user_attrs.get('reason')}; see {trial_path(self._folder, ended[-1].number) / 'logs'}"
            )

    def _tend_all(self, numbers: list[int] | None = None) -> None:
        """Looks at this worker's trials, and does what is due for each."""
        numbers = sorted(self._mine) if numbers is None else numbers
        paths = {number: trial_path(self._folder, number) for number in numbers}
        standings = self._place.look(list(paths.values()))
        for number, path in paths.items():
            self._tend(number, path, standings[path])

    def _tend(self, number: int, run: Path, standing: Standing) -> None:
        trial = self._read(number)
        if trial.state.is_finished() or trial.user_attrs.get("worker") != self._name:  # taken for dead meanwhile
            self._mine.discard(number)
            return
        last, news = self._report(number, trial, run)
        pruned = trial.user_attrs.get("pruned")
        if standing.state != "gone":
            self._gone.pop(number, None)
        if standing.state == "running":
            self._watched.add(number)
            if news and not pruned and self._study.pruner.prune(self._study, self._read(number)):
                pruned = f"pruned after evaluation {max(self._read(number).intermediate_values)}"
                self._note(number, pruned=pruned)
            if pruned and not (run / STOP).exists():
                self._place.stop(run)
        elif standing.state == "done" and last is not None:
            self._end(number, run, "COMPLETE", last)
        elif standing.state == "done":
            self._end(number, run, "FAIL", reason="its last evaluation found no finite evaluate/swd")
        elif pruned:
            self._end(number, run, "PRUNED", reason=pruned)
        elif standing.state == "failed":
            self._end(number, run, "FAIL", reason=standing.reason)
        elif standing.state == "stopped" and number in self._watched:
            self._log(f"{run.name} was stopped, not by this sweep; the same command continues it")
            self._left.add(number)
            self._mine.discard(number)
        elif (standing.state == "stopped" or self._is_gone_for_good(number, trial)) and not self._is_to_end():
            self._start(number, run, counts=standing.state == "gone")

    def _is_gone_for_good(self, number: int, trial: Any) -> bool:
        since = self._gone.setdefault(number, time.monotonic())
        return not trial.user_attrs.get("starts") or time.monotonic() - since >= self._place.patience_s

    def _report(self, number: int, trial: Any, run: Path) -> tuple[float | None, bool]:
        """Returns the value of a run's last evaluation, and whether the study was told of new ones."""
        try:
            every = self._config(number).evaluate.every_steps
        except UserError:  # its values do not go together: _start says so
            return None, False
        values, last = read_objective(run, every)
        news = [step for step in values if step not in trial.intermediate_values]
        for step in news:
            self._storage.set_trial_intermediate_value(self._id(number), step, values[step])
        return last, bool(news)

    def _start(self, number: int, run: Path, counts: bool) -> None:
        """Starts a trial's run, or continues it; `counts` unless somebody had stopped it."""
        trial = self._read(number)
        starts, saved = trial.user_attrs.get("starts", 0), trial.user_attrs.get("saved", -1)
        newest = max((step_of(folder) for folder in (run / "checkpoints").glob("step-*")), default=-1)
        again = 1 if newest > saved else starts + counts
        if again > MAX_STARTS:
            reason = f"{MAX_STARTS} starts in a row ended without a newer checkpoint: see {run / 'logs'}"
            self._end(number, run, "FAIL", reason=reason)
            return
        try:
            config = self._config(number)
        except UserError as error:
            self._end(number, run, "FAIL", reason=str(error))
            return
        file = run / "launch" / "config.yaml"
        write_atomically(file, to_yaml(config).encode(), make_folder=True)
        hparams.begin_session(run, files.settings_of(trial.params), self._texts)
        (run / STOP).unlink(missing_ok=True)
        self._note(number, starts=max(again, 1), saved=newest)
        try:
            self._place.start(run, file)
        except GanDistError as error:
            self._note(number, starts=starts, saved=saved)
            if not self._watched:  # none was ever started: it is not the weather
                raise
            self._log(f"{run.name} cannot be started now: {error}; it is tried again in a minute")
            self._not_before = time.monotonic() + RETRY_S
            self._mine.discard(number)
            self._note(number, worker="")
            return
        self._watched.add(number)
        self._gone.pop(number, None)
        words = " ".join(word(key, value) for key, value in files.settings_of(trial.params).items())
        self._log(f"{run.name} {'starts' if newest < 0 else f'continues at step {newest}'}: {words}")

    def _end(self, number: int, run: Path, state: str, value: float | None = None, reason: str = "") -> None:
        """Tells the study how a trial has ended."""
        if reason:
            self._note(number, reason=reason)
        self._study.tell(number, value, state=load_optuna().trial.TrialState[state], skip_if_finished=True)
        self._mine.discard(number)
        if state == "PRUNED":
            (run / STOP).unlink(missing_ok=True)
        hparams.end_session(run, state != "FAIL")
        if state == "COMPLETE":
            self._write_best()
        said = f"{files.OBJECTIVE} {value:.4g}" if value is not None else reason
        self._log(f"{run.name} {files.STATES[state]}: {said}")

    def _write_best(self) -> None:
        complete = [trial for trial in self._trials() if trial.state.name == "COMPLETE"]
        best = min(complete, key=lambda trial: trial.value, default=None)
        if best is not None:
            name = trial_path(self._folder, best.number).name
            head = f"# {name} of {self._folder.name}: {files.OBJECTIVE} {best.value:.6g}\n"
            config = self._space.config(files.settings_of(best.params))
            write_atomically(self._folder / files.BEST, (head + to_yaml(config)).encode())

    def _wind_up(self, jobs: bool) -> None:
        """Has the runs of this worker save and end, and waits for them; jobs are asked if `jobs`, never waited for."""
        paths = {number: trial_path(self._folder, number) for number in self._mine}
        if self._place.outlives:
            for path in paths.values() if jobs else ():
                self._place.stop(path)
            return
        for number, standing in self._standings(paths):
            if standing.state == "running":
                self._place.stop(paths[number])
        while self._mine:
            for number, standing in self._standings(paths):
                if standing.state in ("done", "failed"):
                    self._tend(number, paths[number], standing)
                if standing.state != "running":
                    self._mine.discard(number)
            time.sleep(min(self._place.poll_s, 0.2))

    def _standings(self, paths: dict[int, Path]) -> list[tuple[int, Standing]]:
        here = {number: paths[number] for number in sorted(self._mine)}
        found = self._place.look(list(here.values()))
        return [(number, found[path]) for number, path in here.items()]

    def _config(self, number: int) -> Config:
        if number not in self._configs:
            self._configs[number] = self._space.config(files.settings_of(self._read(number).params))
        return self._configs[number]

    def _id(self, number: int) -> int:
        found: int = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return found

    def _read(self, number: int) -> Any:
        return self._storage.get_trial(self._id(number))

    def _note(self, number: int, **attributes: Any) -> None:
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), key, value)


def _has_a_past(trial: Any) -> bool:
    """Returns whether there is anything to tell of a trial: it was started, or has ended without that."""
    return bool(trial.state.is_finished() or trial.user_attrs.get("starts"))


def _alike(values: list[Any]) -> bool:
    """Returns whether choices are all numbers, or all yes or no: TensorBoard shows others as texts."""
    kinds = {type(value) if isinstance(value, bool) else float for value in values}
    return all(isinstance(value, int | float) for value in values) and len(kinds) == 1


def _pause(stop: StopRequest, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not stop and time.monotonic() < limit:
        time.sleep(0.1)
