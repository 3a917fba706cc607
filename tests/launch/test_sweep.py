"""A sweep's worker against runs that are only files: what it starts, prunes, takes up again, and tells of it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from gan_dist.config.schema import load_config
from gan_dist.runs.checkpoint import find
from gan_dist.runs.lease import TERM_S, Holder, Lease
from gan_dist.runs.study import Sweep, read_sweep
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.stop import StopRequest
from launch.cli import logs
from launch.listing import list_runs
from launch.options import ClusterOptions, JobOptions, load_cluster
from launch.space import Space, read_space
from launch.status import find_run, status_lines, trial_lines
from launch.stopping import STOP, cancel, stop
from launch.submit import submit_training
from launch.sweep import MAX_FAILURES, MAX_STARTS, Worker
from launch.trials import Here, Jobs, Standing
from tests.helpers.datasets import write_dataset
from tests.helpers.training import small
from tests.launch.test_submit import Slurm, fake  # noqa: F401 (a fixture)

EVALUATIONS = 4
SPACE = "optim.g_lr: {log: [1e-5, 1e-1]}\noptim.betas: {choice: [[0.0, 0.9], [0.5, 0.999]]}"


class Killed(BaseException):
    """Ends a worker as SIGKILL would: nothing of it is told to anybody."""


@pytest.fixture(autouse=True)
def the_killed_give_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Killed ends leaves its lease as it is, of a process that is no more, and writes nothing on its way out."""
    release, write_best = Lease.release, Worker._write_best

    def leave(lease: Lease) -> None:
        if not isinstance(sys.exc_info()[1], Killed):
            release(lease)
            return
        lease._over.set()
        lease._thread.join()
        holder = json.loads(lease._path.read_text())
        lease._path.write_text(json.dumps({**holder, "started": holder["started"].rpartition(":")[0] + ":1"}))

    monkeypatch.setattr(Lease, "release", leave)
    monkeypatch.setattr(Worker, "_write_best", lambda self: isinstance(sys.exc_info()[1], Killed) or write_best(self))


@dataclass
class Files:
    """A place where runs are files: one gets an evaluation further at each look, unless it is asked to stop."""

    poll_s, patience_s, outlives, ranks = 0.0, 0.0, False, 1
    ends: Callable[[str], Standing | None] = lambda name: None
    """How a run ends before its time, by name."""
    at_start: Callable[[str], object] = lambda name: None
    at_look: Callable[[int], object] = lambda looks: None
    kill_at: int = 10**9
    running: set[Path] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    looks: int = 0

    def start(self, run: Path, config: Path) -> None:
        self.at_start(run.name)
        self.started.append(run.name)
        assert run not in self.running, "run twice"
        (run / "config.yaml").write_text(config.read_text())
        (run / "checkpoints").mkdir(exist_ok=True)
        self.running.add(run)

    def look(self, runs: Sequence[Path]) -> dict[Path, Standing]:
        self.looks += 1
        if self.looks > self.kill_at:
            raise Killed
        self.at_look(self.looks)
        return {run: self._look(run) for run in runs}

    def _look(self, run: Path) -> Standing:
        file = run / "metrics.jsonl"
        steps = len(file.read_text().splitlines()) if file.exists() else 0
        if steps >= EVALUATIONS:
            self.running.discard(run)
            return Standing("done")
        if run not in self.running:
            return Standing("stopped" if (run / "stopped").exists() else "gone")
        end = self.ends(run.name)
        if end or (run / STOP).exists():
            self.running.discard(run)
            (run / STOP).unlink(missing_ok=True)
            if not end:
                (run / "stopped").touch()
            return end or Standing("stopped")
        (run / "stopped").unlink(missing_ok=True)
        rate = load_config(str(run / "config.yaml")).optim.g_lr
        line = {"step": 10 * (steps + 1), "images_seen": 80 * (steps + 1), "evaluate/swd": rate / (steps + 1)}
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return Standing("running")

    def stop(self, run: Path) -> None:
        if run in self.running:
            (run / STOP).touch()


class Outliving(Files):
    """Runs that go on when the sweep ends, as jobs do."""

    outlives = True


