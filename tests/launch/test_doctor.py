"""What doctor says of a cluster's nodes, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from launch import doctor, slurm
from launch.options import load_cluster

NODE = {"host": "n1", "torch": "torch 2", "device": "CPU", "interfaces": {"lo": "127.0.0.1"}, "findings": []}


WARNING = {"topic": "gpu", "state": "warning", "found": "none", "advice": ""}
PROBLEM = {"topic": "shm", "state": "problem", "found": "[red] 1 MiB", "advice": "ask for more"}


def test_each_node_has_a_row_that_no_pipe_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    (tmp_path / "logs").mkdir()
    device = "a GPU with a very long name " * 9
    for node in (NODE, NODE | {"host": "n22", "device": device.strip(), "findings": [PROBLEM, WARNING]}):
        (tmp_path / f"node-{node['host']}.json").write_text(json.dumps(node))
    (tmp_path / "nodes").write_text("n[1,3-4,22]\n")
    (tmp_path / "logs" / "doctor-n3.log").write_text("Traceback\nOSError: no libcuda\n\n")
    assert doctor._node_lines(tmp_path, tmp_path) == (
        [
            "n1   ok       torch 2, CPU",
            f"n22  problem  torch 2, {device.strip()}",
            "              shm: [red] 1 MiB; ask for more",
            "              warning: gpu: none",
            "n3   problem  no report: OSError: no libcuda",
            f"n4   problem  no report: nothing in {tmp_path / 'logs' / 'doctor-n4.log'}",
        ],
        2,
    )


def test_a_doctor_that_is_interrupted_cancels_its_job_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    line = slurm.Queued("7", "RUNNING", "5:00", "n1", "", "")
    monkeypatch.setattr(slurm, "require", lambda *programs: None)
    monkeypatch.setattr(slurm, "submit", lambda text: slurm.Job("7"))
    monkeypatch.setattr(slurm, "queue", lambda jobs: [] if asked else [line])
    monkeypatch.setattr(slurm, "run", lambda *words: asked.append(words))
    monkeypatch.setattr(doctor, "write_trial", lambda folder, ranks, gpus: folder / "trial.yaml")
    lines = doctor.run_trial(tmp_path / "home", load_cluster(None), 60)
    assert [next(lines), next(lines)] == ["job 7 asks for 1 node(s), 1 rank(s); waiting for it", f"  {line}"]
    assert (tmp_path / "home").exists()
    assert isinstance(lines, Generator)
    with pytest.raises(KeyboardInterrupt):
        lines.throw(KeyboardInterrupt())
    assert asked == [("scancel", "7")] and not (tmp_path / "home").exists()
    assert capsys.readouterr().err == "job 7 is cancelled\n"
