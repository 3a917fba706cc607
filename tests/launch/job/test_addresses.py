"""Host lists, ports that stay reserved, addresses by route, and worlds of the planned size."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from gan_dist.utils.errors import GanDistError, UserError
from launch.job import addresses
from launch.job.addresses import (
    agree_on_master,
    choose_address,
    expand_hosts,
    interface_addresses,
    matching_interfaces,
    read_task,
    reserve_port,
    source_address,
)

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[008-010].site,x", ["gpu008.site", "gpu009.site", "gpu010.site", "x"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_host_lists_are_read_as_slurm_writes_them(text: str, names: list[str]) -> None:
    assert list(expand_hosts(text)) == names


def test_a_world_of_another_size_than_planned_is_refused() -> None:
    assert read_task(SLURM, 4).rank == 2
    for env, planned in (({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None), (SLURM, 8)):
        with pytest.raises(GanDistError, match=r"SLURM started \d rank\(s\)"):
            read_task(env, planned)
    with pytest.raises(UserError, match="not a task of a SLURM step"):
        read_task({})


def test_a_reserved_port_is_closed_to_others_and_open_to_the_store() -> None:
    port, held = reserve_port("1", 0)
    other, also = reserve_port("1", 0)
    assert 10000 <= port < 32768 and other != port
    with socket.socket() as stranger, pytest.raises(OSError):
        stranger.bind(("", port))
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    store.set("met", "here")
    assert store.get("met") == b"here"
    third, last = reserve_port("1", 0)
    restarted, again = reserve_port("1", 1)
    assert len({port, other, third, restarted}) == 4
    for each in (held, also, last, again):
        each.close()


def test_ranks_find_the_address_of_rank_0_or_fail_with_a_reason(tmp_path: Path) -> None:
    alone = SLURM | {"SLURM_JOB_NODELIST": socket.gethostname(), "SLURMD_NODENAME": socket.gethostname()}
    first, held = agree_on_master(read_task(alone | {"SLURM_PROCID": "0"}), tmp_path, alone, 5)
    later, _ = agree_on_master(read_task(alone), tmp_path, alone, 5)
    assert first["MASTER_PORT"] == later["MASTER_PORT"] and later["RANK"] == "2" and first["MASTER_ADDR"] == "127.0.0.1"
    assert json.loads((tmp_path / "rendezvous.json").read_text())["port"] == int(first["MASTER_PORT"])
    held[0].close()
    with pytest.raises(GanDistError, match=r"found no address of rank 0 .* on a file system that all nodes share"):
        agree_on_master(read_task(alone), tmp_path / "elsewhere", alone, 0.3)


def test_no_name_no_loopback(tmp_path: Path) -> None:
    two = SLURM | {"SLURM_JOB_NODELIST": "here,no-such-host.invalid", "SLURMD_NODENAME": "here"}
    with pytest.raises(GanDistError, match=r"finds no route to no-such-host\.invalid"):
        choose_address(read_task(two), {})
    assert source_address("127.0.0.2") == "127.0.0.1" and interface_addresses()["lo"] == "127.0.0.1"
    assert choose_address(read_task(two), {"NCCL_SOCKET_IFNAME": "lo"}) == ("127.0.0.1", "lo")
    with pytest.raises(UserError, match="has no interface ib7; it has lo"):
        choose_address(read_task(two), {"GLOO_SOCKET_IFNAME": "ib7"})
    with pytest.raises(UserError, match=r"has no interface =l,ib; it has lo"):
        choose_address(read_task(two), {"NCCL_SOCKET_IFNAME": "=l,ib"})


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("eth1", ["eth1", "eth10"]),
        ("ib", ["ib0", "ib1"]),
        ("ens,ib", ["ib0", "ib1"]),
        ("ib1,eth", ["ib1", "eth10", "eth1"]),
        ("=eth1", ["eth1"]),
        ("=eth,ib", []),
        ("=eth1,ib0", ["eth1", "ib0"]),
        ("^eth,lo", ["docker0", "ib0", "ib1"]),
        ("^=eth1,lo,docker0", ["eth10", "ib0", "ib1"]),
    ],
)
def test_an_interface_is_named_as_nccl_reads_it(wanted: str, names: list[str]) -> None:
    assert matching_interfaces(wanted, ["lo", "docker0", "eth10", "eth1", "ib0", "ib1"]) == names


@pytest.mark.parametrize(
    ("env", "interface"),
    [
        ({"NCCL_SOCKET_IFNAME": "net"}, "net0"),
        ({"NCCL_SOCKET_IFNAME": "ens,net"}, "net0"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "net0"),  # the route's
        ({"NCCL_SOCKET_IFNAME": "^net"}, "ib0"),
        ({"GLOO_SOCKET_IFNAME": "ib", "NCCL_SOCKET_IFNAME": "net"}, "ib0"),
        ({"GLOO_SOCKET_IFNAME": "ib0,net0"}, None),
        ({}, "net0"),
    ],
)
def test_gloo_gets_the_whole_name_of_the_interface(
    env: dict[str, str], interface: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"lo": "127.0.0.1", "net0": "10.0.0.2", "ib0": "10.1.0.2"}
    monkeypatch.setattr(addresses, "interface_addresses", lambda: known)
    monkeypatch.setattr(addresses, "source_address", lambda host: "10.0.0.2")
    two = SLURM | {"SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "here,there", "SLURMD_NODENAME": "here"}
    joined, held = agree_on_master(read_task(two), tmp_path, env, 1)
    held[0].close()
    assert joined.get("GLOO_SOCKET_IFNAME") == interface
    assert joined["MASTER_ADDR"] == known[interface or "ib0"]


def test_a_task_that_sees_its_own_gpu_only_uses_the_first(tmp_path: Path) -> None:
    alone = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "3", "SLURM_JOB_NODELIST": "h", "SLURMD_NODENAME": "h"}
    for visible, on_node, index in (("2", "4", "0"), ("2", "1", "0"), ("2", "", "0"), ("0,1,2,3", "4", "3")):
        env = alone | {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}
        joined, held = agree_on_master(read_task(env), tmp_path, env, 1)
        assert joined["LOCAL_RANK"] == index
        held[0].close()
    assert os.environ.get("RANK") is None
