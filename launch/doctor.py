"""`doctor` for a cluster: a short job that examines every requested node and trains ten steps on all of them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from gan_dist.utils.errors import GanDistError
from gan_dist.utils.files import write_atomically
from launch import slurm
from launch.batch_script import Batch, batch_script, interpreter
from launch.job.addresses import expand_hosts, interface_addresses
from launch.options import ClusterOptions
from launch.submit import new_submission

STEPS = 10
CANCEL_S = 20.0
"""Seconds that a cancelled job gets to end before its directory is removed."""


def write_trial(folder: Path, ranks: int, gpus: bool) -> Path:
    """Returns the configuration file of the trial run, after painting a small dataset for it in `folder`."""
    from gan_dist.data.prepare.prepare import prepare
    from gan_dist.data.prepare.synthetic import paint_folder

    paint_folder(folder / "pictures", 40)
    prepare([folder / "pictures"], folder / "shards", resolution=32, shard_samples=16, workers=1)
    values: dict[str, Any] = {
        "data": {"shards": str(folder / "shards")},
        "model": {"resolution": 32, "latent_dim": 16, "g_channels": 8, "d_channels": 8},
        "train": {"global_batch": max(16, 2 * ranks), "epochs": 1000, "device": "cuda" if gpus else "cpu"},
        "log": {"scalars_every": 5, "grid": 4},
        "dist": {"init_timeout_s": 300.0, "timeout_s": 60.0},
    }
    file = folder / "trial.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def trial_script(home: Path, folder: Path, config: Path, cluster: ClusterOptions) -> str:
    """Returns the batch script: gan-dist doctor on each node, then a run of ten steps over all ranks."""
    words = interpreter(cluster, sys.executable)
    examine = shlex.join([*words, "-m", "launch.doctor", str(folder)])
    logs = str(home / "logs").replace("%", "%%") + "/doctor-%N.log"
    each = '--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
    train = ["train", str(config), "--run-dir", str(home / "trial"), "--max-steps", str(STEPS)]
    body = (
        f"gan_dist_preflight {shlex.join(words)}",
        f'echo "$SLURM_JOB_NODELIST" >{shlex.quote(str(folder / "nodes"))}',
        f"srun {each} --kill-on-bad-exit=0 --mpi=none --output={shlex.quote(logs)} {examine}",
        f"gan_dist_srun {shlex.join([*words, '-u', '-m', 'launch.job.rank', *train])}",
        "gan_dist_finish $?",
    )
    quick = cluster.model_copy(update={"job": cluster.job.model_copy(update={"max_requeues": 0})})
    return batch_script(Batch("gan-dist-doctor", home, folder, body), quick)


def run_trial(home: Path, cluster: ClusterOptions, limit_s: float) -> Iterator[str]:
    """Yields lines for the console: the job and its states, then one line for each node, then the speed.

    `home` is a directory that all nodes share; it is removed after a success and after an interruption.

    Raises:
        GanDistError: the trial failed, a node reported nothing, or the job took longer than `limit_s` seconds.
    """
    slurm.require("sbatch", "srun", "scontrol")
    ranks = cluster.slurm.ranks
    with new_submission(home, cluster.job) as folder:
        gpus = bool(cluster.slurm.gpus)
        text = trial_script(home, folder, write_trial(folder, ranks, gpus), cluster)
        write_atomically(folder / "submission.sh", text.encode())
        job = slurm.submit(text)
    try:
        yield f"job {job.id} asks for {cluster.slurm.nodes} node(s), {ranks} rank(s); waiting for it"
        yield from _wait_for_end(job, limit_s)
    except (KeyboardInterrupt, GeneratorExit):
        _abandon(job, home)
        raise
    history = folder / "attempts" / job.id / "history"
    last = history.read_text().splitlines()[-1].split("\t") if history.exists() else []
    lines, silent = _node_lines(home, folder)
    yield from lines
    if not last or last[1] != "done":
        reason = last[3] if last else slurm.final_state(job) or "it left no record"
        raise GanDistError(f"the trial of {STEPS} steps failed: {reason}; logs in {home / 'logs'}")
    points = [json.loads(line) for line in (home / "trial" / "metrics.jsonl").read_text().splitlines()]
    rate = [line["throughput/images_per_second"] for line in points if "throughput/images_per_second" in line][-1]
    yield f"all-reduce and {STEPS} steps over {ranks} rank(s): ok, {rate:,.0f} images/s (tiny networks)"
    if silent:
        raise GanDistError(f"{silent} node(s) reported nothing; logs in {home / 'logs'}")
    shutil.rmtree(home, ignore_errors=True)


def _wait_for_end(job: slurm.Job, limit_s: float) -> Iterator[str]:
    """Yields the job's states until it ends. Cancels it and raises GanDistError after `limit_s` seconds."""
    deadline, shown = time.monotonic() + limit_s, ""
    while queued := slurm.queue([job]):
        if time.monotonic() > deadline:
            slurm.run("scancel", job.id)
            raise GanDistError(
                f"job {job.id} was not done within {limit_s / 60:g} min and is cancelled; it was {queued[0]}"
            )
        if str(queued[0].state) != shown:
            shown = queued[0].state
            yield f"  {queued[0]}"
        time.sleep(1)


