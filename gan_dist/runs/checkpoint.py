"""Checkpoints: complete or invisible, verified before use, and nothing older deleted before something newer is durable.

A checkpoint is a directory `step-00001000` with `state.pt` and a `manifest.json` that holds its sha256. It is written
under a temporary name, flushed to the disk, renamed, and only then named by `latest`.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gan_dist.runs.study import is_sweep, trial_path
from gan_dist.utils.errors import GanDistError, UserError, first_line
from gan_dist.utils.files import fsync_folder, write_atomically, write_durably, write_hashed
from gan_dist.utils.tensors import tensors

FORMAT = 1
PREFIX = "step-"
TEMPORARY = ".saving-"
BEST = "best"
"""The file that names the checkpoint with the best evaluation, as `latest` names the newest."""


def directory_name(step: int) -> str:
    """Returns the directory name of the checkpoint at `step`."""
    return f"{PREFIX}{step:08d}"


def save(
    directory: Path,
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    keep: int,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Returns the published checkpoint of `state` (which names its `step`), then prunes all but the newest `keep`.

    `facts` go into the manifest beside the hash; a true `kept` in them exempts the checkpoint from pruning for good,
    and `best` until another one is the best.
    `guard` is called last before publishing and may raise to forbid it. Raises OSError when the disk refuses; every
    older checkpoint is then as it was.
    """
    final = directory / directory_name(state["step"])
    temporary = directory / f"{TEMPORARY}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        sha256, size = write_hashed(temporary / "state.pt", lambda file: torch.save(dict(state), file))
        manifest = {
            "format": FORMAT,
            "step": state["step"],
            "images_seen": state["images_seen"],
            "files": {"state.pt": {"sha256": sha256, "bytes": size}},
            **facts,
        }
        write_durably(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())
        fsync_folder(temporary)
        guard()
        if final.exists():
            # Only one that was passed over as unsound can stand here: a sound one would have been resumed from.
            final.replace(directory / f"{TEMPORARY}unsound-{uuid.uuid4().hex[:8]}")
        temporary.replace(final)  # visible from here on: who looks for checkpoints looks for this name
        fsync_folder(directory)
        write_atomically(directory / "latest", f"{final.name}\n".encode())
        if facts.get("best"):
            write_atomically(directory / BEST, f"{final.name}\n".encode())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(directory, state["step"], keep)
    return final


def check_disk(directory: Path, state: Mapping[str, Any]) -> None:
    """Raises GanDistError unless `directory` has room for two checkpoints of `state`: the newest and the next."""
    needed = 2 * sum(tensor.numel() * tensor.element_size() for _, tensor in tensors(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise GanDistError(
            f"{directory} has {free / 2**20:,.0f} MiB free, but two checkpoints take {needed / 2**20:,.0f} MiB; "
            "free some space, or choose another --run-dir"
        )


def step_directories(directory: Path) -> list[Path]:
    """Returns the checkpoint directories, newest step first, sound or not."""
    paths = [path for path in directory.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(paths, key=lambda path: int(path.name[len(PREFIX) :]), reverse=True)


def prune(directory: Path, step: int, keep: int) -> None:
    """Deletes interrupted saves, and checkpoints up to `step` that are neither among the newest `keep` nor `kept` nor
    the best.

    Directories of a later step are unsound ones that were passed over; they neither count nor go.
    """
    newest = directory / directory_name(step)
    best = _named(directory, BEST)
    for path in [path for path in step_directories(directory) if path.name <= newest.name][keep:]:
        try:
            marked = json.loads((path / "manifest.json").read_text()).get("kept", False)
        except (OSError, ValueError):
            marked = False
        if not marked and path.name != best:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _named(directory: Path, pointer: str) -> str | None:
    """Returns the name that the file `pointer` holds, or None."""
    try:
        return (directory / pointer).read_text().strip() or None
    except (OSError, ValueError):
        return None


def read_best(directory: Path) -> dict[str, Any] | None:
    """Returns what the best checkpoint in `directory` was marked with (step, swd, protocol), or None."""
    name = _named(directory, BEST)
    try:
        marked = json.loads((directory / name / "manifest.json").read_text()).get("best") if name else None
    except (OSError, ValueError):
        return None
    return marked if isinstance(marked, dict) else None


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: its directory, state and manifest, and a line for each newer one that was passed over."""

    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return int(self.state["step"])


def load(path: Path) -> Loaded:
    """Returns the checkpoint in directory `path` after checking its hash; tensors and plain values only are unpickled.

    Raises GanDistError with one line that says what is wrong with it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        expected = manifest["files"]["state.pt"]
        if manifest["format"] > FORMAT:
            raise GanDistError(f"{path}: format {manifest['format']} is newer than this gan_dist reads ({FORMAT})")
        content = (path / "state.pt").read_bytes()
    except FileNotFoundError as error:
        raise GanDistError(f"{path}: {Path(error.filename).name} is missing") from None
    except OSError as error:
        raise GanDistError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise GanDistError(f"{path}: manifest.json is not a checkpoint's manifest") from None
    if len(content) != expected["bytes"]:
        raise GanDistError(f"{path}: state.pt has {len(content)} bytes, its manifest says {expected['bytes']}")
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise GanDistError(f"{path}: state.pt does not match the sha256 in its manifest")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise GanDistError(f"{path}: state.pt holds more than tensors or is damaged: {first_line(error)}") from None
    if not isinstance(state, dict) or not {"step", "images_seen", "generator"} <= set(state):
        raise GanDistError(f"{path}: state.pt is not a gan_dist state")
    return Loaded(path, state, manifest)


def load_newest(directory: Path) -> Loaded | None:
    """Returns the newest checkpoint that verifies, or None where there is none at all.

    Raises GanDistError when there are checkpoints and none of them is sound: nothing may then be overwritten.
    """
    skipped: list[str] = []
    for path in step_directories(directory):
        try:
            loaded = load(path)
        except GanDistError as error:
            skipped.append(str(error))
            continue
        return Loaded(loaded.path, loaded.state, loaded.manifest, tuple(skipped))
    if skipped:
        raise GanDistError(f"no sound checkpoint in {directory} ({'; '.join(skipped)}); nothing was overwritten")
    return None


def find(run: Path, step: int | None = None) -> Loaded:
    """Returns a run directory's checkpoint at `step`, or its newest sound one.

    Raises UserError when the run, or that step, does not exist; GanDistError when nothing in it is sound.
    """
    if not run.is_dir():
        raise UserError(f"no run at {run}; expected a run directory or a name under $GAN_DIST_RUNS (default ./runs)")
    if is_sweep(run):
        raise UserError(f"{run} is a sweep; name one of its trials, for example {trial_path(run, 0)}")
    directory = run / "checkpoints"
    if step is not None:
        path = directory / directory_name(step)
        if not path.is_dir():
            steps = ", ".join(str(int(p.name[len(PREFIX) :])) for p in step_directories(directory)) or "none"
            raise UserError(f"{run} has no checkpoint of step {step}; it has: {steps}")
        return load(path)
    newest = load_newest(directory)
    if newest is None:
        raise UserError(f"{run} has no checkpoints yet; train it first")
    return newest
