"""A gan-dist command as the one task of a job, or as an element of a job array; leaves words as ranks do.

srun ... python -m launch.command prepare SOURCE... OUT [options]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from gan_dist.data.files import publish
from gan_dist.errors import EXIT_STOPPED
from launch.rank import ATTEMPT, leave_word


def share_of(words: list[str], env: dict[str, str]) -> list[str]:
    """Returns what `prepare` must know of its job beside WORDS: its part of the array, and its processors."""
    more = []
    if "SLURM_ARRAY_TASK_ID" in env:
        first, count = int(env.get("SLURM_ARRAY_TASK_MIN", "0")), int(env["SLURM_ARRAY_TASK_COUNT"])
        more = ["--task", f"{int(env['SLURM_ARRAY_TASK_ID']) - first}/{count}"]
    if env.get("SLURM_CPUS_PER_TASK") and not any(word.startswith("--workers") for word in words):
        more += ["--workers", env["SLURM_CPUS_PER_TASK"]]  # where SLURM binds nobody, a task sees all of the node's
    return more


def run_command(words: list[str]) -> tuple[int, str]:
    """Returns (exit status, last line on stderr) of a gan-dist command to which signals are handed on."""
    more = share_of(words, dict(os.environ)) if words[0] == "prepare" else []
    command = [sys.executable, "-u", "-m", "gan_dist", *words, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda got, frame: process.send_signal(got))
    last = ""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    return process.wait(), last


def main() -> None:
    """Runs the commands, `--then` between them, until one fails; ends with 0 when all are done or one has stopped."""
    attempt = Path(os.environ[ATTEMPT])
    commands: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--then":
            commands.append([])
        else:
            commands[-1].append(word)
    for words in commands:
        status, last = run_command(words)
        if status == EXIT_STOPPED:
            publish(attempt / "stopped", b"requeue a signal\n")
            sys.exit(0)
        if status:
            if status > 0:
                leave_word(attempt, None, status, "error", last or f"{words[0]} ended with status {status}")
            else:
                leave_word(attempt, None, 1, "lost", f"{words[0]} was killed by {signal.Signals(-status).name}")
            sys.exit(max(status, 1))
    publish(attempt / "done", b"ended well\n")


if __name__ == "__main__":
    main()
