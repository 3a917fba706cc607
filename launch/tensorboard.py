"""TensorBoard near the runs, and the way to it from a laptop."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from gan_dist.utils.errors import GanDistError, UserError
from launch import slurm
from launch.batch_script import Batch, batch_script, interpreter
from launch.options import ClusterOptions, SlurmOptions
from launch.submit import enqueue, fresh, on_cpus

STARTS_WITHIN_S = 120
INTRODUCTION = "On your laptop, one of:"
WARNING = "TensorBoard asks for no password"
MUCH = "gpu|gres|tres|mem|exclusive|ntasks|nodelist|switches"
"""What sbatch's options are called that ask for more than one processor anywhere."""


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
        INTRODUCTION,
        f"  ssh -N {jump}-L {port}:localhost:{port} {user}@{host}      # then open http://localhost:{port}",
        f"  rsync -avzm {keep} {user}@{door}:{shlex.quote(f'{runs}/')} runs/      # the files instead",
        f"{WARNING}: whoever is logged in to {host} can open port {port} too.",
        *(
            []
            if jump
            else ["On a login node that others share, start it as a job instead: --cluster FILE, or train with rsync."]
        ),
    ]


def serve(runs: Path, port: int | None = None) -> int:
    """Returns TensorBoard's exit status after it has run here, on the loopback address alone, until Ctrl-C."""
    if not port:
        port = free_port()
    else:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does that was there a moment ago
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"--port {port} on {socket.gethostname()}: {error}; leave it out for a free one"
                ) from None
    login = os.environ.get("SLURM_SUBMIT_HOST") if os.environ.get("SLURM_JOB_ID") else None
    print("\n".join(way_in(runs, port, socket.gethostname(), login, getpass.getuser())), flush=True)
    words = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    try:
        return subprocess.run([sys.executable, "-m", "tensorboard.main", *words], check=False).returncode
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        raise GanDistError(f"TensorBoard does not start: {error}") from None


def small(options: SlurmOptions, said: Collection[str] = ()) -> SlurmOptions:
    """Returns what a job of one processor asks for where training asks for `options`.

    The keys `said` (slurm.mem) were meant for this job and stand; of the others, those go that ask for much.
    """
    extra = {key: value for key, value in options.extra.items() if not re.search(MUCH, key)}
    less = {"cpus_per_task": 1, "mem": None, "constraint": None, "extra": extra}
    kept = {key: getattr(options, key) for key in type(options).model_fields if f"slurm.{key}" in said}
    return on_cpus(options).model_copy(update=less | kept)


def as_job(runs: Path, cluster: ClusterOptions, said: Collection[str] = (), port: int | None = None) -> list[str]:
    """Returns the lines to print after TensorBoard was queued as a job of one CPU: the way in, once it has started.

    Raises GanDistError when the job has ended before.
    """
    slurm.need("sbatch", "srun")
    home = runs / ".tensorboard"
    with fresh(home, cluster.job.runs) as folder:
        words = [*interpreter(cluster, sys.executable), "-u", "-m", "launch", "tensorboard", str(runs)]
        words += ["--port", str(port)] if port else []
        body = (f"exec {shlex.join(words)}",)
        batch = Batch("tensorboard", home, folder, folder / "code", body)
        text = batch_script(batch, cluster, small(cluster.slurm, said))
        job = enqueue(home, folder, "tensorboard", text, [str(runs)], 1).job
    log = home / "logs" / f"{job}-batch.log"
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        queued = slurm.queue([job])
        told = log.read_text(errors="replace").splitlines() if log.exists() else []
        if not queued:
            last = next((line for line in reversed(told) if line.strip()), "it said nothing")
            raise GanDistError(f"job {job} has ended ({slurm.ended(job) or 'nobody knows how'}): {last}; see {log}")
        starts = [number for number, line in enumerate(told) if line == INTRODUCTION]
        ends = [number for number, line in enumerate(told) if line.startswith(WARNING)]
        if starts and ends:
            return [f"job {job}; end it with: scancel {job}", *told[starts[-1] : ends[-1] + 1]]
        time.sleep(0.5)
    return [f"job {job} has not started yet; the way to it will stand in {log}"]
