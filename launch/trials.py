"""Where a sweep's trials run: on this machine, one process or torchrun each, or on SLURM as jobs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

from gan_dist.runs.lease import Observer
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.utils.errors import EXIT_STOPPED, EXIT_USAGE, GanDistError, UserError
from gan_dist.utils.files import write_atomically
from gan_dist.utils.system import default_workers
from launch import slurm
from launch.job.environment import WORLD
from launch.options import ClusterOptions
from launch.snapshot import ARCHIVE, CHECKOUT, UNPACKED
from launch.status import attempts_of, last_word
from launch.stopping import STOP, stop_run, touch
from launch.submit import Check, jobs_of, submissions, submit_training, unchecked

DEVICES = "launch/devices"
"""The file in a run's directory that names the machine that it was started on, and its GPUs."""


@dataclass(frozen=True)
class Standing:
    """How a trial's run stands: `stopped` as somebody asked, `gone` without a word."""

    state: Literal["running", "done", "stopped", "failed", "gone"]
    reason: str = ""


class Place(Protocol):
    """A place where runs are started, looked at and stopped."""

    poll_s: float
    """Seconds between two looks."""
    patience_s: float
    """Seconds for which a run is to be gone before it is started again."""
    outlives: bool
    """Whether runs go on when the sweep ends."""
    ranks: int
    """Ranks of a run."""

    def start(self, run: Path, config: Path) -> None:
        """Starts a run, or continues it. Raises GanDistError when it cannot be started now."""

    def look(self, runs: Sequence[Path]) -> dict[Path, Standing]:
        """Returns how each run stands."""

    def stop(self, run: Path) -> None:
        """Asks a run to save and end."""


def last_event(run: Path) -> dict[str, object]:
    """Returns the last start, stop or end in a run's history; an empty one before it began."""
    lines = read_metrics(run / "metrics.jsonl")
    return next((line for line in reversed(lines) if line.get("event") in ("start", "stop", "end")), {})