@cache
def searched(text: str = SPACE, seed: int = 0) -> Space:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        base = {"data": {"shards": "/set"}, "evaluate": {"every_steps": 10}, "seed": seed}
        return read_space(file.name, load_config(base))


def but(word: str) -> Space:
    return replace(searched(), base=load_config(searched().base, [word]))


def worker(folder: Path, place: Files, trials: int = 12, **more: object) -> Worker:
    return Worker(folder, searched(), place, trials=trials, **more)  # type: ignore[arg-type]


def states(sweep: Sweep) -> dict[str, int]:
    found = [trial.state for trial in sweep.trials]
    return {state: found.count(state) for state in dict.fromkeys(sorted(found))}


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_a_sweep_ends_with_the_account_of_every_trial(tmp_path: Path, pruner: str) -> None:
    place, lines = Files(), list[str]()
    assert worker(tmp_path / "sweep", place, parallel=2, pruner=pruner, log=lines.append).work(StopRequest())
    sweep = read_sweep(tmp_path / "sweep")
    assert len(sweep.trials) == sweep.total == 12 and sum(states(sweep).values()) == 12
    assert (states(sweep).get("pruned", 0) >= 2) == (pruner != "none"), states(sweep)
    assert place.started == [trial.name for trial in sweep.trials], "each once, in order"
    best = min(trial.settings["optim.g_lr"] for trial in sweep.trials if trial.state == "complete")
    assert sweep.best and sweep.best.settings["optim.g_lr"] == best
    written = (tmp_path / "sweep" / "best.yaml").read_text()
    assert written.startswith(f"# {sweep.best.name} of sweep: evaluate/swd ")
    assert load_config(str(tmp_path / "sweep" / "best.yaml")).optim.g_lr == best
    for trial in sweep.trials:
        assert len(trial.values) == EVALUATIONS if trial.state == "complete" else "after evaluation" in trial.reason
        assert sum(line.startswith(trial.name) for line in lines) == 2, "a start and an end"
    account = trial_lines(sweep)
    assert account[0].startswith("12 of 12 trials ended: ") and len(account) == 13 and sweep.best.name in account[1]
    assert not list((tmp_path / "sweep" / "workers").iterdir())


def test_a_killed_sweep_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Killed at many moments and continued: the runs that run are watched, and the search draws what it would have."""
    assert worker(tmp_path / "whole", Files(), trials=7).work(StopRequest())
    whole = read_sweep(tmp_path / "whole")
    place = Files()
    for kills in range(40):
        place.kill_at = place.looks + 3 + kills % 7
        again = worker(tmp_path / "killed", place, trials=7)
        try:
            assert again.work(StopRequest())
            break
        except Killed:
            pass
    killed = read_sweep(tmp_path / "killed")
    assert kills > 4 and place.started == [trial.name for trial in killed.trials], "none lost, none run twice"
    assert [(t.settings, t.state, t.values) for t in killed.trials] == [
        (t.settings, t.state, t.values) for t in whole.trials
    ]


def test_a_worker_joins_and_takes_up_what_a_dead_one_left(tmp_path: Path) -> None:
    """The first is killed with two trials; while the second's lease is renewed, the third leaves its trials alone."""
    place = Files(kill_at=4)
    first = worker(tmp_path / "sweep", place, parallel=2)
    with pytest.raises(Killed):
        first.work(StopRequest())
    taken = [trial.name for trial in read_sweep(tmp_path / "sweep").trials]
    assert len(taken) == 2 and place.running == {tmp_path / "sweep" / name for name in taken}
    place.kill_at = 10**9
    second, third = (worker(tmp_path / "sweep", place, parallel=2) for _ in range(2))
    home = tmp_path / "sweep" / "workers" / second._name
    home.mkdir()
    lease = Lease.take(home)
    assert [second._take(), second._take()] == [0, 1], "those first, before a new one"
    assert third._take() == 2
    lease.release()
    assert third._take() == 0, "a lease that was given back holds nothing"


