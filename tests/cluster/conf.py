"""The text of slurm.conf, cgroup.conf and hosts files, made by pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """What a cluster looks like: who is where, and the settings that tests vary."""

    directory: Path
    """Sockets, logs, spools and state of all daemons."""
    head: str
    """Address of the controller."""
    hosts: Mapping[str, str]
    """Address of each compute host by name."""
    port: int
    """Where the controller listens."""
    proctrack: str = "linuxproc"
    """linuxproc or cgroup: how SLURM finds the processes of a step, and so who gets its signals."""
    cpus: int = 4
    """Processors that each host claims to have; all of them are this machine's."""
    user_signal: bool = False
    """Whether preemption first sends the signal a job asked for (preempt_send_user_signal) instead of CONT and TERM."""
    kill_wait_s: int = 12
    """Seconds between TERM and KILL when a job is cancelled or its time is over."""
    name: str = "gan-dist-test"
    """The cluster's own name."""
    task_plugin: str = "none"
    """none, or affinity: whether tasks are bound to their processors."""
    gres: str = ""
    """What each host has beside processors (gpu:a100-sxm4-80gb:2); names for SLURM, not devices."""
    private_data: str = ""
    """What users see of themselves only (jobs)."""
    lost_after_s: int = 10
    """Seconds without an answer after which a host counts as down."""
    message_timeout_s: int = 10
    """Seconds that daemons wait for an answer. To end a step may take longer, and then SLURM asks again a minute later:
    here the job may have been requeued by then, and the new start's step has the same name. (Elsewhere a requeued job
    waits for two minutes.)"""
    grace_s: int = 25
    """Seconds that a preempted job keeps before it is killed."""
    preempt_mode: str = "REQUEUE"
    """What becomes of a preempted job: REQUEUE or CANCEL."""


def slurm_conf(layout: Layout) -> str:
    """Returns slurm.conf: no accounting, requeueing by default, short waits, and two partitions that preempt a third.

    A requeued job becomes eligible one second after the credential of its last start has expired: 120 s by default,
    the least that SLURM takes, 5 s, here.
    """
    at = layout.directory
    options = ["SlurmctldParameters=preempt_send_user_signal"] if layout.user_signal else []
    names = ",".join(layout.hosts)
    nodes = [
        f"NodeName={name} NodeAddr={address} CPUs={layout.cpus} Sockets=1 CoresPerSocket={layout.cpus} "
        f"ThreadsPerCore=1 RealMemory=4000 {f'Gres={layout.gres} ' if layout.gres else ''}State=UNKNOWN"
        for name, address in layout.hosts.items()
    ]
    lines = [
        f"ClusterName={layout.name}",
        *([f"PrivateData={layout.private_data}"] if layout.private_data else []),
        *(["GresTypes=gpu"] if layout.gres else []),
        f"SlurmctldHost=head({layout.head})",
        f"SlurmctldPort={layout.port}",
        "SlurmdPort=6818",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={at}/munge.socket,cred_expire=5",
        f"StateSaveLocation={at}/state",
        f"SlurmctldPidFile={at}/slurmctld.pid",
        f"SlurmctldLogFile={at}/slurmctld.log",
        f"SlurmdSpoolDir={at}/spool-%n",
        f"SlurmdPidFile={at}/slurmd-%n.pid",
        f"SlurmdLogFile={at}/slurmd-%n.log",
        "SlurmdParameters=config_overrides",  # a host may claim more processors than this machine has
        f"ProctrackType=proctrack/{layout.proctrack}",
        f"TaskPlugin=task/{layout.task_plugin}",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "JobCompType=jobcomp/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=3,sched_min_interval=500000,batch_sched_delay=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "EnforcePartLimits=ALL",
        "JobRequeue=1",
        "ReturnToService=2",
        f"SlurmdTimeout={layout.lost_after_s}",
        *options,
        "SlurmctldTimeout=30",
        f"MessageTimeout={layout.message_timeout_s}",
        "TCPTimeout=2",
        "InactiveLimit=0",
        "MinJobAge=1800",
        f"KillWait={layout.kill_wait_s}",
        "UnkillableStepTimeout=120",
        *nodes,
        f"PartitionName=main Nodes={names} Default=YES MaxTime=60 PriorityTier=5 PreemptMode=off State=UP",
        f"PartitionName=low Nodes={names} MaxTime=60 PriorityTier=1 GraceTime={layout.grace_s} "
        f"PreemptMode={layout.preempt_mode} State=UP",
        f"PartitionName=high Nodes={names} MaxTime=60 PriorityTier=9 PreemptMode=off State=UP",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(layout: Layout) -> str:
    """Returns gres.conf: so many of a type, for each of which a device must be named that is there."""
    devices = iter(("/dev/null", "/dev/zero", "/dev/full", "/dev/random"))
    entries = [entry.rsplit(":", 2) for entry in layout.gres.split(",") if entry]
    return "".join(
        f"Name={name} Type={kind} File={next(devices)}\n" for name, kind, count in entries for _ in range(int(count))
    )


def cgroup_conf(layout: Layout) -> str:
    """Returns cgroup.conf for a v1 hierarchy that each host mounts: processes are tracked, nothing is limited.

    The kernel has it beside a unified hierarchy as well, so it matters little which of the two this machine uses.
    """
    lines = (
        "CgroupPlugin=cgroup/v1",
        f"CgroupMountpoint={layout.directory}/cgroup",
        "CgroupAutomount=no",
        "ConstrainCores=no",
        "ConstrainDevices=no",
        "ConstrainRAMSpace=no",
    )
    return "\n".join(lines) + "\n"


def hosts_file(layout: Layout) -> str:
    """Returns /etc/hosts as every host of the cluster sees it."""
    names = {"localhost": "127.0.0.1", "head": layout.head, **layout.hosts}
    return "".join(f"{address} {name}\n" for name, address in names.items())
