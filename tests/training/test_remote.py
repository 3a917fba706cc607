"""Training from an address on real ranks: the local run's game, or a clear end on all of them in bounded time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gan_dist.data.dataset import open_dataset
from gan_dist.data.order import Order
from gan_dist.data.shards import MANIFEST
from gan_dist.training.trainer import train
from tests.helpers.processes import Ranks
from tests.helpers.server import Server
from tests.helpers.training import assert_identical, config_file, final_state, small

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Stalls are given up after 2 s, and automatic caches lie in a folder of the test; it must be empty in the end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("GAN_DIST_FETCH_STALL_S", "2")
    monkeypatch.setenv("TMPDIR", str(scratch))
    yield scratch
    assert not list(scratch.glob("gan_dist*"))


@pytest.mark.parametrize(("size", "window"), [(2, 1), (4, 0)])
def test_the_game_is_that_of_the_local_set(dataset: Path, tmp_path: Path, size: int, window: int) -> None:
    faults = ["cut", "stall", "500", "corrupt", "short"]
    plan = {f"shard-0000{i}.tar": fault for i, fault in enumerate(faults)}
    words = [f"data.window_shards={window}", "--max-steps", "12"]
    near = Ranks(size, config_file(dataset, tmp_path), tmp_path / "near", *words)
    assert near.wait() == [0] * size, near.log(0)
    with Server(dataset, lambda name, nth: plan.get(name) if nth == 0 else None) as server:
        far = Ranks(size, config_file(dataset, tmp_path), tmp_path / "far", *words, f"data.shards={server.address}")
        assert far.wait() == [0] * size, far.log(0)
        assert sum(far.log(rank).count("trying again") for rank in range(size)) >= len(plan) - window
        if not window:
            assert {server.requests[name] for name in plan} == {2}
    # `data.shards` may change when a run continues; that the states are the same bit for bit is what counts.
    mine, theirs = final_state(tmp_path / "near"), final_state(tmp_path / "far")
    for state in (mine, theirs):
        state.pop("config")
    assert_identical(tmp_path / "near", tmp_path / "far")


@pytest.mark.parametrize("fault", ["404", "stall", "corrupt"])
def test_a_shard_that_cannot_be_had_ends_all_ranks_before_training(dataset: Path, tmp_path: Path, fault: str) -> None:
    with Server(dataset, lambda name, nth: fault if name == "shard-00003.tar" else None) as server:
        ranks = Ranks(2, config_file(dataset, tmp_path), tmp_path / "run", f"data.shards={server.address}")
        status = 2 if fault in ("404", "corrupt") else 1
        assert ranks.wait() == [status, status], ranks.log(0) + ranks.log(1)
    said = ranks.log(0) + ranks.log(1)
    assert said.count("gan-dist: ") == 1 and "Traceback" not in said
    assert f"{server.address}/shard-00003.tar" in said.split("gan-dist: ")[1]
    assert not (tmp_path / "run").exists()


def test_a_window_that_cannot_be_had_ends_the_run_with_its_name(dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(dataset)
    lost = f"shard-{Order(opened.shard_sizes, 0, 1).windows(0)[3][0]:05d}.tar"
    words = ["data.window_shards=1", "seed=0"]
    with Server(dataset, lambda name, nth: "404" if name == lost else None) as server:
        ranks = Ranks(2, config_file(dataset, tmp_path), tmp_path / "run", *words, f"data.shards={server.address}")
        assert all(status in (1, 2) for status in ranks.wait()), ranks.log(0)
        assert lost in ranks.log(0) + ranks.log(1)
        far = final_state(tmp_path / "run")["step"]
    # It continues from the last checkpoint once the shard is there.
    with Server(dataset) as server:
        words += [f"data.shards={server.address}", "--max-steps", str(far + 6)]
        ranks = Ranks(2, config_file(dataset, tmp_path), tmp_path / "run", *words)
        assert ranks.wait() == [0, 0], ranks.log(0)


def test_staging_may_take_longer_than_a_collective(dataset: Path, tmp_path: Path) -> None:
    """`Ranks` gives collectives 8 s; every shard takes 3 s at least, one after another on four threads."""

    def slow(name: str, nth: int) -> str | None:
        if name != MANIFEST:
            time.sleep(3 if name != "shard-00004.tar" else 12)
        return None

    os.environ["GAN_DIST_FETCH_STALL_S"] = "30"
    with Server(dataset, slow) as server:
        words = [f"data.shards={server.address}", "--max-steps", "2"]
        ranks = Ranks(2, config_file(dataset, tmp_path), tmp_path / "run", *words)
        assert ranks.wait() == [0, 0], ranks.log(0)
        assert "is staged in" in ranks.log(0)


@pytest.mark.parametrize("window", [0, 1])
def test_a_stop_ends_the_wait_for_data(dataset: Path, tmp_path: Path, window: int) -> None:
    """While the set is staged nothing is there to save; with windows the run exists already, and is saved."""
    os.environ["GAN_DIST_FETCH_STALL_S"] = "3600"
    with Server(dataset, lambda name, nth: "stall" if name != MANIFEST else None) as server:
        words = [f"data.shards={server.address}", f"data.window_shards={window}"]
        ranks = Ranks(2, config_file(dataset, tmp_path), tmp_path / "run", *words)
        while sum(server.requests.values()) < 3 or (window and not (tmp_path / "run/checkpoints/latest").exists()):
            time.sleep(0.1)
        time.sleep(2)
        ranks.processes[1].send_signal(signal.SIGTERM)
        assert ranks.wait() == [75, 75], ranks.log(0) + ranks.log(1)
    if window:
        assert final_state(tmp_path / "run")["step"] == 0
    else:
        assert "stopped by SIGTERM while data were fetched" in ranks.log(0) + ranks.log(1)


def test_a_file_address_stages_a_slow_disk(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), run_dir=tmp_path / "near", max_steps=4, console=False)
    config = small(dataset)
    config["data"] = {"shards": dataset.as_uri(), "cache_dir": str(tmp_path / "cache")}
    train(config, run_dir=tmp_path / "far", max_steps=4, console=False)
    assert_identical(tmp_path / "near", tmp_path / "far")
    assert len(list((tmp_path / "cache").rglob("shard-*.tar"))) == 5