def test_a_stopped_sweep_stops_its_runs_and_the_same_command_continues_them(tmp_path: Path) -> None:
    place, stop = Files(), StopRequest()
    place.ends = lambda name: stop.ask("SIGINT") if place.looks == 4 else None
    assert not worker(tmp_path / "sweep", place, parallel=2).work(stop)
    assert not place.running and states(read_sweep(tmp_path / "sweep")) == {"running": 2}
    place.ends = lambda name: None
    assert worker(tmp_path / "sweep", place, parallel=2, trials=6).work(StopRequest())
    assert place.started[:4] == ["trial-0000", "trial-0001"] * 2 and len(read_sweep(tmp_path / "sweep").trials) == 6


def test_a_trial_stopped_by_hand_is_left_and_continued_by_the_next_command(tmp_path: Path) -> None:
    place = Files()
    place.ends = lambda name: (tmp_path / "sweep" / name / STOP).touch() if name == "trial-0001" else None
    assert not worker(tmp_path / "sweep", place, trials=3, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "sweep")) == {"complete": 2, "running": 1}
    place.ends = lambda name: None
    assert worker(tmp_path / "sweep", place, trials=3, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "sweep")) == {"complete": 3}


def test_a_trial_that_fails_says_why_and_a_sweep_of_failures_gives_up(tmp_path: Path) -> None:
    place = Files()
    place.ends = lambda name: Standing("failed", "no such disk") if name == "trial-0002" else None
    assert worker(tmp_path / "one", place, trials=4, pruner="none").work(StopRequest())
    sweep = read_sweep(tmp_path / "one")
    assert states(sweep) == {"complete": 3, "failed": 1} and sweep.trials[2].reason == "no such disk"
    place.ends = lambda name: Standing("failed", "no such disk")
    with pytest.raises(GanDistError, match=rf"all {MAX_FAILURES} trials that ended have failed.*no such disk"):
        worker(tmp_path / "all", place).work(StopRequest())
    assert states(read_sweep(tmp_path / "all")) == {"failed": MAX_FAILURES}
    with pytest.raises(GanDistError, match=rf"all {2 * MAX_FAILURES} trials"):
        worker(tmp_path / "all", place, trials=20).work(StopRequest())
    place.ends = lambda name: None  # the disk is back
    assert worker(tmp_path / "all", place, trials=12, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "all")) == {"complete": 2, "failed": 2 * MAX_FAILURES}


def test_a_sweep_that_gives_up_leaves_no_run_behind(tmp_path: Path) -> None:
    place = Files()
    place.ends = lambda name: Standing("failed", "no such disk") if name < "trial-0005" else None
    with pytest.raises(GanDistError, match="trials that ended have failed"):
        worker(tmp_path / "sweep", place, parallel=2).work(StopRequest())
    assert "trial-0005" in place.started and not place.running


@pytest.mark.parametrize("by_file", [True, False])
def test_nothing_is_started_once_a_sweep_is_to_stop(tmp_path: Path, by_file: bool) -> None:
    """While a first trial is being submitted, and before one that is in the journal is: by file, and by Ctrl-C."""
    folder, stop = tmp_path / "sweep", StopRequest()

    def ask(when: object) -> None:
        if when in ("trial-0000", 2):
            (folder / STOP).touch() if by_file else stop.ask("SIGINT")

    place = Outliving(at_start=ask)
    assert not worker(folder, place, parallel=3).work(stop)
    assert place.started == ["trial-0000"] and len(read_sweep(folder).trials) == 1
    assert (folder / "trial-0000" / STOP).exists() == by_file, "what it has just submitted is stopped, too"
    folder, stop = tmp_path / "other", StopRequest()
    place = Outliving(at_look=ask)
    assert not worker(folder, place, parallel=3).work(stop)
    assert not place.started and len(read_sweep(folder).trials) == 1


