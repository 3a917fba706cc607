"""Boots the daemons of a SLURM cluster and stops them again; hosts can be killed, cut off and revived.

Each host is a process with its own network, host name, process and mount namespaces. Killing that process is what
pulling the plug is to a machine: everything on it is gone at once. All daemons die with the program that booted them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from gan_dist.utils.files import write_atomically
from tests.cluster.conf import Layout, cgroup_conf, gres_conf, hosts_file, slurm_conf

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
DIE_WITH_ME = ("setpriv", "--pdeathsig", "KILL")

# Runs as process 1 of a host: bash reaps whatever daemons leave behind. The network is plugged in from outside.
INIT = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mkdir -p "$2/private" "$2/private-$1"
mount --bind "$2/private-$1" "$2/private"
if [[ -n $3 ]]; then
  mount -t cgroup -o freezer cgroup "$2/cgroup/freezer" && mkdir -p "$2/cgroup/freezer/$3" || exit 1
  mount --bind "$2/cgroup/freezer/$3" "$2/cgroup/freezer" || exit 1
fi
until ip -4 -o address show dev net0 2>/dev/null | grep -q inet; do sleep 0.05; done
slurmd -D -N "$1" -f "$2/slurm.conf" &
trap 'kill -TERM $!' TERM
wait $!
wait $!
"""
# Whatever hosts have left of themselves in the kernel's hierarchy; mounted for as long as this takes.
SWEEP = """
mount -t cgroup -o freezer cgroup "$1/cgroup/freezer"
find "$1/cgroup/freezer/" -mindepth 1 -depth -type d -path "*/freezer/$2-*" -exec rmdir {} +
"""


def missing(proctrack: str = "linuxproc") -> str:
    """Returns why no cluster can be booted here, or nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make namespaces and bridges"
    if proctrack == "cgroup" and "\nfreezer\t" not in Path("/proc/cgroups").read_text():
        return "needs a cgroup v1 freezer, which this kernel was built without"
    return ""


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _namespace(pid: object, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")  # noqa: PTH115 (the link's text is the answer)


def _sh(*words: str) -> None:
    subprocess.run(words, check=True, env={**os.environ, "PATH": _path()}, timeout=30)


def _delete_link(name: str) -> None:
    subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False, env={"PATH": _path()})


def wait_until(true: Callable[[], Any], limit_s: float, what: str) -> Any:
    """Returns the first true value of `true()`. Raises TimeoutError, naming `what`, after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"no {what} within {limit_s:g} s")


