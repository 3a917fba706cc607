"""`python -m tests.cluster [HOSTS] [linuxproc|cgroup]` boots a cluster and opens a shell in which sbatch finds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.cluster.boot import Cluster, missing


def main() -> None:
    """Runs $SHELL (or the command after --) on a fresh cluster, which ends with it."""
    words, command = sys.argv[1:], [os.environ.get("SHELL") or "bash"]
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    if reason := missing():
        sys.exit(f"no cluster here: {reason}")
    hosts = next((int(word) for word in words if word.isdigit()), 2)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with Cluster(hosts, next((word for word in words if not word.isdigit()), "linuxproc")) as cluster:
        print(f"{hosts} hosts; logs in {cluster.directory}; leave the shell to end it", flush=True)
        sys.exit(subprocess.run(command, env=cluster.environment(), check=False).returncode)


if __name__ == "__main__":
    main()
