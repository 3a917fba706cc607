"""How long a save keeps other Python threads from running: ours, and torch.save into memory, in turns.

A thread that only counts notes how long it waited for Python's lock while a state of 76 MB is written: time that passed
less the time that it ran or that the system gave its core to others (Linux tells both).
"""

from __future__ import annotations

import hashlib
import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gan_dist.distributed.world import World
from gan_dist.model.networks import Discriminator, Generator
from gan_dist.runs import checkpoint
from gan_dist.training.update import Update

ROUNDS = 7


def waited(work: Callable[[], object]) -> tuple[float, float]:
    """Returns (seconds in all, the longest at a time) that a counting thread waits for the lock during `work`."""
    over, waits = threading.Event(), [0.0]

    def now(file: int) -> tuple[float, float]:
        ran, queued = os.pread(file, 99, 0).split()[:2]
        return time.perf_counter(), (int(ran) + int(queued)) / 1e9

    def count() -> None:
        file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        last = now(file)
        while not over.is_set():
            end = time.perf_counter() + 5e-4
            while time.perf_counter() < end:
                pass
            this = now(file)
            waits.append((this[0] - last[0]) - (this[1] - last[1]))
            last = this
        os.close(file)

    thread = threading.Thread(target=count)
    thread.start()
    time.sleep(0.05)
    waits.clear()
    work()
    found = [wait for wait in waits if wait > 1e-3]
    over.set()
    thread.join()
    return sum(found), max(found, default=0.0)


def main(folder: Path) -> None:
    update = Update(Generator(64, 100, 64), Discriminator(64, 64, 0.2), world=World(), global_batch=8)
    state: dict[str, Any] = {"step": 0, "images_seen": 0, **update.state_dict()}

    def ours() -> None:
        state["step"] += 1
        checkpoint.save(folder, state, {}, keep=1)

    def in_memory() -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        hashlib.sha256(buffer.getbuffer()).hexdigest()
        with (folder / "state.pt").open("wb") as stream:
            stream.write(buffer.getbuffer())
            os.fsync(stream.fileno())

    ways: dict[str, Callable[[], None]] = {"ours": ours, "into memory first": in_memory}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, "nothing for as long")}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for name, way in ways.items():
            found[name].append(waited(way))
        pause = (time.perf_counter() - start) / len(ways)
        found["nothing for as long"].append(waited(lambda pause=pause: time.sleep(pause)))  # type: ignore[misc]
    for name, each in found.items():
        total, longest = (1e3 * statistics.median(column) for column in zip(*each, strict=True))
        print(f"{name}: other threads waited {total:.0f} ms, {longest:.0f} ms at the longest (medians of {ROUNDS})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))
