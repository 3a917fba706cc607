"""The same job on this box: torchrun starts the ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.job.rank import ATTEMPT
from launch.job.torchrun import run_torchrun, verdict
from launch.snapshot import CHECKOUT


def train_here(config: str, overrides: Sequence[str], run: Path, ranks: int | None, more: Sequence[str]) -> int:
    """Returns the exit status of training here: 0 done, 75 stopped with a checkpoint, or the failing rank's."""
    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="gan-dist-") as attempt:
        os.environ[ATTEMPT] = attempt
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = ["train", config, *overrides, "--run-dir", str(run), *more]
        status = run_torchrun(["--standalone", f"--nproc-per-node={ranks}"], words)
        return verdict(Path(attempt), status)
