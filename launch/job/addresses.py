"""How the ranks of a SLURM step find one another: rank 0 reserves a port and publishes it in the shared directory.

Nothing is guessed: a host whose name does not resolve, or a rank that never hears of rank 0, ends the job with a line
that names it. The loopback address is used where all ranks are on one host, and nowhere else.
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
class Place:
    """Where SLURM put this process: its rank, how many there are, and on which hosts."""

    rank: int
    local_rank: int
    size: int
    hosts: tuple[str, ...]
    job: str
    restart: int
    host: str
    """This machine's name, as SLURM knows it."""


def place_of(env: Mapping[str, str], planned: int | None = None) -> Place:
    """Returns this process's place from SLURM's variables.

    Raises GanDistError when SLURM started another number of ranks than `planned`: a world that is silently smaller
    (or as many worlds of one as there are ranks) is the commonest fault of cluster scripts.
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
    return Place(rank, local_rank, size, hosts, job, int(env.get("SLURM_RESTART_COUNT") or 0), host)


def expand_hosts(text: str) -> tuple[str, ...]:
    """Returns the names in SLURM's host list: `a,n[01-03,7]` is a, n01, n02, n03, n7."""
    names: list[str] = []
    depth, word = 0, ""
    for letter in text + ",":
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            names += _expand(word)
            word = ""
        else:
            word += letter
    return tuple(name for name in names if name)


def _expand(word: str) -> Iterable[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        return [word]
    inside, _, tail = rest.partition("]")
    numbers = []
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] if dash else [first]
    return [head + number + after for number in numbers for after in _expand(tail)]


def route_to(host: str) -> str:
    """Returns the address that this machine uses to reach `host`. Sends nothing.

    Raises GanDistError when the name does not resolve or no route leads there.
    """
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own: str = probe.getsockname()[0]
            return own
    except OSError as error:
        raise GanDistError(
            f"{socket.gethostname()} finds no way to {host}: {error}; ask the administrators, or name the interface "
            "to use in the cluster file (job.env: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from None


def addresses() -> dict[str, str]:
    """Returns {interface: IPv4 address} of this machine."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                told = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(told[20:24])
    return found


def matching(wanted: str, names: Iterable[str]) -> list[str]:
    """Returns those of `names` that NCCL_SOCKET_IFNAME=`wanted` means, the best first.

    NCCL's syntax: a list of prefixes, of whole names after a leading `=`; after a leading `^`, all but these.
    """
    excluded, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    words = [word for word in (word.strip().lstrip("^=") for word in wanted.split(",")) if word]
    ordered = sorted(names, key=lambda name: name not in words)  # eth1 is more like eth1 than eth10 is
    if excluded:
        return [name for name in names if not any(_means(word, name, exact) for word in words)]
    return list(dict.fromkeys(name for word in words for name in ordered if _means(word, name, exact)))


def _means(word: str, name: str, exact: bool) -> bool:
    return name == word or (not exact and name.startswith(word))


def choose_address(place: Place, env: Mapping[str, str]) -> tuple[str, str]:
    """Returns (address, interface) by which this rank talks to the others: the user's interface, or the route's.

    The interface is a whole name, as gloo wants it, whatever list or prefix NCCL was given.
    """
    known = addresses()
    wanted = next((env[key] for key in INTERFACE_KEYS if env.get(key)), "")
    fit = matching(wanted, known) if wanted else list(known)
    if not fit:
        raise UserError(f"{place.host} has no interface {wanted}; it has {', '.join(known)}; mend job.env")
    if wanted and not wanted.startswith("^"):
        return known[fit[0]], fit[0]
    if len(place.hosts) == 1:
        return "127.0.0.1", "lo"
    other = place.hosts[0] if place.host != place.hosts[0] else place.hosts[1]
    address = route_to(other)
    interface = next((name for name, theirs in known.items() if theirs == address), "")
    if interface and interface not in fit:
        far = [name for name in fit if name != "lo"]
        if not far:
            raise UserError(
                f"{place.host} has no interface {wanted} beside lo; it has {', '.join(known)}; mend job.env"
            )
        return known[far[0]], far[0]
    return address, interface


def reserve_port(job: str, restart: int) -> tuple[int, socket.socket]:
    """Returns a free port below the ephemeral range, and the socket that keeps it from others until it is closed.

    The first candidate depends on job and restart, so that jobs on one host rarely try the same, and a restart never
    waits for its predecessor's connections. The socket does not listen and lets the store that comes bind beside it.
    """
    try:
        highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        highest = 32768
    span = max(highest - LOWEST_PORT, 1000)
    first = zlib.crc32(f"{job}.{restart}".encode())
    for attempt in range(200):
        port = LOWEST_PORT + (first + 97 * attempt) % span
        held = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        try:
            if held.family == socket.AF_INET6:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            held.bind(("", port))
        except OSError:
            held.close()
            continue
        # Asked for after binding: ours was exclusive, and torch's store, which sets it too, may still come in.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return port, held
    raise GanDistError(f"{socket.gethostname()}: no free port from {LOWEST_PORT} to {highest} in 200 tries")


def meet(
    place: Place, attempt: Path, env: Mapping[str, str], limit_s: float
) -> tuple[dict[str, str], list[socket.socket]]:
    """Returns torchrun's environment for this rank, and the sockets that hold what was reserved for it.

    Rank 0 publishes where it listens in `attempt`, a directory of this start of the job; the others wait for that.
    Raises GanDistError after `limit_s` seconds without a word of rank 0.
    """
    address, interface = choose_address(place, env)
    told = attempt / "rendezvous.json"
    held: list[socket.socket] = []
    if place.rank == 0:
        port, keeper = reserve_port(place.job, place.restart)
        held.append(keeper)
        write_atomically(
            told, json.dumps({"address": address, "port": port, "host": place.host, "size": place.size}).encode()
        )
        where = {"address": address, "port": port}
    else:
        where = _await(told, place, limit_s)
    joined = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(_device_index(place.local_rank, env)),
        "WORLD_SIZE": str(place.size),
        "MASTER_ADDR": str(where["address"]),
        "MASTER_PORT": str(where["port"]),
    }
    named = env.get("GLOO_SOCKET_IFNAME", "").split(",")
    if interface and not set(named) <= set(addresses()):  # gloo takes whole names only, several of them
        joined["GLOO_SOCKET_IFNAME"] = interface
    return joined, held


def _await(told: Path, place: Place, limit_s: float) -> dict[str, object]:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if told.parent.is_dir():
            os.listdir(told.parent)  # noqa: PTH208 (asks a network file system to look again)
        try:
            where: dict[str, object] = json.loads(told.read_text())
            return where
        except (OSError, ValueError):
            time.sleep(0.1)
    raise GanDistError(
        f"rank {place.rank} on {place.host} heard nothing of rank 0 on {place.hosts[0]} within {limit_s:g} s: "
        f"no {told}; "
        "is the run directory on a file system that all nodes share?"
    )


def _device_index(local_rank: int, env: Mapping[str, str]) -> int:
    """Returns which of the visible GPUs is this rank's: the first where SLURM shows each task only its own."""
    visible = [word for word in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    return 0 if len(visible) == 1 and on_node.isdigit() and int(on_node) > 1 else local_rank
