"""torchrun on one machine, or on each node of a job, with signals sent past its agent to the ranks.

torchrun's agent dies on SIGUSR2 and orphans its ranks; when it forwards a signal, it kills ranks that save for longer
than half a minute. So the agent ignores these signals and this process sends them to the ranks itself. They save and
end, and the agent ends after them.

    srun --ntasks-per-node=1 ... python -m launch.job.torchrun RANKS_PER_NODE train CONFIG ... --run-dir DIR
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gan_dist.utils.errors import EXIT_FAILED, EXIT_STOPPED, GanDistError
from launch.job.addresses import Task, agree_on_master, read_task
from launch.job.environment import WORLD
from launch.job.rank import ATTEMPT, MASTER_TIMEOUT_S, note_begun, threads_of_ranks, write_failure
from launch.snapshot import CHECKOUT

FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
VERDICT_S = 60.0
"""Seconds that a node whose torchrun failed waits for files of the other nodes' ranks, which may have saved."""


def run_torchrun(options: Sequence[str], words: Sequence[str], threads: int = 1) -> int:
    """Returns torchrun's exit status after running `launch.job.rank WORDS` under it on this machine."""
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
    # The agent inherits that these are ignored; launch.job.rank installs its own handlers.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in FORWARDED}
    received: set[int] = set()
    command = [sys.executable, "-m", "launch.job.agent", "--max-restarts=0", "--signals-to-handle=SIGHUP"]
    agent = subprocess.Popen([*command, *options, "-m", "launch.job.rank", *words], env=env)

    def forward(number: int, frame: object = None) -> None:
        received.add(number)
        for rank in _children(agent.pid):
            with suppress(ProcessLookupError):
                os.kill(rank, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    try:
        while True:
            try:
                return agent.wait(timeout=2)
            except subprocess.TimeoutExpired:
                for again in tuple(received):  # for ranks that have only just started; the others do not mind
                    forward(again)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def verdict(attempt: Path, status: int, limit_s: float = 0) -> int:
    """Returns the exit status by the files that the ranks wrote: 0, 75, or the first failed rank's; else torchrun's."""
    deadline = time.monotonic() + limit_s
    while True:
        if (attempt / "done").exists():
            return 0
        if (attempt / "stopped").exists():
            return EXIT_STOPPED
        failures = sorted(file.read_text().split("\t") for file in attempt.glob("failed-*"))
        if failures:
            return int(failures[0][1])
        if time.monotonic() >= deadline:
            return status or EXIT_FAILED
        time.sleep(0.2)


def train_here(config: str, overrides: Sequence[str], run: Path, ranks: int | None, more: Sequence[str]) -> int:
    """Returns the exit status of training here: 0 done, 75 stopped with a checkpoint, or the first failed rank's."""
    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    for name in filter(WORLD.fullmatch, list(os.environ)):  # of an outer torchrun, or of the job that this shell is in
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="gan-dist-") as attempt:
        os.environ[ATTEMPT] = attempt
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = ["train", config, *overrides, "--run-dir", str(run), *more]
        status = run_torchrun(["--standalone", f"--nproc-per-node={ranks}"], words)
        return verdict(Path(attempt), status)


def main() -> None:
    """Runs torchrun on this node as one task of a SLURM step; exits with 0 when the run is done or has saved."""
    ranks, *words = sys.argv[1:]
    attempt = Path(os.environ[ATTEMPT])
    task: Task | None = None
    note_begun()
    try:
        task = read_task(os.environ)  # one task a node: its rank is the node's
        variables, reserved = agree_on_master(task, attempt, os.environ, MASTER_TIMEOUT_S)
    except GanDistError as error:
        print(f"gan-dist: {error}", file=sys.stderr, flush=True)
        write_failure(attempt, task, error.exit_status, "error", str(error))
        sys.exit(error.exit_status)
    if "GLOO_SOCKET_IFNAME" in variables:
        os.environ["GLOO_SOCKET_IFNAME"] = variables["GLOO_SOCKET_IFNAME"]
    status = run_torchrun(
        [
            f"--nnodes={task.size}",
            f"--node-rank={task.rank}",
            f"--nproc-per-node={ranks}",
            f"--master-addr={variables['MASTER_ADDR']}",
            f"--master-port={variables['MASTER_PORT']}",
        ],
        words,
        threads_of_ranks(os.environ, int(ranks)),
    )
    for reservation in reserved:
        reservation.close()
    result = verdict(attempt, status, VERDICT_S) if status else 0
    sys.exit(0 if result in (0, EXIT_STOPPED) else result)


if __name__ == "__main__":
    main()
