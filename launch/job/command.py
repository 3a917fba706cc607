"""A gan-dist command as the one task of a job, or as an element of a job array; writes how it ended, as ranks do.

srun ... python -m launch.job.command prepare SOURCE... OUT [options]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from gan_dist.utils.errors import EXIT_STOPPED, UserError
from gan_dist.utils.files import write_atomically
from launch.job.rank import ATTEMPT, note_begun, write_failure


def options_of_element(words: list[str], env: dict[str, str]) -> list[str]:
    """Returns the options that `prepare` gets from its job: its part of the array and its number of processors.

    Raises UserError for an array with gaps: an element of it cannot know how many come before it.
    """
    more = []
    if "SLURM_ARRAY_TASK_ID" in env:
        names = ("ID", "COUNT", "MIN", "MAX", "STEP")
        element, count, first, last, step = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
        if last - first != step * (count - 1) or (element - first) % step:
            raise UserError(
                f"expected an array without gaps, found {count} elements from {first} to {last}; submit it with "
                f"--array=0-{count - 1}"
            )
        more = ["--task", f"{(element - first) // step}/{count}"]
    if env.get("SLURM_CPUS_PER_TASK") and not any(word.startswith("--workers") for word in words):
        more += ["--workers", env["SLURM_CPUS_PER_TASK"]]  # without binding, a task sees all processors of its node
    return more


def run_command(words: list[str]) -> tuple[int, str]:
    """Returns (exit status, last line on stderr) of a gan-dist command, to which signals are forwarded."""
    try:
        more = options_of_element(words, dict(os.environ)) if words[0] == "prepare" else []
    except UserError as error:
        print(f"gan-dist: {error}", file=sys.stderr, flush=True)
        return error.exit_status, str(error)
    command = [sys.executable, "-u", "-m", "gan_dist", *words, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: process.send_signal(received))
    last = ""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    return process.wait(), last


def main() -> None:
    """Runs the commands, separated by `--then`, until one fails; exits with 0 when all are done or one has stopped."""
    attempt = Path(os.environ[ATTEMPT])
    note_begun()
    commands: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--then":
            commands.append([])
        else:
            commands[-1].append(word)
    for words in commands:
        status, last = run_command(words)
        if status == EXIT_STOPPED:
            write_atomically(attempt / "stopped", b"requeue a signal\n")
            sys.exit(0)
        if status:
            if status > 0:
                write_failure(attempt, None, status, "error", last or f"{words[0]} ended with status {status}")
            else:
                write_failure(attempt, None, 1, "lost", f"{words[0]} was killed by {signal.Signals(-status).name}")
            sys.exit(max(status, 1))
    write_atomically(attempt / "done", b"ended well\n")


if __name__ == "__main__":
    main()
