"""Where ranks meet: a key-value store of their own, in which no earlier attempt has left anything."""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def meet(rank: int, size: int, timeout_s: float) -> Any:
    """Returns a torch.distributed.Store that exactly the ranks of this attempt share, at MASTER_ADDR and MASTER_PORT.

    torchrun keeps one store alive over its restarts, in which new ranks would find the addresses of dead ones (torch
    2.15: "connectFullMesh failed ... Connection refused"). So every rank says hello under a name that is new each
    time, and rank 0 answers those who live with the name of this attempt. Raises torch.distributed.DistError when not
    all ranks come within `timeout_s` seconds, naming those that are missing.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _meet(rank, size, timeout_s, deadline)
        except dist.DistNetworkError:
            # Another world's store, which its rank 0 was just closing: the next one opens at the same place.
            if rank == 0 or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _meet(rank: int, size: int, timeout_s: float, deadline: float) -> Any:
    limit = timedelta(seconds=timeout_s)
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _await_listener(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), deadline)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
    store.set_timeout(limit)
    mine = uuid.uuid4().hex
    if rank == 0:
        _gather(store, mine, size, deadline)
        attempt = mine
        store.set(f"{attempt}/complete", "")
    else:
        store.set(f"hello/{rank}", mine)
        attempt = store.get(f"attempt-for/{mine}").decode()
        store.set(f"{attempt}/here/{rank}", "")
        store.wait([f"{attempt}/complete"])
    fresh: Any = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    fresh.set_timeout(limit)
    return fresh


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Waits until somebody listens there. torch's own client may wait twice its timeout, and its error is C++'s."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(f"nobody listens there ({error.strerror or error})") from None
        time.sleep(0.1)


def _gather(store: Any, attempt: str, size: int, deadline: float) -> None:
    """Answers every hello with `attempt` until all other ranks are here; a dead rank's hello is answered in vain."""
    missing, answered = set(range(1, size)), set[str]()
    while missing:
        for rank in sorted(missing):
            if store.check([f"{attempt}/here/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]) and (name := store.get(f"hello/{rank}").decode()) not in answered:
                store.set(f"attempt-for/{name}", attempt)
                answered.add(name)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"rank(s) {', '.join(map(str, sorted(missing)))} did not come")
        if missing:
            time.sleep(0.02)
