"""Real ranks for tests: processes with the environment that torchrun would give them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping

from torch.multiprocessing.spawn import start_processes


def free_port() -> int:
    """Returns a TCP port that was free a moment ago on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(size: int, work: Callable[..., None], *args: object) -> None:
    """Runs `work(rank, *args)` in `size` processes and returns when all are done.

    `work` must be importable. Raises what the first failing rank raised, with its traceback. Each rank is forked from
    one server that has imported torch and does nothing else: they start at once, and none sees another's state.
    """
    multiprocessing.set_forkserver_preload(["gan_dist.training.trainer", "torch._dynamo", "pytest"])
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start_processes(_enter, (work, args, environment), size, start_method="forkserver")  # type: ignore[no-untyped-call]


def _enter(rank: int, work: Callable[..., None], args: tuple[object, ...], environment: Mapping[str, str]) -> None:
    os.environ.clear()  # the server's, as it was when the first ranks were started
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    work(rank, *args)
