"""A sweep on disk: its study, which Optuna keeps in one journal beside the runs, and how each trial ended.

SWEEP/sweep.yaml  study.journal  workers/ID/lease  stop  best.yaml  report.html  trial-0000/ (a run) ...
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan_dist.config.base import read_yaml
from gan_dist.runs.lease import seems_held
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.utils.errors import GanDistError, UserError, first_line

RECORD, JOURNAL, BEST, STUDY = "sweep.yaml", "study.journal", "best.yaml", "sweep"
OBJECTIVE = "evaluate/swd"
"""What a sweep makes small: a trial's value is the last one that its run logged."""
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}
"""A trial's states: Optuna's words, and ours."""


@dataclass(frozen=True)
class Trial:
    """One trial: a run with settings of its own."""

    number: int
    path: Path
    state: str
    """complete, pruned, failed, or running: not ended yet."""
    value: float | None
    """OBJECTIVE where it ended, or was pruned."""
    settings: dict[str, Any]
    """{"section.key": value} of the keys that are searched."""
    values: dict[int, float]
    """OBJECTIVE of each evaluation, counted from 1."""
    reason: str
    """Why it failed or was pruned."""

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Sweep:
    """A sweep as far as it got."""

    path: Path
    space: dict[str, Any]
    """What SPACE.yaml says, {"section.key": {kind: values}}."""
    config: dict[str, Any]
    """The configuration that trials differ from."""
    total: int
    """Trials that were asked for."""
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The complete trial with the lowest value."""
        return next((trial for trial in self.ranked() if trial.state == "complete"), None)

    def ranked(self) -> list[Trial]:
        """Returns the trials, best first: complete ones by value, then pruned ones, then those without a value."""
        order = {"complete": 0, "pruned": 1}

        def key(trial: Trial) -> tuple[int, float, int]:
            value = trial.value if trial.value is not None else math.inf
            return order.get(trial.state, 2), value, trial.number

        return sorted(self.trials, key=key)

    def account(self) -> str:
        """Returns what became of all trials in a line: `9 of 12 trials ended: 7 complete, 2 pruned; 1 running`."""
        count = Counter(trial.state for trial in self.trials)
        ended = len(self.trials) - count["running"]
        states = ", ".join(f"{count[state]} {state}" for state in ("complete", "pruned", "failed") if count[state])
        running = f"; {count['running']} running" if count["running"] else ""
        return f"{ended} of {max(self.total, len(self.trials))} trials ended{f': {states}' if states else ''}{running}"


def is_sweep(path: Path) -> bool:
    """Returns whether `path` is the directory of a sweep."""
    return (path / RECORD).is_file()


def trial_path(sweep: Path, number: int) -> Path:
    """Returns the run directory of a trial."""
    return sweep / f"trial-{number:04d}"


def workers_of(sweep: Path) -> list[str]:
    """Returns the names of the workers that seem to be alive, sorted."""
    return sorted(path.name for path in (sweep / "workers").glob("*") if seems_held(path))


def load_optuna() -> Any:
    """Returns the package optuna, which says nothing below a warning. Raises UserError where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(
            "a sweep needs Optuna, which is not installed; expected `uv sync --extra sweep`, or pip install 'optuna>=5'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_journal(sweep: Path) -> Any:
    """Returns the Optuna storage in a sweep's directory. Raises UserError without Optuna, GanDistError for a journal
    that cannot be read."""
    optuna = load_optuna()
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    class MendingLock(JournalFileOpenLock):
        """A lock file that O_EXCL makes: safe on NFS from version 3 on, and no matter under which path a host sees it.

        Who is to append first cuts off a last line that a full disk or a lost machine left unfinished.
        """

        def acquire(self) -> bool:
            taken = super().acquire()
            try:
                _cut_unfinished(sweep / JOURNAL)
            except BaseException:
                self.release()
                raise
            return taken

    file = str(sweep / JOURNAL)
    try:
        return JournalStorage(JournalFileBackend(file, lock_obj=MendingLock(file)))
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise GanDistError(f"cannot read {file}: {first_line(error)}") from None
    except optuna.exceptions.OptunaError as error:
        raise GanDistError(f"{file} is no journal of a study: {error}") from None


def _cut_unfinished(journal: Path) -> None:
    """Cuts off a last line without its end: what is appended to one is lost, and nobody could read further."""
    with journal.open("r+b") as stream:
        if not stream.seek(0, os.SEEK_END):
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read() != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


def open_study(sweep: Path) -> Any:
    """Returns the Optuna study of a sweep. Raises UserError where there is none."""
    optuna = load_optuna()
    if not (sweep / JOURNAL).is_file():
        raise UserError(f"{sweep} holds no sweep (no {JOURNAL}); expected a directory that `launch sweep` made")
    try:
        return optuna.load_study(study_name=STUDY, storage=open_journal(sweep))
    except KeyError:
        raise UserError(f"{sweep / JOURNAL} holds no study yet; run the same `launch sweep` again") from None


def read_sweep(sweep: Path) -> Sweep:
    """Returns the sweep in a directory, be it in progress or not. Raises UserError where there is none."""
    record = read_yaml(sweep / RECORD)
    study = open_study(sweep)
    trials = tuple(_trial(sweep, trial) for trial in study.get_trials(deepcopy=False))
    total = int(study.user_attrs.get("trials", len(trials)))
    return Sweep(sweep, dict(record.get("space") or {}), dict(record.get("config") or {}), total, trials)


def _trial(sweep: Path, trial: Any) -> Trial:
    """Returns a trial of Optuna's as one of ours."""
    return Trial(
        number=trial.number,
        path=trial_path(sweep, trial.number),
        state=STATES[trial.state.name],
        value=trial.values[0] if trial.values else None,
        settings=settings_of(trial.params),
        values=dict(sorted(trial.intermediate_values.items())),
        reason=str(trial.user_attrs.get("reason", "")),
    )


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Optuna's parameters as settings: choices, of whatever type, are kept as JSON text there."""
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in params.items()}


def importances(sweep: Path) -> dict[str, float]:
    """Returns {key: its share of what good trials differ in from others}, largest first; {} before there is enough.

    PED-ANOVA (Watanabe et al. 2023), over complete trials.
    """
    optuna, study = load_optuna(), open_study(sweep)
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
        return {}
    found = optuna.importance.get_param_importances(study)
    return {key: float(share) for key, share in found.items() if math.isfinite(share)}


def read_objective(run: Path, every_steps: int) -> tuple[dict[int, float], float | None]:
    """Returns ({number of the evaluation, from 1: OBJECTIVE}, the last one's) as a run has logged them.

    The last one's is None where it was not finite, or there is none.
    """
    values: dict[int, float] = {}
    last: float | None = None
    for line in read_metrics(run / "metrics.jsonl"):
        if OBJECTIVE in line and "step" in line:
            last = line[OBJECTIVE]
            if last is not None:
                values[-(-int(line["step"]) // every_steps)] = last
    return values, last
