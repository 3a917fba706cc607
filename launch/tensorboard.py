"""TensorBoard on the machine that has the runs, and how to reach it from a laptop."""

from __future__ import annotations

import getpass
import os
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
from launch.options import ClusterOptions
from launch.submit import enqueue, jobs_of, new_submission

START_S = 120
INTRODUCTION = "On your laptop, one of:"
WARNING = "TensorBoard asks for no password"


def free_port() -> int:
    """Returns a free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def how_to_reach(runs: Path, port: int, host: str, login: str | None, user: str) -> list[str]:
    """Returns the commands for a laptop, as lines: a tunnel to TensorBoard through `login`, or a copy of its files."""
    jump = f"-J {user}@{login} " if login and login != host else ""
    copy_from = login or host
    keep = "--include='*/' --include='tensorboard/**' --include='samples/**' --include='report.html' --exclude='*'"
    return [
        INTRODUCTION,
        f"  ssh -N {jump}-L {port}:localhost:{port} {user}@{host}      # then open http://localhost:{port}",
        f"  rsync -avzm {keep} {user}@{copy_from}:{shlex.quote(f'{runs}/')} runs/      # or copy its files",
        f"{WARNING}: any user of {host} can open port {port} too.",
        *([] if jump else ["On a shared login node, start it as a job instead (--cluster FILE), or copy the files."]),
    ]


def serve(runs: Path, port: int | None = None) -> int:
    """Returns TensorBoard's exit status after it has run here until Ctrl-C, on the loopback address only."""
    if not port:
        port = free_port()
    else:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was in use a moment ago is free
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"--port {port} on {socket.gethostname()}: {error}; leave it out for a free one"
                ) from None
    login = os.environ.get("SLURM_SUBMIT_HOST") if os.environ.get("SLURM_JOB_ID") else None
    print("\n".join(how_to_reach(runs, port, socket.gethostname(), login, getpass.getuser())), flush=True)
    words = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    try:
        return subprocess.run([sys.executable, "-m", "tensorboard.main", *words], check=False).returncode
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        raise GanDistError(f"cannot start TensorBoard: {error}") from None


def submit_tensorboard(
    runs: Path, cluster: ClusterOptions, explicit: Collection[str] = (), port: int | None = None
) -> list[str]:
    """Returns lines for the console, once TensorBoard runs as a job of one CPU: how to reach it.

    The keys in `explicit` (slurm.mem) were given for this job.
    Raises GanDistError when the job ends at once.
    """
    slurm.require("sbatch", "srun")
    home = runs / ".tensorboard"
    with new_submission(home, cluster.job) as folder:
        words = [*interpreter(cluster, sys.executable), "-u", "-m", "launch", "tensorboard", str(runs)]
        words += ["--port", str(port)] if port else []
        body = (f"exec {shlex.join(words)}",)
        batch = Batch("tensorboard", home, folder, body)
        text = batch_script(batch, cluster, cluster.stage("tensorboard", explicit))
        job = enqueue(home, folder, "tensorboard", text, [str(runs)], 1).job
        (asked,) = [each for each in jobs_of(home) if each.id == job][-1:]
    log = home / "logs" / f"{job}-batch.log"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        queued = slurm.queue([asked])
        printed = log.read_text(errors="replace").splitlines() if log.exists() else []
        if not queued:
            last = next((line for line in reversed(printed) if line.strip()), "it printed nothing")
            raise GanDistError(
                f"job {job} has ended ({slurm.final_state(asked) or 'state unknown'}): {last}; see {log}"
            )
        starts = [number for number, line in enumerate(printed) if line == INTRODUCTION]
        ends = [number for number, line in enumerate(printed) if line.startswith(WARNING)]
        if starts and ends:
            return [f"job {job}; end it with: scancel {job}", *printed[starts[-1] : ends[-1] + 1]]
        time.sleep(0.5)
    return [f"job {job} has not started yet; {log} will say how to reach it"]
