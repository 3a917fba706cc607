"""The cluster itself: hosts of their own, failures that look real, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.boot import Cluster, free_networks, wait_until
from tests.cluster.conf import Layout, hosts_file, slurm_conf

LAYOUT = Layout(Path("/c"), "10.0.0.1", {"node1": "10.0.0.11", "node2": "10.0.0.12"}, 21000)


def test_the_configuration_names_every_host_once_and_has_what_was_asked() -> None:
    text = slurm_conf(LAYOUT)
    assert text.count("NodeName=node1 NodeAddr=10.0.0.11") == text.count("NodeName=node2 NodeAddr=10.0.0.12") == 1
    assert "ProctrackType=proctrack/linuxproc" in text and "preempt_send_user_signal" not in text
    keys = [line.split("=")[0] for line in text.splitlines() if not line.startswith(("NodeName", "PartitionName"))]
    assert len(keys) == len(set(keys)) and all("=" in line for line in text.splitlines())
    assert hosts_file(LAYOUT).splitlines()[1:] == ["10.0.0.1 head", "10.0.0.11 node1", "10.0.0.12 node2"]


@pytest.mark.cluster
def test_a_job_runs_on_hosts_of_their_own_and_signals_find_it(either: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "hello.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'echo $(hostname) $(ip -4 -o address show net0); sleep 300'\n")
    words = ("sbatch", "--parsable", "-N2", f"--output={tmp_path}/out", f"--chdir={tmp_path}", str(script))
    job = either.run(*words).stdout.strip()
    out = tmp_path / "out"
    wait_until(lambda: out.exists() and out.read_text().count("\n") == 2, 30, "lines")
    for line in out.read_text().splitlines():
        assert either.hosts[line.split()[0]].address in line
    assert sum(len(host.pids("sleep 300")) for host in either.hosts.values()) >= 2
    either.run("scancel", job)
    either.wait_for_job(job, "CANCELLED")
    wait_until(lambda: not any(host.processes() for host in either.hosts.values()), 30, "empty hosts")


@pytest.mark.cluster
def test_a_cluster_leaves_nothing_behind_and_hosts_come_back(cgroup: Cluster) -> None:
    with Cluster(3, cgroup.proctrack) as cluster:
        cluster.hosts["node2"].kill()
        cluster.hosts["node3"].stop()
        assert cluster.hosts["node3"].process is None

        def lost() -> bool:
            states = cluster.run("sinfo", "-hN", "-p", "main", "-o", "%N %t").stdout.replace("*", "")
            return "node2 down" in states and "node3 down" in states

        wait_until(lost, 60, "loss")
        assert "Slurmd shutdown completing" in (cluster.directory / "slurmd-node3.log").read_text()
        for name in ("node2", "node3"):
            cluster.hosts[name].boot()
        cluster.wait_for_hosts()
        at, tag = cluster.directory, cluster.tag
        pids = [host.process.pid for host in cluster.hosts.values() if host.process]
    assert not at.exists() and not left_in_the_freezer(tag)
    assert left_in_the_freezer(cgroup.tag)  # one that is up is seen by the same eyes
    assert tag not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert network(cgroup) not in free_networks() and network(cluster) in free_networks()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def network(cluster: Cluster) -> str:
    """Returns what the addresses of a cluster's hosts begin with."""
    return cluster.layout.head.rpartition(".")[0]


def left_in_the_freezer(tag: str) -> str:
    """Returns the names of a cluster's cgroups."""
    look = 'mount -t cgroup -o freezer cgroup /mnt && ls /mnt | grep -e "$1-"'
    words = ["unshare", "--mount", "bash", "-c", look, "look", tag]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


@pytest.mark.cluster
def test_the_program_boots_a_cluster_to_play_with() -> None:
    words = [
        sys.executable,
        "-m",
        "tests.cluster",
        "1",
        "--",
        "srun",
        "--immediate=30",
        "bash",
        "-c",
        "hostname; exit 3",
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=100, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 3 and done.stdout.splitlines()[0].startswith("1 hosts; logs in "), done.stderr
    assert done.stdout.splitlines()[1] == "node1"
    tag = Path(done.stdout.split(";")[1].removeprefix(" logs in ")).name[:7]
    assert tag not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
