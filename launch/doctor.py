"""`doctor` for a cluster: a short job that looks at every node asked for, and trains ten steps on all of them."""

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

from gan_dist.utils.errors import GanDistError
from gan_dist.utils.files import publish
from launch import slurm
from launch.batch_script import Batch, batch_script, interpreter
from launch.job.addresses import expand_hosts, interface_addresses
from launch.options import ClusterOptions
from launch.submit import fresh

STEPS = 10
LEAVE_S = 20.0
"""Seconds that a cancelled job gets to end before its directory is removed."""


def trial(folder: Path, ranks: int, gpus: bool) -> Path:
    """Returns the configuration of ten steps on a few painted pictures, which are made in `folder`."""
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


def script(home: Path, folder: Path, config: Path, cluster: ClusterOptions) -> str:
    """Returns the batch script: gan-dist doctor on each node, then the ranks of a run of ten steps."""
    words = interpreter(cluster, sys.executable)
    look = shlex.join([*words, "-m", "launch.doctor", str(folder)])
    logs = str(home / "logs").replace("%", "%%") + "/look-%N.log"
    each = '--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
    train = [
        "-u",
        "-m",
        "launch.job.rank",
        "train",
        str(config),
        "--run-dir",
        str(home / "trial"),
        "--max-steps",
        str(STEPS),
    ]
    body = (
        f"gan_dist_preflight {shlex.quote(words[0])}",
        f'echo "$SLURM_JOB_NODELIST" >{shlex.quote(str(folder / "nodes"))}',
        f"srun {each} --kill-on-bad-exit=0 --mpi=none --output={shlex.quote(logs)} {look}",
        f"gan_dist_srun {shlex.join([*words, *train])}",
        "gan_dist_finish $?",
    )
    quick = cluster.model_copy(update={"job": cluster.job.model_copy(update={"max_crashes": 0, "max_requeues": 0})})
    return batch_script(Batch("gan-dist-doctor", home, folder, folder / "code", body), quick)


def examine(home: Path, cluster: ClusterOptions, limit_s: float) -> Iterator[str]:
    """Yields a line a node, worst news first told by SLURM itself.

    `home` is a directory that all nodes share; it is removed when all is well, and when the job is given up.

    Raises:
        GanDistError: the trial failed, a node said nothing of itself, or the job was not done within `limit_s`.
    """
    slurm.need("sbatch", "srun", "scontrol")
    ranks = cluster.slurm.nodes * cluster.slurm.ranks_per_node
    with fresh(home) as folder:
        gpus = bool(cluster.slurm.gpus_per_node or cluster.slurm.gres)
        text = script(home, folder, trial(folder, ranks, gpus), cluster)
        publish(folder / "submission.sh", text.encode())
        job = slurm.submit(text)
    try:
        yield f"job {job} asks for {cluster.slurm.nodes} node(s), {ranks} rank(s); waiting for it"
        yield from _await_end(job, limit_s)
    except (KeyboardInterrupt, GeneratorExit):
        _give_up(job, home)
        raise
    history = folder / "attempts" / job / "history"
    last = history.read_text().splitlines()[-1].split("\t") if history.exists() else []
    well = bool(last) and last[1] == "done"
    seen, silent = _looks(home, folder)
    yield from seen
    yield from silent
    if not well:
        why = last[3] if last else slurm.ended(job) or "it left no word"
        raise GanDistError(f"the trial of {STEPS} steps failed: {why}; logs in {home / 'logs'}")
    points = [json.loads(line) for line in (home / "trial" / "metrics.jsonl").read_text().splitlines()]
    rate = [line["throughput/images_per_second"] for line in points if "throughput/images_per_second" in line][-1]
    yield f"all-reduce and {STEPS} steps over {ranks} rank(s): well, {rate:,.0f} images/s (tiny networks)"
    if silent:
        raise GanDistError(f"{len(silent)} node(s) said nothing of themselves; logs in {home / 'logs'}")
    shutil.rmtree(home, ignore_errors=True)


def _await_end(job: str, limit_s: float) -> Iterator[str]:
    """Yields what becomes of the job until it ends. Raises GanDistError, after cancelling it, when that takes long."""
    deadline, told = time.monotonic() + limit_s, ""
    while queued := slurm.queue([job]):
        if time.monotonic() > deadline:
            slurm.ask("scancel", job)
            raise GanDistError(
                f"job {job} was not done within {limit_s / 60:g} min and is cancelled; it was {queued[0]}"
            )
        if str(queued[0].state) != told:
            told = queued[0].state
            yield f"  {queued[0]}"
        time.sleep(1)


def _give_up(job: str, home: Path) -> None:
    """Cancels the job of a person who has seen enough, and removes what it was for."""
    print(f"job {job} is cancelled", file=sys.stderr, flush=True)
    slurm.ask("scancel", job)
    deadline = time.monotonic() + LEAVE_S
    while slurm.queue([job]) and time.monotonic() < deadline:
        time.sleep(0.5)
    shutil.rmtree(home, ignore_errors=True)


def _looks(home: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Returns (a line of each node that was looked at, a line of each that the job had and that left no word)."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("node-*.json"))]
    nodes = folder / "nodes"
    asked = expand_hosts(nodes.read_text().strip()) if nodes.exists() else ()
    silent = []
    for host in sorted(set(asked) - {node["host"] for node in found}):
        log = home / "logs" / f"look-{host}.log"
        said = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
        last = next((line for line in reversed(said) if line), f"nothing in {log}")
        silent.append(f"{host:<12} look  no word, {last}")
    return [_line(node) for node in found], silent


def _line(node: dict[str, Any]) -> str:
    """Returns what one node's doctor found, in one line."""
    findings = node["findings"]
    bad = [f"{f['topic']}: {f['found']}; {f['advice']}".rstrip("; ") for f in findings if f["state"] == "problem"]
    net = ", ".join(f"{name} {address}" for name, address in node["interfaces"].items() if name != "lo")
    warned = sum(f["state"] == "warning" for f in findings)
    bad += [f"{warned} warning(s): gan-dist doctor, run there, tells them"] * (warned > 0)
    return f"{node['host']:<12} {'ok' if not bad else 'look':<5} {node['torch']}, {node['device']}, {net}" + "".join(
        f"\n{'':<13}{line}" for line in bad
    )


def main() -> None:
    """Writes down what this node is like, as one task of the job."""
    import torch

    from gan_dist.doctor import diagnose

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPUs"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    told = {
        "host": host,
        "torch": f"torch {torch.__version__}",
        "device": f"{count} x {device}" if count else device,
        "interfaces": interface_addresses(),
        "findings": [asdict(finding) for finding in diagnose()],
    }
    publish(Path(sys.argv[1]) / f"node-{host}.json", json.dumps(told).encode())


if __name__ == "__main__":
    main()
