"""gan_dist as a library: one process, no main module to import again, no signal handlers, no exits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NOTEBOOK = """
import signal, sys
watched = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2")]
before = [signal.getsignal(number) for number in watched]
import gan_dist
account = gan_dist.prepare([sys.argv[1]], "shards", resolution=32, max_reject_fraction=0.5, workers=2)
config = {
    "data": {"shards": "shards"},
    "model": {"resolution": 32, "g_channels": 4, "d_channels": 4},
    "train": {"global_batch": 8},
}
outcome = gan_dist.train(config, run_dir="run", max_steps=2, console=False)
assert gan_dist.open_dataset("shards").num_samples == account.written
assert not gan_dist.load_generator("run").training
assert [signal.getsignal(number) for number in watched] == before
assert gan_dist.train(config, run_dir="run", max_steps=3, console=False).step == 3  # once more, and it continues
print("steps", outcome.step)
"""


def test_a_notebook_prepares_and_trains_in_one_process(paintings: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-", str(paintings)],
        input=NOTEBOOK,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "steps 2\n", "a library that was asked for quiet prints nothing"
