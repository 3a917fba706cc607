"""How the ranks of a SLURM step agree on MASTER_ADDR and MASTER_PORT: rank 0 publishes both in a shared directory.

Nothing is guessed. A host name that does not resolve, or a rank that finds no address of rank 0, ends the job with a
line that names it. The loopback address is used only where all ranks are on one host.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import write_atomically

LOWEST_PORT = 10000
SIOCGIFADDR = 0x8915
INTERFACE_KEYS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Task:
    """This process as a task of a SLURM step: its rank, the number of ranks, and their hosts."""

    rank: int
    local_rank: int
    size: int
    hosts: tuple[str, ...]
    job: str
    restart: int
    host: str
    """This machine's name, as SLURM knows it."""


def read_task(env: Mapping[str, str], planned: int | None = None) -> Task:
    """Returns what SLURM's variables say of this process.

    Raises GanDistError when SLURM started another number of ranks than `planned`. A world that is silently too small,
    or one world of size 1 for each rank, is the most common fault of cluster scripts.
    """
    try:
        size, rank = int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"])
        local_rank, job = int(env["SLURM_LOCALID"]), env["SLURM_JOB_ID"]
    except (KeyError, ValueError) as error:
        raise UserError(f"not a task of a SLURM step: {error}; start it with srun, or train with gan-dist") from None
    started = int(env.get("SLURM_STEP_NUM_TASKS") or size)
    if started != size or (planned is not None and planned != size):
        raise GanDistError(
            f"SLURM started {started} rank(s), SLURM_NTASKS says {size}, {planned or size} were planned; check "
            "slurm.nodes and slurm.tasks_per_node, and that nothing in job.env or job.setup sets SLURM_ variables"
        )
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or socket.gethostname())
    host = env.get("SLURMD_NODENAME") or socket.gethostname()
    return Task(rank, local_rank, size, hosts, job, int(env.get("SLURM_RESTART_COUNT") or 0), host)


def expand_hosts(text: str) -> tuple[str, ...]:
    """Returns the names in SLURM's host list: `a,n[01-03,7]` is a, n01, n02, n03, n7."""
    from submitit.slurm.slurm import _parse_node_list  # takes 0.3 s to import, in which no signal would be handled

    return tuple(_parse_node_list(text))


