"""Ranks meet although a store outlives them: what an earlier attempt left behind misleads nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gan_dist.distributed.rendezvous import meet
from tests.helpers.ranks import free_port


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store that is kept as torchrun's agent keeps it: every rank is its client."""
    port = free_port()
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))  # type: ignore[attr-defined]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield kept


def attempt(ranks: range | list[int], size: int, timeout_s: float = 20) -> list[Future[Any]]:
    with ThreadPoolExecutor(size) as pool:
        return [pool.submit(meet, rank, size, timeout_s) for rank in ranks]


def test_every_attempt_has_a_store_of_its_own(store: Any) -> None:
    for number in range(3):
        first, *others = [future.result() for future in attempt(range(3), 3)]
        assert not first.check(["address"])
        first.set("address", str(number))
        assert [other.get("address").decode() for other in others] == [str(number)] * 2


@pytest.mark.parametrize("came", [[1, 2], [0, 2]])
def test_those_who_said_hello_and_died_are_not_waited_for(store: Any, came: list[int]) -> None:
    for future in attempt(came, 3, timeout_s=1):
        with pytest.raises(dist.DistError):
            future.result()
    stores = [future.result() for future in attempt(range(3), 3)]
    stores[2].set("from", "2")
    assert stores[0].get("from") == b"2"


def test_who_is_missing_is_named(store: Any) -> None:
    first, _ = attempt([0, 2], 4, timeout_s=3)
    with pytest.raises(dist.DistError, match=r"rank\(s\) 1, 3 did not come"):
        first.result()


def test_nobody_listening_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(dist.DistError, match="nobody listens there"):
        meet(1, 2, 1.0)
