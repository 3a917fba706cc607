"""Staging: what arrives is right or refused, once a machine, whoever asks, dies, or fills the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.data.dataset import Dataset, open_dataset, open_remote
from gan_dist.data.remote.cache import Cache, choose_home, private_folder
from gan_dist.data.remote.fetch import RetryPolicy, file_address, redacted
from gan_dist.data.shards import MANIFEST
from gan_dist.utils.errors import EXIT_STOPPED, GanDistError, UserError
from gan_dist.utils.stop import Cancelled
from gan_dist.utils.system import available_memory, file_system, room
from tests.helpers.datasets import write_dataset
from tests.helpers.ranks import run_ranks
from tests.helpers.server import FAULTS, Server

HASTY = RetryPolicy(tries=3, backoff_s=0.02, stall_s=60)
"""What hangs in spite of it meets the suite's own time limit."""


def retry_policy(fault: str) -> RetryPolicy:
    """Returns HASTY, with as short a stall as a slow server may just not have where a stall is the fault."""
    return replace(HASTY, stall_s=1) if fault in ("stall", "drip") else HASTY


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "set"
    write_dataset(folder, (9, 7, 9, 4))
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that an automatic cache chooses."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def pixels(dataset: Dataset) -> torch.Tensor:
    return torch.cat([dataset.shard_view(i) for i in range(len(dataset.shard_sizes))])


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("form", ["http", "query", "file", "pipe", "braces"])
def test_every_kind_of_address_brings_the_same_samples(source: Path, tmp_path: Path, form: str) -> None:
    with Server(source) as server:
        address = {
            "http": server.address + "/",
            "query": server.address + "?token=secret",
            "file": source.as_uri(),
            "pipe": f"pipe:cat {source}",
            "braces": f"pipe:cat {source}/{{}} | cat",
        }[form]
        with open_dataset(address, tmp_path) as staged, open_dataset(source) as here:
            assert staged.identity == here.identity
            assert torch.equal(pixels(staged), pixels(here))
            assert [staged.records(i) for i in range(4)] == [here.records(i) for i in range(4)]
    assert files(tmp_path), "a cache in a place that was chosen stays"
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    with open_dataset(f"file://{source}", tmp_path) as again:
        assert torch.equal(pixels(again), pixels(open_dataset(source)))


def test_addresses() -> None:
    assert file_address("http://host/set/?a=b/c", "x.tar") == "http://host/set/x.tar?a=b/c"
    assert file_address("pipe:ssh host cat '/set/{}'", "x.tar") == "pipe:ssh host cat '/set/x.tar'"
    assert redacted("https://me:password@host/set/x.tar?signature=1") == "https://host/set/x.tar"
    assert redacted("/set #1/x?.tar") == "/set #1/x?.tar"


def rare(fault: str) -> Any:
    """Returns a fault as a parameter that only the chaos suite tries where another is much like it."""
    often = fault not in ("cut_chunked", "cut_at_once", "long", "drip")
    return fault if often else pytest.param(fault, marks=pytest.mark.chaos)


@pytest.mark.parametrize("fault", [rare(fault) for fault in FAULTS])
def test_a_fault_that_passes_is_got_over(source: Path, tmp_path: Path, fault: str) -> None:
    log: list[str] = []
    with Server(source, lambda name, nth: fault if name != MANIFEST and nth == 0 else None) as server:
        if fault == "404":
            with pytest.raises(UserError, match=r"shard-0000\d.tar: HTTP status 404"):
                open_remote(server.address, tmp_path, whole=True, retry=HASTY)
            return
        with open_remote(server.address, tmp_path, whole=True, retry=retry_policy(fault), log=log.append) as staged:
            assert torch.equal(pixels(staged), pixels(open_dataset(source)))
        assert all(server.requests[shard.file] == 2 for shard in staged.manifest.shards)
    assert len(log) == 4 and all("trying again" in line for line in log)


