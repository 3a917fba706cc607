"""A run's directory: where it lies, what stands in it, and whether a configuration may continue it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan_dist.config.diff import changes, continuation, flatten, with_defaults
from gan_dist.data.classes import NO_CLASSES, Classes
from gan_dist.model.growth import misfit
from gan_dist.runs.checkpoint import Loaded, find, load_newest
from gan_dist.runs.naming import run_and_step
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import write_atomically

LAUNCHER = ("launch", "logs", "stop", "hang", "events.out.tfevents.")
"""What a launcher, a sweep, or ranks that missed one another may leave in a run's directory before the run begins."""


@dataclass(frozen=True)
class Start:
    """Where a run starts: from nothing, from its own newest checkpoint, or from a parent run's."""

    loaded: Loaded | None = None
    parent: str | None = None
    """`RUN@STEP` this run was started from with --from, now or when it began."""
    grown_from: int | None = None
    """The pixels a side of the parent, where this run's images are larger."""
    fresh: bool = True
    """Whether counting begins at step 0: no checkpoint of its own is there yet."""
    notes: tuple[str, ...] = ()
    """Lines for the console: checkpoints passed over, keys that changed."""


def prepare_start(
    run_dir: Path,
    config: Mapping[str, Any],
    dataset: str,
    *,
    classes: Classes = NO_CLASSES,
    from_run: str | None = None,
    command: Sequence[str] = (),
) -> Start:
    """Returns where the run in `run_dir` starts, after checking that `config` continues the game that is stored there.

    `dataset` is the manifest's hash; `classes`: those of the game; `command` the words that started this, used to print
    the one that would start a new run. Writes nothing. Raises UserError with the keys and both values when the stored
    game is another one.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; expected a run directory, or nothing there yet")
    if (
        run_dir.is_dir()
        and any(not path.name.startswith((".", "lease", *LAUNCHER)) for path in run_dir.iterdir())
        and not (run_dir / "config.yaml").is_file()
    ):
        raise UserError(f"{run_dir} is not empty and holds no run (no config.yaml); choose another --run-dir or --name")
    loaded = load_newest(run_dir / "checkpoints")
    notes: list[str] = []
    if loaded is None:
        if from_run is None:
            return Start()
        parent = find_parent(from_run, config, classes)
        before = _model_of(parent.state["config"])["resolution"]
        grown_from = before if before != config["model"]["resolution"] else None
        return Start(parent, _parent_name(parent), grown_from, True, parent.skipped)
    recorded = loaded.manifest.get("parent")
    if from_run is not None and recorded != (wanted := _parent_name(find_parent(from_run, config, classes))):
        raise UserError(
            f"{run_dir} already holds a run that started from {recorded or 'nothing'}, not from {wanted}; "
            f"choose another name for the new one: {_new_run(run_dir, command)}"
        )
    notes += [f"passed over {line}" for line in loaded.skipped]
    if (stored_set := loaded.manifest.get("dataset")) not in (None, dataset):
        raise UserError(
            f"{run_dir} was trained on the dataset with manifest {str(stored_set)[:12]}, but "
            f"{config['data']['shards']} has {dataset[:12]}; name the same dataset, or start a new run: "
            f"{_new_run(run_dir, command)}"
        )
    refused, changed = continuation(loaded.state["config"], config)
    if refused:
        raise UserError(
            f"{run_dir} holds a run with another configuration ({'; '.join(refused)}); "
            f"to start it as a new run: {_new_run(run_dir, command)}"
        )
    if unlike := Classes.of_state(loaded.state).unlike(classes):
        raise UserError(
            f"{run_dir} holds a run with other classes: {unlike}; start a new run: {_new_run(run_dir, command)}"
        )
    return Start(loaded, recorded, loaded.manifest.get("grown_from"), False, (*notes, *changed))


def _parent_name(parent: Loaded) -> str:
    return f"{parent.path.parent.parent}@{parent.step}"


def find_parent(from_run: str, config: Mapping[str, Any], classes: Classes = NO_CLASSES) -> Loaded:
    """Returns the checkpoint that `RUN[@STEP]` names, whose networks must have the shapes that `config` asks for or be
    able to grow to them, and these `classes`."""
    parent = find(*run_and_step(from_run))
    if why := misfit(_model_of(parent.state["config"]), _model_of(config)):
        raise UserError(f"--from {from_run}: {why}")
    if unlike := Classes.of_state(parent.state).unlike(classes):
        raise UserError(f"--from {from_run}: {unlike}; the classes must be the same, name for name")
    return parent


def _model_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all keys of a configuration's section `model`, with the defaults of those it does not have."""
    section = "model."
    return {key[len(section) :]: value for key, value in with_defaults(config).items() if key.startswith(section)}


def _new_run(run_dir: Path, command: Sequence[str]) -> str:
    """Returns the command that starts the refused configuration under the first free name."""
    number = next(n for n in range(2, 10**6) if not run_dir.with_name(f"{run_dir.name}-{n}").exists())
    words = list(command) or ["gan-dist", "train", "CONFIG"]
    return f"{shlex.join(words)} --run-dir {shlex.quote(str(run_dir.with_name(f'{run_dir.name}-{number}')))}"


def write_start(run_dir: Path, config_yaml: str, facts: Mapping[str, Any]) -> None:
    """Makes the run directory and writes its config.yaml and environment.json, each whole or not at all.

    Raises UserError when the directory cannot be made or written.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / "samples").mkdir(exist_ok=True)
        write_atomically(run_dir / "config.yaml", config_yaml.encode())
        write_atomically(run_dir / "environment.json", (json.dumps(facts, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write the run directory {run_dir}: {error.strerror}") from None


def changes_of_bits(run_dir: Path, facts: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of the `facts`, as environment.json has them, that may change rounding and differs from
    the run's last start: what settings resolved to (threads, precision, ...), this code, torch, CUDA and the device."""
    try:
        stored = json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError):
        return []
    before = stored.get("resolved", {})
    lines = [
        f"{key} resolved to {old} before and to {new} now: the same game, though not the same bits"
        for key, (old, new) in changes(before, flatten(facts["resolved"])).items()
        if key in before
    ]
    return lines + [
        f"{key} was {stored[key]} before and is {facts[key]} now: the same game, though perhaps not the same bits"
        for key in ("gan_dist", "torch", "cuda", "device")
        if stored.get(key) not in (None, facts[key])
    ]
