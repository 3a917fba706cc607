"""What a step costs a GPU, without one: launches, collectives and bytes have a budget that no change exceeds unnoticed.

The step runs on fake CUDA tensors, which have no values: whatever waits for one, branches on one, or mixes devices,
raises. Numbers are of the formulation, full width, bf16, 64x64. A change that lowers them lowers the budget too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gan_dist.training.runner import compiler
from tests.helpers.fake_step import EXCHANGES, GAMES, Step

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.timeout(200),
]

# torch's autograd asks the CUDA driver for streams as soon as a tensor says that it is on a GPU, fake or not.
NO_STREAMS = """
short _ZN2at11accelerator14getAcceleratorEb(char checked) { (void)checked; return 0; }
char _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(char type) { (void)type; return 0; }
"""

BUDGET: dict[tuple[int, str], dict[str, float]] = {
    (1, "torch"): {"launches": 223, "an_image": 14308536, "a_step": 390246972},
    (1, "triton"): {"launches": 156, "an_image": 10540048, "a_step": 390460652},
    (8, "torch"): {"launches": 682, "an_image": 46137784, "a_step": 392376204, "reduced": 25427540},
    (8, "triton"): {"launches": 166, "an_image": 10540048, "a_step": 390723776, "reduced": 25427540},
}
"""By ranks and kernels: launches, bytes for each image, bytes for a step beside them, bytes given to collectives."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """at::accelerator as a build of torch without GPUs has it, to be loaded before torch."""
    source = tmp_path_factory.mktemp("no_streams") / "no_streams.c"
    source.write_text(NO_STREAMS)
    out = source.with_suffix(".so")
    subprocess.run([str(compiler()), "-x", "c", "-shared", "-fPIC", "-o", out, source], check=True)
    return out


WEIGHED = [Step(size, kernels, weighed=True) for size, kernels in BUDGET]
OTHERS = [Step(8, "triton", game) for game in GAMES if game != "thesis"]
ENDS = {game: [Step(8, "triton", game, rank) for rank in (0, 7)] for game in EXCHANGES}
"""The first and the last rank."""
FAULTS = {fault: Step(1, "torch", fault=fault, weighed=True) for fault in ("waits", "mixes devices", "copies")}


@cache
def _played(library: Path, steps: tuple[Step, ...]) -> dict[Step, dict[str, Any]]:
    """Returns what each step comes to, played by one process."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.fake_step", *(json.dumps(asdict(step)) for step in steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(steps, map(json.loads, lines), strict=True))


def _found(library: Path, step: Step, among: list[Step]) -> dict[str, Any]:
    found = _played(library, tuple(among))[step]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("step", WEIGHED, ids=lambda step: f"{step.size}-{step.kernels}")
def test_a_step_keeps_its_budget(library: Path, step: Step) -> None:
    found, budget = _found(library, step, WEIGHED), BUDGET[step.size, step.kernels]
    assert found["elsewhere"] == []
    # 4 layers with batch norm in G, 3 in D, which plays twice: a gather for each on its way forth, a sum on its way
    # back; and both networks' gradients.
    expected = {"_allgather_base": 10, "allreduce": 12} if step.size > 1 else {}
    assert found["collectives"] == expected
    for name, most in budget.items():
        assert most * 0.97 <= found[name] <= most, f"{name}: {found[name]:,.0f}, budget {most:,.0f}"


@pytest.mark.parametrize("step", OTHERS, ids=lambda step: step.game)
def test_other_games_stay_on_the_gpu_and_wait_for_nothing(library: Path, step: Step) -> None:
    found = _found(library, step, OTHERS)
    assert found["elsewhere"] == []
    assert found["collectives"]["allreduce"] >= 2


@pytest.mark.parametrize("game", EXCHANGES)
def test_other_collectives_are_the_same_on_all_ranks_and_wait_for_nothing(library: Path, game: str) -> None:
    steps = [step for ends in ENDS.values() for step in ends]
    first, last = (_found(library, step, steps) for step in ENDS[game])
    assert first["elsewhere"] == []
    assert first["order"] == last["order"]
    # D's gradients in three parts; G's in two, since a layer is not divided
    expected = {"buckets": {"_allgather_base": 10, "allreduce": 10 + 3 + 2}, "one_shot": {"allreduce": 2}}
    assert first["collectives"] == expected[game]
    assert first["reduced"] <= BUDGET[8, "triton"]["reduced"]
    # a foreach copy for each bucket and dtype; a copy and a sum for each gather and each sum
    most = BUDGET[8, "triton"]["launches"] + {"buckets": 8, "one_shot": 40}[game]
    assert first["launches"] == last["launches"] <= most


def test_what_a_step_must_not_do_is_seen(library: Path) -> None:
    waits, mixes, copies = (_played(library, tuple(FAULTS.values()))[step] for step in FAULTS.values())
    assert waits["error"].startswith("DataDependent")
    assert "device" in mixes["error"].splitlines()[0]
    budget = BUDGET[1, "torch"]
    assert copies["launches"] > budget["launches"] or copies["an_image"] > budget["an_image"]