@dataclass
class Host:
    """One compute host."""

    name: str
    address: str
    cluster: Cluster
    process: subprocess.Popen[bytes] | None = None

    @property
    def link(self) -> str:
        """The bridge's end of the host's cable; the other is net0 on the host."""
        return f"{self.cluster.tag}-{self.name[-4:]}"

    def boot(self) -> None:
        """Starts the host and plugs it into the bridge."""
        cluster, link = self.cluster, self.link
        cgroup = f"{cluster.tag}-{self.name}" if cluster.layout.proctrack == "cgroup" else ""
        namespaces = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        words = (*DIE_WITH_ME, *namespaces, "bash", "-c", INIT, "init", self.name, str(cluster.directory), cgroup)
        with (cluster.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=cluster.environment(), cwd="/")
        pid, ours = str(self.process.pid), _namespace("self", "net")
        wait_until(lambda: _namespace(pid, "net") != ours, 10, f"network namespace of {self.name}")
        _sh("ip", "link", "add", link, "type", "veth", "peer", "name", "net0", "netns", pid)
        _sh("ip", "link", "set", link, "master", cluster.tag, "up")
        inside = ("nsenter", "-t", pid, "-n", "ip")
        _sh(*inside, "link", "set", "lo", "up")
        _sh(*inside, "link", "set", "net0", "up")
        _sh(*inside, "address", "add", f"{self.address}/24", "dev", "net0")

    def stop(self) -> None:
        """Shuts the host down in order: slurmd says goodbye, then every other process ends."""
        if self.process is not None:
            init = self.process.pid
            for child in Path(f"/proc/{init}/task/{init}/children").read_text().split():
                os.kill(int(child), signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()

    def kill(self) -> None:
        """Pulls the plug: every process of the host is gone at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            _delete_link(self.link)  # left to itself, the kernel takes its time over it

    def cut(self) -> None:
        """Takes the host off the network; what runs on it runs on."""
        _sh("ip", "link", "set", self.link, "nomaster", "down")

    def mend(self) -> None:
        """Puts the host back on the network."""
        _sh("ip", "link", "set", self.link, "master", self.cluster.tag, "up")

    def processes(self) -> dict[int, str]:
        """Returns {pid on this machine: command line} of all that runs on the host beside SLURM's own daemons."""
        assert self.process is not None
        found = {}
        with suppress(FileNotFoundError):
            ours = _namespace(self.process.pid, "pid_for_children")
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit():
                    continue
                with suppress(OSError):
                    if _namespace(entry.name, "pid") == ours:
                        words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                        own = ("bash -c", "slurmd ", "slurmstepd", "sleep 0.05")
                        if words and not words.startswith(own):
                            found[int(entry.name)] = words
        return found

    def pids(self, word: str) -> list[int]:
        """Returns the processes of the host whose command line holds `word`."""
        return [pid for pid, words in self.processes().items() if word in words]


@dataclass(eq=False)
class Cluster:
    """A running cluster; a context that leaves no process, bridge or file behind."""

    num_hosts: int = 2
    proctrack: str = "linuxproc"
    settings: dict[str, Any] = field(default_factory=dict)
    """Other fields of Layout."""
    running: ClassVar[list[Cluster]] = []
    networks: ClassVar[set[str]] = set()

    def __post_init__(self) -> None:
        self.tag = f"gd{random.SystemRandom().randrange(16**5):05x}"
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.tag}-"))
        self.directory.chmod(0o755)
        network = random.SystemRandom().choice([each for each in free_networks() if each not in Cluster.networks])
        Cluster.networks.add(network)  # no bridge is there yet, and another thread may choose
        hosts = {f"node{n}": f"{network}.{10 + n}" for n in range(1, self.num_hosts + 1)}
        self.layout = Layout(
            directory=self.directory,
            head=f"{network}.1",
            hosts=hosts,
            port=_free_port(),
            proctrack=self.proctrack,
            **self.settings,
        )
        self.hosts = {name: Host(name, address, self) for name, address in hosts.items()}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def environment(self) -> dict[str, str]:
        """Returns the environment in which sbatch, squeue and the daemons find this cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> Cluster:
        Cluster.running.append(self)
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *reason: object) -> None:
        if self not in Cluster.running:
            return
        Cluster.running.remove(self)
        Cluster.networks.discard(self.layout.head.rpartition(".")[0])
        for host in self.hosts.values():
            host.kill()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()
        _delete_link(self.tag)
        if self.proctrack == "cgroup":
            sweep = ("unshare", "--mount", "bash", "-c", SWEEP, "sweep", str(self.directory), self.tag)
            subprocess.run(sweep, capture_output=True, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    def configure(self, **settings: Any) -> None:
        """Writes the configuration, with these fields of Layout changed; a running cluster takes it over."""
        self.layout = replace(self.layout, **settings)
        # Whole or not at all: a daemon that is still reading for the last change dies of half a file.
        write_atomically(self.directory / "slurm.conf", slurm_conf(self.layout).encode())
        write_atomically(self.directory / "cgroup.conf", cgroup_conf(self.layout).encode())
        if self.layout.gres:
            write_atomically(self.directory / "gres.conf", gres_conf(self.layout).encode())
        write_atomically(self.directory / "hosts", hosts_file(self.layout).encode())
        if settings:
            self.run("scontrol", "reconfigure")

    def _boot(self) -> None:
        at = self.directory
        (at / "state").mkdir()
        (at / "cgroup" / "freezer").mkdir(parents=True)
        self.configure()
        _sh("ip", "link", "add", self.tag, "type", "bridge")
        _sh("ip", "address", "add", f"{self.layout.head}/24", "dev", self.tag)
        _sh("ip", "link", "set", self.tag, "up")
        (at / "munge.key").write_bytes(os.urandom(1024))
        (at / "munge.key").chmod(0o600)
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={at}/munge.{name}" for option, name in files.items()]
        self._start("munged", "--foreground", f"--socket={at}/munge.socket", *words)
        wait_until((at / "munge.socket").exists, 10, "munge socket")
        self._start(
            "unshare", "--uts", "bash", "-c", 'hostname head; exec slurmctld -D -f "$1"', "-", f"{at}/slurm.conf"
        )
        for host in self.hosts.values():
            host.boot()
        self.wait_for_hosts()

    def wait_for_hosts(self, limit_s: float = 60) -> None:
        """Returns when every host is idle."""

        def idle() -> bool:
            lines = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%N %t", check=False).stdout.split("\n")
            return sum(line.endswith(" idle") for line in lines) == len(self.hosts)

        try:
            wait_until(idle, limit_s, "idle hosts")
        except TimeoutError:
            raise TimeoutError(f"the cluster did not come up:\n{self.logs()}") from None

    def logs(self, lines: int = 15) -> str:
        """Returns the last lines of every daemon's log."""
        files = sorted(self.directory.glob("*.log"))
        return "\n".join(f"{file.name}:\n" + "\n".join(file.read_text().splitlines()[-lines:]) for file in files)

    def _start(self, *words: str) -> None:
        with (self.directory / f"{words[0]}.out.log").open("ab") as log:
            daemon = subprocess.Popen([*DIE_WITH_ME, *words], stdout=log, stderr=log, env=self.environment())
        self._daemons.append(daemon)

    def run(self, *words: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command of SLURM's as a user of this cluster would, and returns the result."""
        done = subprocess.run(
            words, env=self.environment(), capture_output=True, text=True, timeout=60, check=False, **more
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def job(self, job: str) -> dict[str, str]:
        """Returns what the controller says of a job, by SLURM's names; nothing when it has forgotten it."""
        done = self.run("scontrol", "show", "job", "-o", job, check=False)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def wait_for_job(self, job: str, *states: str, limit_s: float = 90) -> dict[str, str]:
        """Returns what the controller says of the job once it is in one of `states` (say COMPLETED)."""

        def there() -> dict[str, str] | None:
            answer = self.job(job)
            return answer if answer.get("JobState") in states else None

        try:
            found: dict[str, str] = wait_until(there, limit_s, f"{' or '.join(states)} of job {job}")
            return found
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.job(job)}\n{self.logs()}") from None


def free_networks() -> list[str]:
    """Returns the first three numbers of networks that nothing here is in: of two bridges with one, one is deaf."""
    addresses = subprocess.run(
        ["ip", "-4", "-o", "address"], capture_output=True, text=True, check=True, env={"PATH": _path()}
    ).stdout
    networks = [f"10.213.{number}" for number in range(256)]
    return [network for network in networks if f" {network}." not in addresses]


def _free_port() -> int:
    """Returns a port below the ephemeral range that nobody listens on."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
