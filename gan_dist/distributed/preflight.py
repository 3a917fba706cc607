"""Checks before a run that would otherwise fail hours later; each names the rank and host at fault."""

from __future__ import annotations

import hashlib
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gan_dist.distributed.world import World
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.system import own_files

CLOCK_S = 30.0
"""Clocks further apart than this make files of one run look older than those before them."""


@cache
def sources() -> str:
    """Returns a short hash of the code of gan_dist that this process runs."""
    digest = hashlib.sha256()
    for name, content in sorted(_modules(own_files())):
        digest.update(f"{name}\n".encode() + content)
    return digest.hexdigest()[:12]


def _modules(folder: Path, within: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _modules(entry, f"{within}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield within + entry.name, entry.read_bytes()


def preflight(world: World, dataset: str, task: Mapping[str, Any]) -> list[str]:
    """Returns warnings after checking that all ranks do the same with the same software, and can reduce.

    `dataset` is the manifest's hash as this rank read it; `task` what it was asked to do, as plain {name: value}.
    A collective: every rank must call it.
    Raises UserError, on every rank alike, naming the ranks and hosts that differ from the others; GanDistError when
    the first reduction gives the wrong sum.
    """
    facts = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "gan_dist (hash of its code)": sources(),
        "dataset (hash of its manifest)": dataset[:12],
        **{name: str(value) for name, value in task.items()},
    }
    world.barrier()
    answers = world.gather_objects((world.host, time.time(), facts))
    hosts = [host for host, _, _ in answers]
    for name in facts:
        _assert_ranks_agree(name, hosts, [theirs.get(name, "nothing") for _, _, theirs in answers])
    total = int(world.all_reduce(torch.full((), world.rank + 1.0, device=world.device)).item())
    if total != world.size * (world.size + 1) // 2:
        raise GanDistError(
            f"rank {world.rank} on {world.host}: the first all-reduce over {world.size} ranks gave {total}, expected "
            f"{world.size * (world.size + 1) // 2}; check dist.backend and the network"
        )
    clocks = sorted(seconds for _, seconds, _ in answers)
    middle = clocks[len(clocks) // 2]
    return [
        f"the clock of {host} is {seconds - middle:+.0f} s from the others'; times in the run's history will jump"
        for host, seconds in {host: seconds for host, seconds, _ in answers}.items()
        if abs(seconds - middle) > CLOCK_S
    ]


def _assert_ranks_agree(name: str, hosts: list[str], values: list[str]) -> None:
    """Raises UserError that names the ranks whose value is not the one that most have (rank 0's, where it ties)."""
    common, count = Counter(values).most_common(1)[0]
    if count == len(values):
        return
    odd = [f"rank {rank} on {hosts[rank]} has {value}" for rank, value in enumerate(values) if value != common]
    raise UserError(
        f"{name} is not the same on all ranks: {'; '.join(odd[:4])}; the others have {common}; "
        "start all ranks from one environment, with one dataset and the same words"
    )