class Here:
    """This machine. Each run is a process of its own session: it survives a sweep that is killed."""

    poll_s, patience_s, outlives = 1.0, 0.0, False

    def __init__(self, parallel: int, ranks: int = 1) -> None:
        self.ranks = ranks
        self._threads = max(1, default_workers() // (parallel * ranks))
        self._devices = _devices()
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._observer = Observer()

    def start(self, run: Path, config: Path) -> None:
        """Starts a run, or continues it."""
        where = ["--run-dir", str(run)]
        if self.ranks == 1:
            words = [sys.executable, "-m", "gan_dist", "train", str(config), *where]
        else:
            words = [sys.executable, "-m", "launch", "local", str(config), *where, "--ranks", str(self.ranks)]
        env = {key: value for key, value in os.environ.items() if not WORLD.fullmatch(key)}
        env["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [env.get("PYTHONPATH")])])
        env.setdefault("OMP_NUM_THREADS", str(self._threads))
        if self._devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._share(run))
        logs = run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        # Named as a job's: `launch logs` finds it.
        log = logs / f"local-{len(list(logs.iterdir()))}-{os.uname().nodename}-0.log"
        with log.open("ab") as output:
            self._children[run] = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _share(self, run: Path) -> list[str]:
        """Returns GPUs for a run, those that the fewest other trials have, and writes them down for other workers."""
        here, taken = os.uname().nodename, list[str]()
        for file in run.parent.glob(f"*/{DEVICES}"):
            other = file.parent.parent
            node, *devices = file.read_text().split() or [""]
            if node == here and other != run and (other in self._children or self._observer.held(other)):
                taken += devices
        share = sorted(self._devices, key=taken.count)[: self.ranks]
        write_atomically(run / DEVICES, " ".join([here, *share]).encode(), make_folder=True)
        return share

    def look(self, runs: Sequence[Path]) -> dict[Path, Standing]:
        """Returns how each run stands: by its process, or by its lease and history if another has started it."""
        return {run: self._look(run) for run in runs}

    def _look(self, run: Path) -> Standing:
        if (child := self._children.get(run)) is not None:
            status = child.poll()
            if status is None:
                return Standing("running")
            del self._children[run]
            if status in (0, EXIT_STOPPED):
                return Standing("done" if status == 0 else "stopped")
            if status > 0 and not (status == EXIT_USAGE and self._observer.held(run)):  # refused: it runs already
                return Standing("failed", _last_line(run))
        if self._observer.held(run):
            return Standing("running")
        ended = {"end": "done", "stop": "stopped"}
        state = ended.get(str(last_event(run).get("event")), "gone")
        return Standing(state, "")  # type: ignore[arg-type]

    def stop(self, run: Path) -> None:
        """Asks a run to save and end."""
        touch(run / STOP)


def _devices() -> list[str]:
    """Returns the GPUs that runs here may have, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _last_line(run: Path) -> str:
    """Returns the last line that a run has printed."""
    logs = sorted((run / "logs").glob("*.log"), key=lambda file: file.stat().st_mtime)
    lines = [line.strip() for file in logs[-1:] for line in file.read_text(errors="replace").splitlines()]
    return next((line.removeprefix("gan-dist: ") for line in reversed(lines) if line), "it printed nothing")


class Jobs:
    """SLURM. Each run is a job, which the cluster requeues as any other; all run the code of the first."""

    poll_s, patience_s, outlives = 3.0, 45.0, True

    def __init__(self, options: ClusterOptions, check: Check = unchecked) -> None:
        slurm.require("sbatch", "srun", "scontrol", "squeue")
        self.ranks = options.slurm.ranks
        self._options, self._check = options, check
        self._silent = False

    def start(self, run: Path, config: Path) -> None:
        """Submits a run. Raises GanDistError when SLURM does not take it now."""
        first, options = _first_submission(run.parent), self._options
        if first:  # its code, in the form in which it is there
            job = options.job.model_copy(update={"unpack": (first / UNPACKED).is_dir()})
            options = options.model_copy(update={"job": job})
        submit_training(str(config), [], options, run, check=self._check, like=first)
        self._check = unchecked

    def look(self, runs: Sequence[Path]) -> dict[Path, Standing]:
        """Returns how each run stands, by one call of squeue and by what its job has written down."""
        try:
            view = slurm.look([job for run in runs for job in jobs_of(run)])
        except GanDistError as error:
            if not self._silent:
                print(f"note: {error}; trials count as running until SLURM answers", file=sys.stderr, flush=True)
            self._silent = True
            return {run: Standing("running") for run in runs}
        self._silent = False
        return {run: self._look(run, view) for run in runs}

    def _look(self, run: Path, view: slurm.View) -> Standing:
        made, jobs = submissions(run), jobs_of(run)
        if any(view.of(job) or job in view.hidden or job in view.elsewhere for job in jobs):
            return Standing("running")
        ending = last_word(attempts_of(run, made[-1])) if made else None
        if ending is not None and ending.outcome in ("done", "failed"):
            return Standing("done" if ending.outcome == "done" else "failed", ending.reason)
        if ending is not None:
            return Standing("stopped", f"{ending.outcome}: {ending.reason}")
        return Standing("done" if last_event(run).get("event") == "end" else "gone")

    def stop(self, run: Path) -> None:
        """Asks a run to save and end; a job that waits is cancelled, or ends once it starts if SLURM is silent now."""
        try:
            stop_run(run)
        except UserError:
            return  # it has just ended
        except GanDistError:
            with suppress(UserError):  # it was never submitted
                touch(run / STOP)


def _first_submission(sweep: Path) -> Path | None:
    """Returns the oldest submission of a sweep that has the code with it."""
    forms = (sweep.glob(f"trial-*/launch/*/{form}") for form in (ARCHIVE, UNPACKED))
    return min((code.parent for code in chain(*forms)), key=lambda at: at.name, default=None)
