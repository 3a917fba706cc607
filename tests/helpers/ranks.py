"""Real ranks for tests: spawned processes with the environment that torchrun would give them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
from torch.multiprocessing.spawn import spawn


def free_port() -> int:
    """Returns a TCP port that was free a moment ago on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(size: int, work: Callable[..., None], *args: object) -> None:
    """Runs `work(rank, *args)` in `size` processes of one thread each and returns when all are done.

    `work` must be importable. Raises what the first failing rank raised, with its traceback.
    """
    spawn(_enter, args=(size, free_port(), work, args), nprocs=size)  # type: ignore[no-untyped-call]


def _enter(rank: int, size: int, port: int, work: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    work(rank, *args)