def source_address(host: str) -> str:
    """Returns this machine's own address on the route to `host`. Sends nothing.

    Raises GanDistError when the name does not resolve or there is no route.
    """
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own: str = probe.getsockname()[0]
            return own
    except OSError as error:
        raise GanDistError(
            f"{socket.gethostname()} finds no route to {host}: {error}; ask the administrators, or name the interface "
            "to use in the cluster file (job.env: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from None


def interface_addresses() -> dict[str, str]:
    """Returns {interface: IPv4 address} of this machine."""
    known = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            known[name] = socket.inet_ntoa(answer[20:24])
    return known


def matching_interfaces(wanted: str, names: Iterable[str]) -> list[str]:
    """Returns those of `names` that NCCL_SOCKET_IFNAME=`wanted` selects, the best match first.

    NCCL's syntax: a list of prefixes; after a leading `=`, of whole names; after a leading `^`, of what to exclude.
    """
    excluded, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    words = [word for word in (word.strip().lstrip("^=") for word in wanted.split(",")) if word]
    ordered = sorted(names, key=lambda name: name not in words)  # eth1 before eth10
    if excluded:
        return [name for name in names if not any(_matches(word, name, exact) for word in words)]
    return list(dict.fromkeys(name for word in words for name in ordered if _matches(word, name, exact)))


def _matches(word: str, name: str, exact: bool) -> bool:
    return name == word or (not exact and name.startswith(word))


def choose_address(task: Task, env: Mapping[str, str]) -> tuple[str, str]:
    """Returns (address, interface) for the traffic of this rank: the user's interface, or that of the default route.

    The interface is a whole name, as gloo needs it, even where NCCL was given a prefix or a list.
    """
    known = interface_addresses()
    wanted = next((env[key] for key in INTERFACE_KEYS if env.get(key)), "")
    candidates = matching_interfaces(wanted, known) if wanted else list(known)
    if not candidates:
        raise UserError(f"{task.host} has no interface {wanted}; it has {', '.join(known)}; correct job.env")
    if wanted and not wanted.startswith("^"):
        return known[candidates[0]], candidates[0]
    if len(task.hosts) == 1:
        return "127.0.0.1", "lo"
    other = task.hosts[0] if task.host != task.hosts[0] else task.hosts[1]
    address = source_address(other)
    interface = next((name for name, its_address in known.items() if its_address == address), "")
    if interface and interface not in candidates:
        others = [name for name in candidates if name != "lo"]
        if not others:
            raise UserError(
                f"{task.host} has no interface {wanted} other than lo; it has {', '.join(known)}; correct job.env"
            )
        return known[others[0]], others[0]
    return address, interface


def reserve_port(job: str, restart: int) -> tuple[int, socket.socket]:
    """Returns a free port below the ephemeral range, and a socket that reserves it until it is closed.

    The first port to be tried depends on job and restart: jobs on one host rarely collide, and a restart does not wait
    for the connections of the last start. The socket does not listen; torch's store can still bind the same port.
    """
    try:
        highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        highest = 32768
    span = max(highest - LOWEST_PORT, 1000)
    first = zlib.crc32(f"{job}.{restart}".encode())
    for attempt in range(200):
        port = LOWEST_PORT + (first + 97 * attempt) % span
        reservation = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        try:
            if reservation.family == socket.AF_INET6:
                reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            reservation.bind(("", port))
        except OSError:
            reservation.close()
            continue
        # Set only after binding: our bind was exclusive, and torch's store, which sets it too, can still bind.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return port, reservation
    raise GanDistError(f"{socket.gethostname()}: no free port from {LOWEST_PORT} to {highest} in 200 tries")


def agree_on_master(
    task: Task, attempt: Path, env: Mapping[str, str], limit_s: float
) -> tuple[dict[str, str], list[socket.socket]]:
    """Returns torchrun's environment for this rank (MASTER_ADDR and so on), and the sockets that reserve the port.

    Rank 0 publishes its address and port in `attempt`, the directory of this start of the job; the others wait for it.
    Raises GanDistError when nothing is published within `limit_s` seconds.
    """
    address, interface = choose_address(task, env)
    file = attempt / "rendezvous.json"
    reserved: list[socket.socket] = []
    if task.rank == 0:
        port, reservation = reserve_port(task.job, task.restart)
        reserved.append(reservation)
        write_atomically(
            file, json.dumps({"address": address, "port": port, "host": task.host, "size": task.size}).encode()
        )
        master = {"address": address, "port": port}
    else:
        master = _await_master(file, task, limit_s)
    variables = {
        "RANK": str(task.rank),
        "LOCAL_RANK": str(_device_index(task.local_rank, env)),
        "WORLD_SIZE": str(task.size),
        "MASTER_ADDR": str(master["address"]),
        "MASTER_PORT": str(master["port"]),
    }
    named = env.get("GLOO_SOCKET_IFNAME", "").split(",")
    if interface and not set(named) <= set(interface_addresses()):  # gloo takes whole names only, one or several
        variables["GLOO_SOCKET_IFNAME"] = interface
    return variables, reserved


def _await_master(file: Path, task: Task, limit_s: float) -> dict[str, object]:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if file.parent.is_dir():
            os.listdir(file.parent)  # noqa: PTH208 (makes a network file system look again)
        try:
            master: dict[str, object] = json.loads(file.read_text())
            return master
        except (OSError, ValueError):
            time.sleep(0.1)
    raise GanDistError(
        f"rank {task.rank} on {task.host} found no address of rank 0 on {task.hosts[0]} within {limit_s:g} s: "
        f"no {file}; is the run directory on a file system that all nodes share?"
    )


def _device_index(local_rank: int, env: Mapping[str, str]) -> int:
    """Returns the index of this rank's GPU among the visible ones: 0 where SLURM shows each task only its own."""
    visible = [word for word in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return 0 if len(visible) == 1 else local_rank