def test_an_outage_is_waited_out_but_not_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.sweep.RETRY_S", 0.0)
    failures: list[str] = []

    def silent(name: str) -> None:
        if name == "trial-0001" and len(failures) < 2:
            failures.append(name)
            raise GanDistError("SLURM is silent")

    assert worker(tmp_path / "sweep", Files(at_start=silent), trials=3, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "sweep")) == {"complete": 3} and len(failures) == 2
    failures.clear()
    first = Files(at_start=lambda name: silent("trial-0001"))
    with pytest.raises(GanDistError, match="SLURM is silent"):
        worker(tmp_path / "other", first).work(StopRequest())
    assert not (tmp_path / "other").exists(), "nothing of it began"
    failures.clear()
    with pytest.raises(GanDistError, match="SLURM is silent"):
        worker(tmp_path / "sweep", first, trials=4, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "sweep"))["complete"] == 3, "what there was is still there"

    def fails(run: Path) -> list[str]:
        raise error

    monkeypatch.setattr("launch.trials.stop_run", fails)
    for error in (UserError("it has no job"), GanDistError("squeue did not answer")):
        Jobs.stop(object.__new__(Jobs), tmp_path)
        assert (tmp_path / STOP).exists() == (not isinstance(error, UserError))


def test_a_disk_that_refuses_is_one_line_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write.*: No space left on device"):
        patch.setattr("launch.sweep.write_atomically", full)
        worker(tmp_path / "sweep", Files())
    with pytest.raises(GanDistError, match=r"cannot write.*No space left on device; .* the same command continues"):
        worker(tmp_path / "sweep", Files(at_start=full), trials=2).work(StopRequest())
    (tmp_path / "sweep" / "best.yaml").mkdir()
    with pytest.raises(GanDistError, match=r"cannot write.*best.yaml.*directory; .* the same command continues"):
        worker(tmp_path / "sweep", place := Files(), trials=2).work(StopRequest())
    (tmp_path / "sweep" / "best.yaml").rmdir()
    assert worker(tmp_path / "sweep", place, trials=2, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "sweep")) == {"complete": 2} and place.started == ["trial-0000", "trial-0001"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the sweep's directory"):
        worker(tmp_path / "file" / "sweep", Files())


def test_a_run_that_vanishes_is_started_again_so_often_without_a_checkpoint(tmp_path: Path) -> None:
    place = Files()
    place.ends = lambda name: Standing("gone") if name == "trial-0001" else None
    assert worker(tmp_path / "sweep", place, trials=3, pruner="none").work(StopRequest())
    assert place.started.count("trial-0001") == MAX_STARTS
    failed = read_sweep(tmp_path / "sweep").trials[1]
    assert failed.state == "failed" and "without a newer checkpoint" in failed.reason
    saves: list[int] = []

    def saving(name: str) -> Standing | None:
        if name == "trial-0001" and len(saves) < 5:
            saves.append(1)
            (tmp_path / "other" / name / "checkpoints" / f"step-{len(saves):08d}").mkdir()
            return Standing("gone")
        return None

    place.ends = saving
    assert worker(tmp_path / "other", place, trials=3, pruner="none").work(StopRequest())
    assert states(read_sweep(tmp_path / "other")) == {"complete": 3}, "each start has saved"


def test_another_search_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    worker(tmp_path / "sweep", Files())
    with pytest.raises(UserError, match=r"something else \(optim.betas was .*, now not searched; optim.d_lr was not"):
        Worker(tmp_path / "sweep", searched("optim.d_lr: {log: [1e-5, 1e-1]}"), Files())
    with pytest.raises(UserError, match=r"seed was 0, now 3"):
        Worker(tmp_path / "sweep", searched(seed=3), Files())
    for word in ("train.epochs=1000", "evaluate.samples=77", "data.shards=/other"):
        with pytest.raises(UserError, match=rf"\({word.partition('=')[0]} was .*, now {word.partition('=')[2]}"):
            Worker(tmp_path / "sweep", but(word), Files())
    Worker(tmp_path / "images", searched(), Files(), dataset="a" * 64)
    Worker(tmp_path / "images", but("data.shards=/moved"), Files(), dataset="a" * 64)
    with pytest.raises(UserError, match=r"\(the dataset was another \(manifest aaaaaaaaaaaa, now bbbbbbbbbbbb"):
        Worker(tmp_path / "images", searched(), Files(), dataset="b" * 64)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        worker(tmp_path / "run", Files())


def test_a_journal_that_ends_in_half_a_line_is_mended(tmp_path: Path) -> None:
    assert worker(tmp_path / "sweep", Files(), trials=2).work(StopRequest())
    journal = tmp_path / "sweep" / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[: len(whole.splitlines()[0]) // 2])
    assert worker(tmp_path / "sweep", Files(), trials=3).work(StopRequest())
    assert journal.read_bytes().startswith(whole) and len(read_sweep(tmp_path / "sweep").trials) == 3
    running = worker(tmp_path / "sweep", Files(), trials=4)
    with journal.open("ab") as stream:  # by another, which was lost
        stream.write(whole[:7])
    assert running.work(StopRequest()) and len(read_sweep(tmp_path / "sweep").trials) == 4


@pytest.mark.parametrize("damage", [b"x\n", b'{"a":1}\n', b"5\n"])
def test_a_damaged_sweep_is_a_line_of_status_among_the_others(tmp_path: Path, damage: bytes) -> None:
    worker(tmp_path / "sweep", Files())
    journal = tmp_path / "sweep" / "study.journal"
    journal.write_bytes(damage + journal.read_bytes())
    head, line = status_lines(tmp_path / "sweep")
    assert head.startswith("sweep at ") and f"cannot read {journal}: " in line
    assert list_runs(str(tmp_path))[0].reason == line.strip()


def test_status_ls_and_stop_know_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAN_DIST_RUNS", str(tmp_path))
    place = Files(kill_at=9)
    with pytest.raises(Killed):
        worker(tmp_path / "sweep", place, trials=5, pruner="none").work(StopRequest())
    lines = status_lines(find_run("sweep"))
    assert lines[1] == "  1 of 5 trials ended: 1 complete; 1 running" and "best: trial-0000 complete" in lines[2]
    assert lines[3].strip() == "0 worker(s)" and any("trial-0001 at " in line for line in lines), lines
    (row,) = list_runs(str(tmp_path))
    assert (row.name, row.state, row.step, row.total_steps) == ("sweep", "stopped", 1, 5) and row.best_swd
    with pytest.raises(UserError, match="no trial and no worker runs; nothing to stop"):
        stop(tmp_path / "sweep")
    assert not (tmp_path / "sweep" / STOP).exists()
    lease = hold(tmp_path / "sweep" / "workers" / "elsewhere")  # of which only the age of its lease can tell
    assert status_lines(find_run("sweep"))[3].strip() == "1 worker(s): elsewhere"
    assert [row.state for row in list_runs(str(tmp_path))] == ["running"]
    os.utime(lease, (time.time() - 11 * TERM_S,) * 2)
    assert status_lines(find_run("sweep"))[3].strip() == "0 worker(s)"
    assert [row.state for row in list_runs(str(tmp_path))] == ["stopped"]


def hold(folder: Path) -> Path:
    """Returns the lease of somebody on another host, who seems to be alive."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = Holder(1, 0, "nonce", "another host", 1, "another boot:1:1", None)
    (folder / "lease").write_text(json.dumps(asdict(holder)))
    return folder / "lease"


def test_a_stop_that_nobody_heard_is_forgotten_but_not_one_that_living_workers_are_to_hear(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    assert worker(folder, Files(), trials=1).work(StopRequest())
    (folder / STOP).touch()
    assert worker(folder, Files(), trials=2).work(StopRequest()) and not (folder / STOP).exists()
    lease = hold(folder / "workers" / "elsewhere")
    (folder / STOP).touch()
    with pytest.raises(UserError, match=r"is asked to stop, and 1 worker\(s\) have not ended yet \(elsewhere\); run"):
        worker(folder, Files(), trials=3)
    assert (folder / STOP).exists()
    lease.unlink()
    assert worker(folder, Files(), trials=3).work(StopRequest())


def test_stop_reaches_what_runs_without_a_job(tmp_path: Path) -> None:
    """A trial of a sweep whose worker was killed, and one named by itself; how they end is their own affair."""
    with pytest.raises(Killed):
        worker(tmp_path / "sweep", Files(kill_at=4), parallel=2).work(StopRequest())
    runs = [tmp_path / "sweep" / name for name in ("trial-0000", "trial-0001")]
    hold(runs[0])
    assert stop(runs[0]) == ["trial-0000 is asked to save and end"] and (runs[0] / STOP).exists()
    with pytest.raises(UserError, match="trial-0001 has no job in the queue; nothing to stop"):
        stop(runs[1])
    (runs[0] / STOP).unlink()
    workers = "0 worker(s) asked to end; the same `launch sweep` continues"
    assert stop(tmp_path / "sweep") == ["trial-0000 is asked to save and end", workers]
    assert [(run / STOP).exists() for run in runs] == [True, False]
    with pytest.raises(UserError, match=r"sweep is a sweep, and its trials have logs; .* logs \S+/trial-0000$"):
        logs(str(tmp_path / "sweep"))
    with pytest.raises(UserError, match=r"sweep is a sweep; name one of its trials, for example \S+/trial-0000$"):
        find(tmp_path / "sweep")
    with pytest.raises(UserError, match="is a sweep; name one of its trials"):
        find(tmp_path / "sweep", 10)


def test_cancelling_a_sweep_cancels_the_jobs_of_its_trials_and_ends_its_workers(
    fake: Slurm,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep"
    with pytest.raises(Killed):
        worker(folder, Files(kill_at=4), parallel=2).work(StopRequest())
    hold(folder / "trial-0001")
    with pytest.raises(
        UserError, match=r"no trial has a job in the queue; nothing to cancel; what runs without .* stop"
    ):
        list(cancel(folder))
    assert not (folder / STOP).exists(), "the workers go on"
    (folder / STOP).touch()
    with pytest.raises(UserError, match="nothing to cancel"):
        list(cancel(folder))
    assert (folder / STOP).exists(), "somebody asked before"
    (folder / STOP).unlink()
    config = str(folder / "trial-0000" / "config.yaml")
    submit_training(config, [], load_cluster(None), folder / "trial-0000", alone=False)
    fake.program("squeue", "exit 1")
    with pytest.raises(GanDistError, match="squeue"):
        list(cancel(folder))
    assert not (folder / STOP).exists()
    fake.program("squeue", f"echo '71|RUNNING|1:00||(None)|n1|N/A|trial-0000|{folder / 'trial-0000'}'")
    hold(folder / "workers" / "elsewhere")
    workers = "1 worker(s) asked to end; the same `launch sweep` continues"
    assert list(cancel(folder)) == ["job 71 is cancelled", workers]
    assert fake.calls("scancel") == ["71"] and (folder / STOP).exists()
    config = str(folder / "trial-0001" / "config.yaml")
    submit_training(config, [], load_cluster(None), folder / "trial-0001", alone=False)
    both = "".join(f"7{n + 1}|RUNNING|1:00||(None)|n1|N/A|trial-000{n}|{folder}/trial-000{n}\\n" for n in (0, 1))
    fake.program("squeue", f"printf '{both}'")
    fake.program("scancel", '[[ $* != 71 ]] || { echo "Access denied" >&2; exit 1; }')
    asked, lines = len(fake.calls("squeue")), cancel(folder)
    assert [next(lines), next(lines)] == ["job 72 is cancelled", workers]
    with pytest.raises(GanDistError, match="Access denied"):  # what could not be cancelled is told, and is no success
        next(lines)
    assert len(fake.calls("squeue")) == asked + 1, "SLURM is asked once, whatever the number of trials"


def with_jobs(folder: Path, trials: Sequence[int], parallel: int) -> Callable[[str], str]:
    """Makes a sweep whose worker was killed, and a job (71, 72, ...) for each of these trials; returns what squeue
    prints of states as `71:RUNNING 72:PENDING`, as a line of bash."""
    with pytest.raises(Killed):
        worker(folder, Files(kill_at=4), parallel=parallel).work(StopRequest())
    names = {str(71 + i): f"trial-{trial:04}" for i, trial in enumerate(trials)}
    for name in names.values():
        submit_training(str(folder / name / "config.yaml"), [], load_cluster(None), folder / name, alone=False)

    def shown(states: str) -> str:
        pairs = (word.split(":") for word in states.split())
        rows = (f"{job}|{state}|1:00||(None)|n1|N/A|{names[job]}|{folder / names[job]}" for job, state in pairs)
        return "printf '%s\\n' " + " ".join(f"'{row}'" for row in rows)

    return shown


def test_a_trial_that_starts_while_another_ends_is_asked_as_one_that_runs(
    fake: Slurm,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep"
    shown = with_jobs(folder, (0, 1), parallel=2)
    first, then = shown("71:COMPLETING 72:PENDING"), shown("72:RUNNING")
    fake.program("squeue", f"if [[ -e {tmp_path}/asked ]]; then {then}; else touch {tmp_path}/asked; {first}; fi")
    line, _ = stop(folder)
    assert line.startswith("job 72 is asked to save and end") and fake.calls("scancel") == []
    assert [(folder / f"trial-000{n}" / STOP).exists() for n in (0, 1)] == [False, True]


def test_what_cannot_be_asked_of_slurm_is_asked_by_file_where_something_may_run(
    fake: Slurm,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The first has a job, the second a living process, and nothing runs of the third."""
    folder = tmp_path / "sweep"
    with_jobs(folder, (0,), parallel=3)
    hold(folder / "trial-0001")
    fake.program("squeue", "echo 'no controller' >&2; exit 1")
    first, second, _ = stop(folder)
    assert first.startswith("trial-0000 is asked to save and end; its job: squeue")
    assert second == "trial-0001 is asked to save and end"
    assert [(folder / f"trial-000{n}" / STOP).exists() for n in (0, 1, 2)] == [True, True, False]


def test_each_job_that_cannot_be_cancelled_is_named(
    fake: Slurm,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep"
    shown = with_jobs(folder, (0, 1, 2), parallel=3)
    fake.program("squeue", shown("71:RUNNING 72:RUNNING 73:RUNNING"))
    fake.program("scancel", '[[ $* == 73 ]] || { echo "Access denied to $*" >&2; exit 1; }')
    lines, said = cancel(folder), list[str]()
    with pytest.raises(GanDistError, match="Access denied to 71"):
        said += iter(lines)
    assert said[0] == "job 73 is cancelled" and "Access denied to 72" in said[2] and len(said) == 3
    fake.program("squeue", shown("71:RUNNING"))
    with pytest.raises(GanDistError, match="Access denied to 71"):
        list(cancel(folder / "trial-0000"))


@pytest.mark.parametrize("whole", [False, True])
def test_a_job_that_cannot_be_cancelled_keeps_no_other_of_its_run_from_it(
    fake: Slurm,  # noqa: F811
    tmp_path: Path,
    whole: bool,
) -> None:
    folder = tmp_path / "sweep"
    shown = with_jobs(folder, (0, 0, 0), parallel=1)
    fake.program("squeue", shown("71:RUNNING 72:RUNNING 73:RUNNING"))
    fake.program("scancel", '[[ $* == 72 ]] || { echo "Access denied to $*" >&2; exit 1; }')
    lines, said = cancel(folder if whole else folder / "trial-0000"), list[str]()
    with pytest.raises(GanDistError, match="Access denied to 71"):
        said += iter(lines)
    assert said[0] == "job 72 is cancelled" and any("Access denied to 73" in line for line in said)


@pytest.mark.parametrize("first", [True, False])
def test_jobs_run_the_code_of_the_first_in_its_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    taken: list[tuple[Path | None, bool]] = []

    def submit(config: str, words: list[str], options: ClusterOptions, run: Path, **more: Any) -> None:
        taken.append((more["like"], options.job.unpack))
        code = run / "launch" / f"0{len(taken)}" / ("code" if options.job.unpack else "code.zip")
        code.parent.mkdir(parents=True)
        code.mkdir() if options.job.unpack else code.touch()

    monkeypatch.setattr("launch.trials.submit_training", submit)
    monkeypatch.setattr("launch.slurm.require", lambda *names: None)
    for number, unpack in enumerate((first, not first)):
        options = ClusterOptions(job=JobOptions(unpack=unpack))
        Jobs(options).start(tmp_path / f"trial-{number:04}", tmp_path / "config.yaml")
    assert taken == [(None, first), (tmp_path / "trial-0000" / "launch" / "01", first)]


def begun(log: Path, words: list[str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "sweep", *words], stdout=output, stderr=output, start_new_session=True
        )


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_real_runs_outlive_a_killed_sweep_and_are_watched_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    images = len(write_dataset(tmp_path / "set", (80, 40)))
    evaluate, steps = {"every_steps": 60, "samples": 100}, 240
    config, space, folder = tmp_path / "art.yaml", tmp_path / "space.yaml", tmp_path / "sweep"
    values = small(tmp_path / "set") | {
        "evaluate": evaluate,
        "log": {"scalars_every": 20, "samples_every": 10**6, "grid": 4},
    }
    values["train"] = {**values["train"], "epochs": steps * 8 / images}
    config.write_text(yaml.safe_dump(values))
    space.write_text("optim.g_lr: {log: [1e-5, 1e-2]}")
    words = [str(config), str(space), "--trials", "3", "--run-dir", str(folder)]
    log = tmp_path / "log"
    workers = [begun(log, words)]
    metrics = folder / "trial-0000" / "metrics.jsonl"
    try:
        limit = time.monotonic() + 200
        while not (metrics.exists() and '"step": 20,' in metrics.read_text()):
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.05)
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        holder = json.loads((folder / "trial-0000" / "lease").read_text())["pid"]
        os.kill(holder, 0)  # the trial runs on
        workers.append(begun(log, words))
        assert workers[1].wait(250) == 0, log.read_text()
    finally:
        for each in workers:
            each.kill()
            each.wait()
    sweep = read_sweep(folder)
    assert states(sweep).get("complete", 0) >= 1 and len(sweep.trials) == 3, log.read_text()
    starts = [line for line in metrics.read_text().splitlines() if '"event": "start"' in line]
    assert len(starts) == 1, "the run that went on was not started again"
    assert load_config(str(folder / "best.yaml")).optim.g_lr == (sweep.best and sweep.best.settings["optim.g_lr"])


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Has the place `Here` start these lines of bash instead of gan-dist, on a machine with two GPUs, 4 and 7."""
    program = folder / "python"
    program.write_text("\n".join(("#!/bin/bash", *lines)))
    program.chmod(0o755)
    monkeypatch.setattr("launch.trials.sys.executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")


def test_here_reads_how_a_process_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real place with a stand-in for the program: statuses 0, 75 and 2, a signal, and a run of nobody's."""
    stand_in(tmp_path, monkeypatch, 'echo "gan-dist: it ends with $(cat "$6/how")"', 'eval "$(cat "$6/how")"')
    place = Here(parallel=2)
    found = {}
    for name, how in (("a", "exit 0"), ("b", "exit 75"), ("c", "exit 2"), ("d", "kill -9 $$")):
        run = tmp_path / name
        run.mkdir()
        (run / "how").write_text(how)
        place.start(run, tmp_path / "config.yaml")
        while (standing := place.look([run])[run]).state == "running":
            time.sleep(0.01)
        found[name] = (standing.state, standing.reason)
    assert found == {"a": ("done", ""), "b": ("stopped", ""), "c": ("failed", "it ends with exit 2"), "d": ("gone", "")}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "metrics.jsonl").write_text('{"event": "end", "step": 3, "time": 0}\n')
    assert place.look([tmp_path / "e", tmp_path / "nowhere"]) == {
        tmp_path / "e": Standing("done"),
        tmp_path / "nowhere": Standing("gone"),
    }


def test_runs_here_share_the_gpus_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, 'echo "$CUDA_VISIBLE_DEVICES" >"$6/gpus"', "exec sleep 60")
    place = again = Here(parallel=3)
    runs = [tmp_path / name for name in "abc"]
    try:
        for run in runs:
            place.start(run, tmp_path / "config.yaml")
            while not (run / "gpus").exists() or not (run / "gpus").read_text():
                time.sleep(0.01)
        assert [(run / "gpus").read_text() for run in runs] == ["4\n", "7\n", "4\n"]
        lease, again = Lease.take(runs[0]), Here(parallel=3)  # after a sweep that was killed: one of its runs goes on
        again.start(tmp_path / "d", tmp_path / "config.yaml")
        assert (tmp_path / "d" / "launch" / "devices").read_text().split()[1:] == ["7"]
        lease.release()
    finally:
        for child in [*place._children.values(), *again._children.values()]:
            child.kill()
            child.wait()
