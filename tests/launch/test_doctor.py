"""What doctor says of a cluster's nodes, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from launch import doctor as checkup
from launch import slurm
from launch.options import load_cluster

NODE = {"host": "n1", "torch": "torch 2", "device": "CPU", "interfaces": {"lo": "127.0.0.1"}, "findings": []}


def test_nodes_that_left_no_word_are_told_by_their_last_line(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "node-n1.json").write_text(json.dumps(NODE))
    (tmp_path / "nodes").write_text("n[1-3]\n")
    (tmp_path / "logs" / "look-n2.log").write_text("Traceback\nOSError: no libcuda\n\n")
    seen, silent = checkup._looks(tmp_path, tmp_path)
    assert [line.split()[:2] for line in seen] == [["n1", "ok"]]
    nothing = f"n3           look  no word, nothing in {tmp_path / 'logs' / 'look-n3.log'}"
    assert silent == ["n2           look  no word, OSError: no libcuda", nothing]


def test_a_doctor_that_is_interrupted_cancels_its_job_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    line = slurm.Queued("7", "RUNNING", "5:00", "n1", "", "")
    monkeypatch.setattr(slurm, "need", lambda *programs: None)
    monkeypatch.setattr(slurm, "submit", lambda text: "7")
    monkeypatch.setattr(slurm, "queue", lambda jobs: [] if asked else [line])
    monkeypatch.setattr(slurm, "ask", lambda *words: asked.append(words))
    monkeypatch.setattr(checkup, "trial", lambda folder, ranks, gpus: folder / "trial.yaml")
    lines = checkup.examine(tmp_path / "home", load_cluster(None), 60)
    assert [next(lines), next(lines)] == ["job 7 asks for 1 node(s), 1 rank(s); waiting for it", f"  {line}"]
    assert (tmp_path / "home").exists()
    assert isinstance(lines, Generator)
    with pytest.raises(KeyboardInterrupt):
        lines.throw(KeyboardInterrupt())
    assert asked == [("scancel", "7")] and not (tmp_path / "home").exists()
    assert capsys.readouterr().err == "job 7 is cancelled\n"