def _abandon(job: slurm.Job, home: Path) -> None:
    """Cancels the job, waits for its end and removes its directory."""
    print(f"job {job.id} is cancelled", file=sys.stderr, flush=True)
    slurm.run("scancel", job.id)
    deadline = time.monotonic() + CANCEL_S
    while slurm.queue([job]) and time.monotonic() < deadline:
        time.sleep(0.5)
    shutil.rmtree(home, ignore_errors=True)


def _node_lines(home: Path, folder: Path) -> tuple[list[str], int]:
    """Returns (lines of a table with a row for each node of the job, number of nodes that reported nothing)."""
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("node-*.json"))]
    nodes = folder / "nodes"
    allocated = expand_hosts(nodes.read_text().strip()) if nodes.exists() else ()
    silent = sorted(set(allocated) - {report["host"] for report in reports})
    table = Table.grid(padding=(0, 2, 0, 0))
    for report in reports:
        table.add_row(report["host"], *_summary(report))
    for host in silent:
        log = home / "logs" / f"doctor-{host}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"nothing in {log}")
        table.add_row(host, "problem", f"no report: {last}")
    # A file or a pipe gets whole lines.
    console = Console(width=None if sys.stdout.isatty() else 100_000, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()], len(silent)


def _summary(report: dict[str, Any]) -> tuple[str, str]:
    """Returns (ok, warning or problem, the node's doctor's report: one line, and one more for each finding)."""
    told = [finding for finding in report["findings"] if finding["state"] in ("problem", "warning")]
    told.sort(key=lambda finding: finding["state"])
    lines = [f"{f['topic']}: {f['found']}; {f['advice']}".rstrip("; ") for f in told]
    lines = [f"warning: {line}" if f["state"] == "warning" else line for line, f in zip(lines, told, strict=True)]
    interfaces = [f"{name} {address}" for name, address in report["interfaces"].items() if name != "lo"]
    state = told[0]["state"] if told else "ok"
    return state, "\n".join([", ".join([report["torch"], report["device"], *interfaces]), *lines])


def main() -> None:
    """Writes what this node's doctor finds to node-HOST.json, as one task of the job."""
    import torch

    from gan_dist.doctor import diagnose

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPUs"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    report = {
        "host": host,
        "torch": f"torch {torch.__version__}",
        "device": f"{count} x {device}" if count else device,
        "interfaces": interface_addresses(),
        "findings": [asdict(finding) for finding in diagnose()],
    }
    write_atomically(Path(sys.argv[1]) / f"node-{host}.json", json.dumps(report).encode())


if __name__ == "__main__":
    main()
