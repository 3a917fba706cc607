"""The lease: one writer a run directory, whoever else comes, dies or comes back."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from gan_dist.runs import lease
from gan_dist.runs.lease import Holder, Lease, LeaseLost
from gan_dist.utils.errors import UserError
from tests.helpers.ranks import run_ranks

TERM = 2.0
"""Seconds: an owner that renews four times in them is not taken for dead on any machine that these tests can use."""
FOREVER = 3600.0
"""A term that nobody waits for: the suite's own time limit comes before."""


def foreign(fence: int = 7, launch: str | None = None) -> Holder:
    """A holder on another host, of whose process this kernel knows nothing."""
    return Holder(fence, 0, "theirs", "node9", 4711, "", launch)


def put(run: Path, holder: Holder) -> None:
    (run / "lease").write_text(json.dumps(asdict(holder)))


def test_taken_checked_released(tmp_path: Path) -> None:
    held = Lease.take(tmp_path, term_s=0.2)
    held.check()
    time.sleep(0.2)
    held.check()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_trainer_is_refused_while_the_first_renews(tmp_path: Path) -> None:
    first = Lease.take(tmp_path, term_s=TERM)
    said: list[str] = []
    with pytest.raises(UserError, match="is being trained by process"):
        Lease.take(tmp_path, said.append, term_s=TERM)
    assert "waiting 2 s" in said[0]
    first.check()
    first.release()


def take_and_die(rank: int, folder: str) -> None:
    Lease.take(Path(folder))
    os._exit(9)


def test_a_dead_process_of_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="exit code 9"):
        run_ranks(1, take_and_die, str(tmp_path))
    assert (tmp_path / "lease").exists()
    held = Lease.take(tmp_path, term_s=FOREVER)
    assert json.loads((tmp_path / "lease").read_text())["fence"] == 2
    held.release()


def test_a_silent_foreign_host_is_replaced_after_a_term(tmp_path: Path) -> None:
    put(tmp_path, foreign(fence=7))
    began = time.monotonic()
    held = Lease.take(tmp_path, term_s=0.5)
    assert time.monotonic() - began >= 0.5
    assert json.loads((tmp_path / "lease").read_text())["fence"] == 8
    held.release()


def test_the_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, foreign(launch="job-17"))
    monkeypatch.setenv(lease.LAUNCH_ID, "job-17")
    Lease.take(tmp_path, term_s=FOREVER).release()


def test_a_host_that_comes_back_may_write_no_more(tmp_path: Path) -> None:
    cut_off = Lease.take(tmp_path, term_s=TERM)
    put(tmp_path, foreign(fence=2))
    with pytest.raises(LeaseLost, match="taken over by process 4711 on node9"):
        cut_off.check()
    cut_off.release()
    assert json.loads((tmp_path / "lease").read_text())["nonce"] == "theirs", "another's lease is not ours to remove"
    (tmp_path / "lease").unlink()
    with pytest.raises(LeaseLost, match="which has ended since"):
        cut_off.check()


def test_of_many_that_find_a_stale_lease_one_gets_it(tmp_path: Path) -> None:
    put(tmp_path, foreign())  # a winner that gets no processor for a whole term would lose it again, and rightly
    taken: list[Lease] = []
    refused: list[UserError] = []

    def come() -> None:
        try:
            taken.append(Lease.take(tmp_path, term_s=3 * TERM))
        except UserError as error:
            refused.append(error)

    crowd = [threading.Thread(target=come) for _ in range(6)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert (len(taken), len(refused)) == (1, 5)
    taken[0].check()
    taken[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_lease_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "lease").write_text('{"fence": 3, "ren')
    Lease.take(tmp_path, term_s=FOREVER).release()