@pytest.mark.parametrize("name", ["shard-00002.tar", pytest.param(MANIFEST, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("fault", [rare(fault) for fault in FAULTS])
def test_a_fault_that_stays_is_reported_in_time(source: Path, tmp_path: Path, fault: str, name: str) -> None:
    if (fault, name) == ("corrupt", MANIFEST):
        return  # a manifest with another byte is another dataset's, and its shards are missed
    with (
        Server(source, lambda asked, nth: fault if asked == name else None) as server,
        pytest.raises(GanDistError) as caught,
    ):
        open_remote(server.address, tmp_path, whole=True, retry=retry_policy(fault))
    assert f"{server.address}/{name}" in str(caught.value) and "\n" not in str(caught.value)
    # What the source is to blame for has status 2; what the network did, 1: the same command may help.
    assert caught.value.exit_status == (2 if fault in ("404", "short", "long", "corrupt") else 1)
    assert server.requests[name] == (1 if fault == "404" else 2 if caught.value.exit_status == 2 else HASTY.tries)
    assert not list(tmp_path.rglob("shard-00002.tar"))


@pytest.mark.parametrize("command", ["sleep 60; cat {}", "sleep 60 | cat", "cat {}; sleep 60"])
def test_a_command_that_hangs_is_ended_with_its_children(source: Path, tmp_path: Path, command: str) -> None:
    mark = f"60.{os.getpid()}"
    address = "pipe:" + command.replace("60", mark).replace("{}", f"{source}/{{}}")
    with pytest.raises(GanDistError, match="stalled"):
        open_remote(address, tmp_path, retry=RetryPolicy(2, 0.01, 0.3))
    while any(mark.encode() in line for line in running()):
        time.sleep(0.02)  # what was killed takes a moment to go


def running() -> list[bytes]:
    """Returns the command line of every process."""
    contents = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            contents.append(path.read_bytes())
    return contents


def test_commands_that_fail_are_reported(source: Path, tmp_path: Path) -> None:
    hasty = RetryPolicy(2, 0.01, 60)
    with pytest.raises(UserError, match="does not find no-such-program"):
        open_remote("pipe:no-such-program {}", tmp_path, retry=hasty)
    with pytest.raises(GanDistError, match="ended with status 3"):
        open_remote("pipe:exit 3; cat {}", tmp_path, retry=hasty)
    with pytest.raises(UserError, match="cannot be opened"):
        open_remote("carrier-pigeon://set", tmp_path, retry=hasty)
    with pytest.raises(UserError, match="No such file"):
        open_remote(f"file://{source}/nothing", tmp_path, retry=hasty)


def test_a_call_off_ends_the_wait(source: Path, tmp_path: Path) -> None:
    off = threading.Event()
    threading.Timer(0.3, off.set).start()
    with (
        Server(source, lambda name, nth: "stall" if name != MANIFEST else None) as server,
        pytest.raises(Cancelled) as caught,
    ):
        open_remote(server.address, tmp_path, whole=True, retry=RetryPolicy(1, 0, 3600), cancelled=off.is_set)
    assert caught.value.exit_status == EXIT_STOPPED


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", 6), ("samples", 8), ("bytes", 1), ("sha256", "0" * 64), ("stride", 8192), ("data_offset", 1152)],
)
def test_an_edited_manifest_is_found(source: Path, tmp_path: Path, key: str, value: object) -> None:
    shutil.copytree(source, tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    manifest["shards"][1][key] = value
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-00001\.tar"):
        open_remote(f"file://{tmp_path}/set", tmp_path / "cache", whole=True, retry=HASTY)
    if key != "sha256":  # of a set in place only `verify` reads every byte
        with pytest.raises(UserError, match=r"shard-00001\.tar"):
            open_dataset(tmp_path / "set")


def test_a_shard_cut_out_of_the_manifest_is_missed(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    del manifest["shards"][-1]
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(manifest))
    for place in (f"file://{tmp_path}/set", f"{tmp_path}/set"):
        with pytest.raises(UserError, match=r"counts .* samples, but its shards hold"):
            open_dataset(place, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../x.tar", "a;b.tar", "$(id).tar", "-x.tar", "x.zip"])
def test_a_manifest_cannot_name_what_it_likes(source: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(source, tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    manifest["shards"][1]["file"] = name
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no name of a shard"):
        open_remote(f"file://{tmp_path}/set", tmp_path / "cache", retry=HASTY)


def test_a_damaged_file_in_the_cache_is_fetched_again(source: Path, tmp_path: Path) -> None:
    with open_dataset(source.as_uri(), tmp_path) as staged:
        path = staged.root / "shard-00001.tar"
    os.truncate(path, path.stat().st_size - 512)
    with open_dataset(source.as_uri(), tmp_path) as staged:
        assert torch.equal(pixels(staged), pixels(open_dataset(source)))


def test_an_automatic_cache_goes_with_its_last_user(source: Path, scratch: Path) -> None:
    first, second = open_dataset(source.as_uri()), open_dataset(source.as_uri())
    assert first.root == second.root and first.root.is_relative_to(scratch)
    first.close()
    assert pixels(second).shape[0] == 29
    second.close()
    assert not list(scratch.iterdir())


def test_a_cache_that_nobody_closed_goes_with_the_process(source: Path, scratch: Path) -> None:
    code = f"import gan_dist; d = gan_dist.open_dataset('{source.as_uri()}'); print(d.root, d.root.exists())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, text=True
    )
    assert done.stdout.endswith("True\n"), done.stderr
    assert not list(scratch.iterdir())


VICTIM = """
import signal, sys
from gan_dist.data.dataset import open_remote
with open_remote(sys.argv[1], whole=True):
    signal.pause()
"""


def stage_in_a_process(address: str, scratch: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", VICTIM, address], env=os.environ | {"TMPDIR": str(scratch)})


def test_a_killed_job_leaves_nothing_wrong_and_its_cache_is_swept(source: Path, scratch: Path, tmp_path: Path) -> None:
    """Killed while a shard is half there: the next user takes what is whole and fetches the rest, once."""
    write_dataset(tmp_path / "other", (3,), seed=1)
    with Server(source, lambda name, nth: "stall" if (name, nth) == ("shard-00003.tar", 0) else None) as server:
        victim = stage_in_a_process(server.address, scratch)
        while sum(server.requests.values()) < 5 or not list(scratch.rglob("shard-00003.tar.*.tmp")):
            time.sleep(0.02)
        while len(list(scratch.rglob("shard-*.tar"))) < 3:
            time.sleep(0.02)
        victim.kill()
        victim.wait()
        assert list(scratch.rglob("*.tmp"))
        with open_remote(server.address, whole=True) as staged:
            assert torch.equal(pixels(staged), pixels(open_dataset(source)))
            assert not list(scratch.rglob("*.tmp"))
        assert dict(server.requests) == {
            MANIFEST: 2, "shard-00000.tar": 1, "shard-00001.tar": 1, "shard-00002.tar": 1, "shard-00003.tar": 2
        }  # fmt: skip
        # And once more, killed with all of it there: whoever comes next for other data takes it away.
        victim = stage_in_a_process(server.address, scratch)
        while len(list(scratch.rglob("shard-*.tar"))) < 4:
            time.sleep(0.02)
        victim.kill()
        victim.wait()
    with open_dataset(f"file://{tmp_path}/other") as other:
        assert len(list(scratch.rglob("shard-*.tar"))) == 1 and other.num_samples == 3
    assert not list(scratch.iterdir())


def test_a_job_that_hangs_with_the_locks_is_not_waited_for(
    source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gan_dist.data.remote.cache.STANDSTILL_S", 0.5)
    with Server(source, lambda name, nth: "stall" if (name, nth) == ("shard-00003.tar", 0) else None) as server:
        victim = stage_in_a_process(server.address, scratch)
        while len(list(scratch.rglob("shard-*.tar"))) < 3 or not list(scratch.rglob("shard-00003.tar.*.tmp")):
            time.sleep(0.02)
        victim.send_signal(signal.SIGSTOP)
        try:
            with open_remote(server.address, whole=True) as staged:
                assert torch.equal(pixels(staged), pixels(open_dataset(source)))
        finally:
            victim.kill()
            victim.wait()


def _read_on_rank(rank: int, address: str, cache: str, expected: str) -> None:
    with (
        open_remote(address, cache, whole=True, retry=RetryPolicy(4, 0.02, 5)) as staged,
        open_dataset(expected) as here,
    ):
        assert torch.equal(pixels(staged), pixels(here))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.chaos)])
def test_ranks_of_a_machine_fetch_each_shard_once(source: Path, tmp_path: Path, size: int) -> None:
    with Server(source) as server:
        run_ranks(size, _read_on_rank, server.address, str(tmp_path), str(source))
        assert {server.requests[f"shard-0000{i}.tar"] for i in range(4)} == {1}


@pytest.mark.chaos
def test_ranks_get_over_a_server_that_fails_at_random(source: Path, tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS if fault not in ("404", "short", "long", "corrupt")]
    for seed in range(3):
        plan = {(f"shard-0000{i}.tar", n): faults[(seed + 3 * i + n) % len(faults)] for i in range(4) for n in range(2)}
        with Server(source, lambda name, nth, plan=plan: plan.get((name, nth))) as server:  # type: ignore[misc]
            run_ranks(2, _read_on_rank, server.address, str(tmp_path / str(seed)), str(source))
            assert {server.requests[f"shard-0000{i}.tar"] for i in range(4)} == {3}


def test_two_jobs_at_once_share_one_cache(source: Path, scratch: Path) -> None:
    with Server(source) as server:
        results: list[torch.Tensor | BaseException] = []
        inside = threading.Barrier(3)

        def job() -> None:
            try:
                with open_remote(server.address, whole=True, retry=HASTY) as staged:
                    inside.wait()
                    results.append(pixels(staged).clone())
            except BaseException as error:
                results.append(error)

        jobs = [threading.Thread(target=job) for _ in range(3)]
        for thread in jobs:
            thread.start()
        for thread in jobs:
            thread.join()
        assert {server.requests[f"shard-0000{i}.tar"] for i in range(4)} == {1}
    assert all(isinstance(r, torch.Tensor) and torch.equal(r, pixels(open_dataset(source))) for r in results), results
    assert not list(scratch.iterdir())


FILL = """
import resource, sys
from gan_dist.data.dataset import open_remote
from gan_dist.utils.errors import GanDistError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_001, 20_001))
try:
    open_remote(*sys.argv[1:], whole=True)
except GanDistError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def test_a_cache_that_fills_up_is_reported_and_leaves_no_half_file(source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: a part of a block is still written, the next write fails."""
    done = subprocess.run([sys.executable, "-c", FILL, source.as_uri(), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr and str(tmp_path) in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert not [name for name in files(tmp_path) if name.endswith((".tmp", ".tar"))]
    with open_dataset(source.as_uri(), tmp_path) as staged:
        assert torch.equal(pixels(staged), pixels(open_dataset(source)))


@pytest.mark.chaos
def test_a_full_file_system_is_reported(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        return  # nobody may mount here; the test with RLIMIT_FSIZE above has the same fault without a mount
    try:
        with pytest.raises(UserError, match=r"staging needs 0\.0 GiB .*data\.window_shards"):
            open_dataset(source.as_uri(), small)
        manifest = open_dataset(source).manifest
        cache = Cache(source.as_uri(), manifest, private_folder(small / "mine") / "set", False, False, HASTY)
        cache.enter(manifest.to_bytes())
        with pytest.raises(GanDistError, match=r"cannot be written \(No space left on device\).*data\.cache_dir"):
            cache.fetch_all()
        cache.close()
        assert not list(small.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is no folder"):
        private_folder(tmp_path / "link")
    assert private_folder(tmp_path / "mine").stat().st_mode & 0o077 == 0
    if os.geteuid() == 0:
        os.chown(tmp_path / "mine", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match=r"belongs to user \d+ .*data\.cache_dir"):
        private_folder(tmp_path / "mine")


def test_the_place_is_chosen_by_room_and_by_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "scratch").mkdir()
    free = {tmp_path / "scratch": 100, Path("/dev/shm"): 0, tmp_path / "home": 1000}
    monkeypatch.setattr(
        "gan_dist.data.remote.cache.room", lambda path: next(v for k, v in free.items() if path.is_relative_to(k))
    )
    assert choose_home(None, "a", 50).is_relative_to(tmp_path / "scratch")
    assert choose_home(None, "a", 500).is_relative_to(tmp_path / "home")
    (choose_home(None, "b", 500) / "b").mkdir()
    assert choose_home(None, "b", 50).is_relative_to(tmp_path / "home"), "all processes meet where it is already"
    with pytest.raises(UserError, match=r"data\.cache_dir .* data\.window_shards"):
        choose_home(None, "a", 5000)
    assert str(os.geteuid()) in choose_home(None, "a", 50).name


def test_memory_is_what_the_cgroup_leaves(tmp_path: Path) -> None:
    proc, tree = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(proc, tree) == 8000 * 1024
    (proc / "self/cgroup").write_text("0::/job/step\n")
    for place, most, used in (("", "max", 1), ("job", "5000000", 1_500_000), ("job/step", "max", 1)):
        (tree / place).mkdir(parents=True, exist_ok=True)
        (tree / place / "memory.max").write_text(most)
        (tree / place / "memory.current").write_text(str(used))
        (tree / place / "memory.stat").write_text("anon 3\ninactive_file 500000\n")
    assert available_memory(proc, tree) == 4_000_000
    (proc / "self/cgroup").write_text("4:cpu,memory:/not/seen/here\n")
    (tree / "memory").mkdir()
    (tree / "memory/memory.limit_in_bytes").write_text("3000000")
    (tree / "memory/memory.usage_in_bytes").write_text("1000000")
    assert available_memory(proc, tree) == 2_000_000


def test_file_systems_are_recognised(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path) != ""
    assert 0 < room(tmp_path) <= shutil.disk_usage(tmp_path).free + 2**30
