"""Every figure that needs a GPU, in three commands of less than ten minutes each, without a network:

  python -m tests.bench.gpu_figures check --out FOLDER     is it right here, and how fast: the tests marked gpu,
                                                           images/s beside the card's limits, where a step's time goes
  python -m tests.bench.gpu_figures choices --out FOLDER   what was left to measure: runners, our kernels or torch's,
                                                           the price of determinism, the tutorial's step beside ours
  python -m tests.bench.gpu_figures job --out FOLDER       the thesis' whole job on stand-in images, an evaluation
  python -m tests.bench.gpu_figures ranks --out FOLDER     where there are several GPUs: how they scale, how they end

Each writes FOLDER/COMMAND.json, anew after every part, and FOLDER/COMMAND.log; `check` also tests.txt. A part runs in a
process of its own within its own limit: one that fails, hangs or breaks the device costs only the figures that it had
not kept yet. Status 1 says that some part failed. `--dry-run` plays it on the CPU with tiny sizes, in this process: to
find a typo before the first minute on a GPU does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from tests.bench.gpu_figures import check, choices, job, ranks
from tests.bench.gpu_figures.plan import DRY, GPU, KEPT, Plan, keep, kept, pretend_cuda

Part = tuple[Callable[[Plan, Path, Path], dict[str, Any]], int]
"""What measures: (plan, out, work) -> figures; and its limit in seconds, Python's start included."""
MODULE = "tests.bench.gpu_figures"
COMMANDS: dict[str, dict[str, Part]] = {
    "check": {
        "machine": (check.machine, 60),
        "step": (check.step, 120),
        "profile": (check.step_profile, 60),
        "tests": (check.tests, 210),
    },
    "choices": {
        "runners": (choices.runners, 55),
        "kernels": (choices.kernels, 75),
        "determinism": (choices.determinism, 100),
        "peer": (choices.peer, 90),
        "layers": (choices.layers, 70),
        "compiled": (choices.compiled, 180),
    },
    "job": {"headline": (job.headline, 390), "evaluation": (job.evaluation, 170)},
    "ranks": {
        "scaling": (ranks.scaling, 160),
        "collectives": (ranks.collectives, 170),
        "endings": (ranks.endings, 240),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--out", type=Path, required=True, help="where the small result files go")
    parser.add_argument("--only", nargs="*", help="these parts of the command only")
    parser.add_argument("--work", type=Path, help="where large files go [default: a temporary folder]")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU, in this process")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one part, as its process is started
    args = parser.parse_args(arguments)
    parts = COMMANDS[args.command]
    if unknown := set(args.only or ()) - set(parts):
        parser.error(f"--only: {args.command} has {', '.join(parts)}, not {', '.join(sorted(unknown))}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device here; --dry-run needs none")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        keep(args.work, parts[args.only[0]][0](GPU, args.out, args.work))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        return _run(args.command, args.only or list(parts), args.out, work, args.dry_run)


def _run(command: str, names: Sequence[str], out: Path, work: Path, dry: bool) -> int:
    """Runs the parts one after another, writing down what is there after each; returns the exit status."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "dry_run": dry, "parts": {}}
    failed = 0
    with (out / f"{command}.log").open("w", encoding="utf-8") as log:
        for name in names:
            function, limit = COMMANDS[command][name]
            (work / KEPT).unlink(missing_ok=True)
            start, failure = time.perf_counter(), {}
            try:
                if dry:
                    with pretend_cuda(), warnings.catch_warnings():
                        warnings.simplefilter("default")  # as in a part's own process, whatever this one is for
                        keep(work, function(DRY, out, work))
                else:
                    _apart(command, name, limit, out, work, log)
            except Exception as error:
                failed += 1
                failure = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
                traceback.print_exc(file=log)
            took = {"took_seconds": round(time.perf_counter() - start, 1)}
            found["parts"][name] = took | failure | kept(work)
            (out / f"{command}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{command} {name}: {failure.get('failed', 'done')} ({took['took_seconds']:g} s)", flush=True)
    return 1 if failed else 0


def _apart(command: str, name: str, limit: float, out: Path, work: Path, log: TextIO) -> None:
    """Has a process of its own measure a part. Raises what says why it could not."""
    words = [command, "--only", name, "--here", "--out", str(out), "--work", str(work)]
    process = subprocess.Popen([sys.executable, "-m", MODULE, *words], stdout=log, stderr=log, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"ended after its {limit:g} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.wait()
    if status != 0:
        raise RuntimeError(f"status {status}; {command}.log says more")


if __name__ == "__main__":
    sys.exit(main())
