"""TensorBoard near the runs, and the way to it from a laptop."""

from __future__ import annotations

import getpass
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from gan_dist.errors import GanDistError
from launch import slurm
from launch.options import ClusterOptions
from launch.script import Batch, batch_script, interpreter
from launch.stages import on_cpus
from launch.submit import enqueue, fresh

STARTS_WITHIN_S = 120


def free_port() -> int:
    """Returns a port that is free on this machine's loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def way_in(runs: Path, port: int, host: str, login: str | None, user: str) -> list[str]:
    """Returns the lines that bring TensorBoard, or its files, to a laptop. `login` is the node to jump through."""
    jump = f"-J {user}@{login} " if login and login != host else ""
    door = login or host
    keep = "--include='*/' --include='tensorboard/**' --include='samples/**' --include='report.html' --exclude='*'"
    return [
        "On your laptop, one of:",
        f"  ssh -N {jump}-L {port}:localhost:{port} {user}@{host}      # then open http://localhost:{port}",
        f"  rsync -avzm {keep} {user}@{door}:{shlex.quote(f'{runs}/')} runs/      # the files instead",
        f"TensorBoard asks for no password: whoever is logged in to {host} can open port {port} too.",
        *(
            []
            if jump
            else ["On a login node that others share, start it as a job instead: --cluster FILE, or train with rsync."]
        ),
    ]


def serve(runs: Path, port: int | None = None) -> int:
    """Returns TensorBoard's exit status after it has run here, on the loopback address alone, until Ctrl-C."""
    port = port or free_port()
    login = os.environ.get("SLURM_SUBMIT_HOST") if os.environ.get("SLURM_JOB_ID") else None
    print("\n".join(way_in(runs, port, socket.gethostname(), login, getpass.getuser())), flush=True)
    words = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    try:
        return subprocess.run([sys.executable, "-m", "tensorboard.main", *words], check=False).returncode
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        raise GanDistError(f"TensorBoard does not start: {error}") from None


def as_job(runs: Path, cluster: ClusterOptions) -> list[str]:
    """Returns the lines to print after TensorBoard was queued as a job of one CPU: the way in, once it has started."""
    slurm.need("sbatch", "srun")
    home = runs / ".tensorboard"
    with fresh(home, cluster.job.runs) as folder:
        small = on_cpus(cluster.slurm).model_copy(update={"cpus_per_task": 1})
        words = [*interpreter(cluster, sys.executable), "-u", "-m", "launch", "tensorboard", str(runs)]
        body = (f"exec {shlex.join(words)}",)
        text = batch_script(Batch("tensorboard", home, folder, folder / "code", body), cluster, small)
        job = enqueue(home, folder, "tensorboard", text, [str(runs)], 1).job
    log = home / "logs" / f"{job}-batch.log"
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline and slurm.queue([job]):
        told = log.read_text() if log.exists() else ""
        if "TensorBoard asks for no password" in told:
            return [f"job {job}; end it with: scancel {job}", *told.splitlines()[1:]]
        time.sleep(0.5)
    return [f"job {job} has not started yet; the way to it will stand in {log}"]
