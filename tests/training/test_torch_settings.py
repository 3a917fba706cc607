from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.config.schema import load_config
from gan_dist.distributed.world import World
from gan_dist.training import setup, trainer
from gan_dist.training.torch_settings import resolve_deterministic, torch_settings
from tests.helpers.games import CPU, game
from tests.helpers.training import small

PAGES = 2**25 // resource.getpagesize()
"""Pages of the smallest tensor that `work` makes."""


FAULTS = """
import json, resource, sys
import torch
from gan_dist.training.torch_settings import torch_settings

def work(width=2**20):
    # The fewest page faults of several rounds of large tensors: what is left once memory has been found.
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        x = torch.ones(1, width)
        for images in (8, 16, 32, 16, 8):
            x = torch.relu(x[:1].expand(images, -1) + 1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

def resident():
    return int(open("/proc/self/statm").read().split()[1])

if len(sys.argv) > 1:
    print(work())  # in a process of its own, since what it leaves of the heap changes all that follows
    sys.exit()
with torch_settings(torch.device("cpu")):
    pass
medium = work(2**16)  # up to 8 MiB, which glibc learns to keep by itself, unless somebody has set anything
before = work()
with torch_settings(torch.device("cuda")):
    on_a_gpu = work()
with torch_settings(torch.device("cpu")):
    within = work()
    kept = resident()
print(json.dumps([before, within, on_a_gpu, medium, kept, resident()]))
"""
"""Prints what `work` pays after `torch_settings`, within it, within that of a GPU's run, and for less; then the pages
that the process has in memory, within and after it. With an argument, what `work` pays where nobody set anything."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_memory_is_kept_for_the_next_step_and_given_back_at_the_end() -> None:
    # Processes of their own: one that has run for long has holes in its heap, which it uses before it asks the kernel.
    tuned = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", FAULTS, *words], stdout=subprocess.PIPE, text=True, env=os.environ | env
        )
        for env, words in (({}, ["plain"]), ({}, []), (tuned, []))
    ]
    plain, (before, within, on_a_gpu, medium, kept, left), as_chosen = [
        json.loads(each.communicate()[0]) for each in asked
    ]
    if plain < PAGES:
        pytest.skip("this kernel backs large allocations with huge pages by itself")
    assert within < PAGES // 10
    assert before > PAGES and on_a_gpu > PAGES  # a GPU's tensors are not the C library's
    assert medium < PAGES // 10  # a busy machine costs a few
    # Given back. What later work pays depends on the holes that happen to be in the heap.
    assert kept - left > PAGES
    assert as_chosen[0] < PAGES  # what a person has chosen stays


def test_deterministic_asks_torch_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Ring")  # a person's choice
    fills: Any = torch.utils.deterministic
    assert fills.fill_uninitialized_memory
    with torch_settings(CPU, deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # told of, and no end
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] and os.environ["NCCL_ALGO"] == "Ring"
        assert not fills.fill_uninitialized_memory  # it would write each new tensor once more
    assert fills.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.delenv("NCCL_ALGO")
    with pytest.raises(ZeroDivisionError), torch_settings(CPU, deterministic=True):
        assert os.environ["NCCL_ALGO"] == "^NVLS"  # whose sums have no order
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled() and "NCCL_ALGO" not in os.environ


@pytest.mark.parametrize(("precision", "products"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")])
def test_a_gpus_float32_is_what_the_precision_says_and_is_put_back(precision: str, products: str) -> None:
    cudnn: Any = torch.backends.cudnn
    kinds: tuple[Any, Any] = (cudnn.conv, torch.backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    with torch_settings(torch.device("cuda"), precision=precision):
        game(World(), precision="fp32")  # which sets nothing by itself
        assert [kind.fp32_precision for kind in kinds] == [products, products]
    assert [kind.fp32_precision for kind in kinds] == before
    assert torch.backends.cudnn.allow_tf32  # raises while some convolutions differ from it
    with torch_settings(torch.device("cuda")):
        assert [kind.fp32_precision for kind in kinds] == before


def test_training_sets_torch_as_its_configuration_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[bool] = []

    class Stop(Exception):
        pass

    def opened(*args: Any) -> Any:
        found.append(torch.are_deterministic_algorithms_enabled())
        raise Stop

    monkeypatch.setattr(setup, "open_for_training", opened)
    for wanted in ("auto", "false", "true"):
        config = load_config("configs/demo.yaml", [f"train.deterministic={wanted}", "data.shards=/none"])
        with pytest.raises(Stop):
            trainer.train(config, run_dir=tmp_path / "run", console=False)
    assert found == [False, False, True]


def test_auto_is_deterministic_on_a_gpu_and_changes_nothing_on_a_cpu() -> None:
    gpu = torch.device("cuda")
    assert [resolve_deterministic(asked, gpu) for asked in ("auto", True, False)] == [True, True, False]
    assert [resolve_deterministic(asked, CPU) for asked in ("auto", True, False)] == [False, True, False]


def test_a_restart_that_resolves_otherwise_says_so(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trainer.train(small(dataset), run_dir=tmp_path / "other", overrides=["train.deterministic=true"], max_steps=1)
    assert "; deterministic kernels; samples in memory" in capsys.readouterr().out
    trainer.train(small(dataset), run_dir=run, max_steps=1)
    assert "kernels" not in capsys.readouterr().out
    environment = json.loads((run / "environment.json").read_text())
    assert environment["resolved"]["deterministic"] is False
    environment["resolved"]["deterministic"] = True  # as on a GPU
    environment["torch"] = "1.0"
    (run / "environment.json").write_text(json.dumps(environment))
    trainer.train(small(dataset), run_dir=run, max_steps=2, console=False)
    starts = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    notes = [note.split(":")[0] for note in starts[-1]["notes"]]
    assert notes == [
        "deterministic resolved to True before and to False now",
        f"torch was 1.0 before and is {torch.__version__} now",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_games_on_a_gpu_have_the_same_bits() -> None:
    from gan_dist.distributed.world import World
    from gan_dist.training.runner import make_runner
    from tests.helpers.games import batches, game, tensors

    device = torch.device("cuda", 0)
    found = []
    with torch_settings(device, deterministic=True):
        for _ in range(2):
            update = game(World(device=device), precision="bf16")
            runner = make_runner("captured", update)
            for step in range(20):
                runner.step(*batches(update, step))
            found.append(tensors(update))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
