"""The same job on this box: torchrun starts the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gan_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launch.rank import ATTEMPT
from launch.snapshot import CHECKOUT

SIGNALS = "SIGTERM,SIGINT,SIGUSR2"
"""What torchrun hands on to its workers; without SIGUSR2 in it, that signal kills torchrun and orphans them."""
SHUTDOWN_S = 600
"""Seconds that torchrun leaves its workers to save; its default of 30 kills longer saves."""


def train_here(config: str, overrides: Sequence[str], run: Path, ranks: int | None, more: Sequence[str]) -> int:
    """Returns the exit status of training here: 0 done, 75 stopped with a checkpoint, or the failing rank's."""
    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    torchrun += [f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={SHUTDOWN_S}", "--max-restarts=0"]
    words = ["-m", "launch.rank", "train", config, *overrides, "--run-dir", str(run), *more]
    with tempfile.TemporaryDirectory(prefix="gan-dist-") as attempt:
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {
            **os.environ,
            ATTEMPT: attempt,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        process = subprocess.Popen([*torchrun, *words], env=env)
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda got, frame: process.send_signal(got))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to torchrun as well
        status = process.wait()
        if (Path(attempt) / "done").exists():
            return EXIT_DONE
        if (Path(attempt) / "stopped").exists():
            return EXIT_STOPPED
        told = sorted(file.read_text().split("\t") for file in Path(attempt).glob("failed-*"))
        return int(told[0][1]) if told else status or EXIT_FAILED
