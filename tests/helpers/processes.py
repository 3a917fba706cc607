"""Ranks as real processes that a test can kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.ranks import free_port

LIMIT = 240


class Ranks:
    """The ranks of one attempt at a run, as processes with their output in files."""

    def __init__(self, size: int, config: str, run: Path, *words: str, code: str | None = None) -> None:
        self.logs = [run.parent / f"{run.name}-rank{rank}.log" for rank in range(size)]
        port = str(free_port())
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONFAULTHANDLER": "1"}
            start = ["-c", code] if code and rank == size - 1 else ["-m", "gan_dist"]
            arguments = ["train", config, "--run-dir", str(run), "dist.timeout_s=8", "dist.init_timeout_s=60", *words]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *start, *arguments], env=os.environ | env, stdout=file, stderr=file
                    )
                )

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Returns all exit statuses; fails with every rank's stacks and output when one outlives the limit."""
        deadline = time.monotonic() + limit
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.send_signal(signal.SIGABRT)  # faulthandler prints all stacks
            time.sleep(3)
            told = "\n".join(f"rank {rank}:\n{self.log(rank)}" for rank in range(len(self.logs)))
            raise AssertionError(f"ranks outlived {limit:g} s\n{told}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()


def wait_for_listening(pid: int) -> None:
    """Returns once the process has replaced SIGTERM's default: before that, no program can be asked anything."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)
