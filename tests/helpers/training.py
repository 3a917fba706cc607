"""Small runs: their configuration, their states compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from gan_dist.runs.checkpoint import find

SMALL: dict[str, Any] = {
    "model": {"resolution": 32, "latent_dim": 8, "g_channels": 4, "d_channels": 4},
    "train": {"global_batch": 8, "device": "cpu", "epochs": 100},
    "log": {"scalars_every": 2, "samples_every": 4, "grid": 4},
    "checkpoint": {"every_steps": 3},
}


def small(dataset: Path) -> dict[str, Any]:
    return {**SMALL, "data": {"shards": str(dataset)}}


def flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Returns every tensor in a nested state under its dotted name."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {name: tensor for key, value in items for name, tensor in flat(value, f"{prefix}.{key}").items()}


def final_state(run: Path) -> dict[str, Any]:
    return find(run).state


def assert_identical(a: Path, b: Path) -> None:
    one, other = final_state(a), final_state(b)
    assert (one["step"], one["images_seen"]) == (other["step"], other["images_seen"])
    mine, theirs = flat(one), flat(other)
    assert mine.keys() == theirs.keys() and len(mine) > 40
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def cli(*words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gan_dist", *words],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def config_file(dataset: Path, directory: Path) -> str:
    file = directory / "small.yaml"
    file.write_text(yaml.safe_dump(small(dataset)))
    return str(file)


def wait_for_step(run: Path, step: int, limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and f'"step": {step}' in metrics.read_text():
            return
        if list((run / "checkpoints").glob(f"step-{step:08d}")):
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach step {step}")


def worst_difference(a: Path, b: Path) -> float:
    """Returns the largest difference between two final states' networks, relative to each tensor's largest value."""
    one, other = final_state(a), final_state(b)
    worst = 0.0
    for network in ("generator", "discriminator"):
        for name, tensor in one[network].items():
            scale = tensor.double().abs().max().clamp(min=1e-12)
            worst = max(worst, float((tensor.double() - other[network][name].double()).abs().max() / scale))
    return worst
