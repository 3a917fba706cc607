"""Training on this box through the launcher."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from tests.cluster.boot import wait_until
from tests.helpers.training import config_file

ROOT = Path(__file__).parents[3]


def local(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", "local", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_what_is_refused_is_one_line_however_many_ranks_refuse_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(dataset, tmp_path)
    refused = local(config, "--ranks", 2, "--run-dir", tmp_path / "run", "model.resolution=256", "slurm.nodes=2")
    note, line = refused.stderr.splitlines()
    assert note == "note: slurm.nodes=2 is for jobs and has no effect here; use --ranks"
    assert refused.returncode == 2 and line.startswith("gan-dist: model.resolution is 256, but"), refused.stderr
    for ranks, word, expected in (
        (2, "train.epochs=x", r"launch: train.epochs: expected number, found 'x'\n"),
        (0, "seed=1", r"(?s)(?!.*Traceback).*'--ranks'.*"),
    ):
        words = ["local", config, "--ranks", ranks, "--run-dir", tmp_path / "run", word]
        monkeypatch.setattr(sys, "argv", ["launch", *map(str, words)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert re.fullmatch(expected, capsys.readouterr().err)


def test_a_stop_while_data_are_fetched_is_a_stop(dataset: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    here = shlex.quote(str(tmp_path / "here"))
    slow.write_text(f"case $1 in *.tar) touch {here}; sleep 300;; esac\ncat {shlex.quote(str(dataset))}/$1\n")
    config = str(config_file(dataset, tmp_path))
    words = [f"data.shards=pipe:bash {slow} {{}}", f"data.cache_dir={tmp_path / 'cache'}", "--ranks", "2"]
    command = [sys.executable, "-m", "launch", "local", config, "--run-dir", str(tmp_path / "run"), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until((tmp_path / "here").exists, 250, "fetching")
    os.kill(process.pid, signal.SIGUSR2)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 75 and output.count("stopped by SIGUSR2 while data were fetched") == 1, output
    assert "Traceback" not in output, output
