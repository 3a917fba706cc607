from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist

from gan_dist.bench import step as bench
from gan_dist.bench.step import bench_step
from gan_dist.distributed.world import World
from gan_dist.training.runner import Eager
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.games import CPU, batches, game
from tests.helpers.ranks import run_ranks

SMALL: dict[str, Any] = {"resolution": 32, "latent_dim": 8, "channels": 4, "seconds": 0.05, "precision": "fp32"}


HONEST_LIMITS = bench.machine_limits
LIMITS = {"matmul_gflop_per_second": 100.0, "copy_gb_per_second": 10.0}


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "machine_limits", lambda device, precision: LIMITS)


def test_a_sweep_reports_the_fastest_and_its_parts() -> None:
    lines: list[str] = []
    found = bench_step(World(), batches=(4, 8), log=lines.append, **SMALL)
    assert found["images_per_second"] == max(row["images_per_second"] for row in found["sweep"])
    assert [row["batch"] for row in found["sweep"]] == [4, 8]
    assert len(lines) == 2
    parts = found["milliseconds"]
    assert parts["collectives"] == 0
    assert 0 < parts["optimizer"] < parts["d_step"] + parts["g_step"]
    assert found["spread"][0] <= found["images_per_second"] <= found["spread"][1]
    assert found["matmul_share"] == pytest.approx(
        found["gflop_per_image"] * found["batch"] / (parts["step"] / 1e3) / found["matmul_gflop_per_second"]
    )
    assert "scaling" not in found


def test_the_work_of_the_papers_shapes_is_counted_and_the_generators_step_makes_no_d_weight_gradient() -> None:
    update, reals, latents = bench.build(World(), 2, "fp32", {"resolution": 64, "latent_dim": 100, "channels": 64})
    gflop, _ = bench.work(update, reals, latents)
    assert gflop / 2 == pytest.approx(2.275, abs=0.001)  # with D's weight gradients in the G step it is 2.48

    capped = {"resolution": 128, "latent_dim": 8, "channels": 2, "max_channels": 8}
    networks = bench.build(World(), 2, "fp32", capped)[0]
    widest = [
        max(len(bias) for name, bias in one.network.named_parameters() if "bias" in name)
        for one in (networks.g, networks.d)
    ]
    assert widest == [8, 8]

    small = game()
    lean, _ = bench.work(small, *batches(small, 0))
    honest = small.generator_pass
    small.generator_pass = lambda *passed: _thawed(small, honest, *passed)  # type: ignore[method-assign]
    assert bench.work(small, *batches(small, 1))[0] > lean  # the count sees D's weight gradients where there are any


def _thawed(update: Any, honest: Any, *passed: torch.Tensor) -> Any:
    update.d.network.requires_grad_(True)
    return honest(*passed)


def test_out_of_memory_is_one_line_with_the_largest_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench.build

    def small_device(world: World, batch: int, *rest: Any) -> Any:
        if batch > 5:
            raise torch.OutOfMemoryError("no")
        return honest(world, batch, *rest)

    monkeypatch.setattr(bench, "build", small_device)
    with pytest.raises(GanDistError, match="out of device memory at batch 8; the largest batch that fits is 5"):
        bench_step(World(), batches=(8,), **SMALL)
    found = bench_step(World(), batches=(4, 8), **SMALL)
    assert found["batch"] == 4
    assert found["sweep"][1]["out_of_memory"]


def test_a_runner_that_fails_is_a_row_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Eager):
        def step(self, *words: Any) -> torch.Tensor:
            raise GanDistError("the step could not be captured")

    honest: Any = bench.__dict__["make_runner"]
    monkeypatch.setattr(
        bench, "make_runner", lambda name, update: Failing(update, "") if name == "auto" else honest(name, update)
    )
    lines: list[str] = []
    found = bench_step(World(), batches=(4,), runners=("auto", "eager"), log=lines.append, **SMALL)
    assert found["runner"] == "eager" and "could not be captured" in found["sweep"][0]["error"]
    assert "batch 4, auto: the step could not be captured" in lines
    with pytest.raises(GanDistError, match="could not be captured"):
        bench_step(World(), batches=(4,), **SMALL)


def test_a_limit_that_the_step_exceeds_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    low = {"matmul_gflop_per_second": 1e-6, "copy_gb_per_second": 1e6}
    monkeypatch.setattr(bench, "machine_limits", lambda device, precision: low)
    lines: list[str] = []
    found = bench_step(World(), batches=(4,), log=lines.append, **SMALL)
    assert found["matmul_share"] is None and found["copy_share"] < 1
    assert "more than the matmul rate that was measured, which is no limit then, 0% of the copy rate" in lines[0]


def test_limits_are_the_best_of_the_steps_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_product_rate", lambda device, dtype, side: side / 1024)
    monkeypatch.setattr(bench, "_convolution_rates", lambda device, dtype, batch, channels, side: (channels, 7.0))
    monkeypatch.setattr(bench, "_best", lambda device, function: 1.0)
    assert HONEST_LIMITS(CPU, "fp32")["matmul_gflop_per_second"] == 256
    monkeypatch.undo()
    assert min(bench._convolution_rates(CPU, torch.float32, 2, 4, 8)) > 0


def test_each_row_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    bench_step(World(), batches=(4, 6), runners=("eager",), **SMALL)
    assert len(resets) == 2


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.runner=captured records a CUDA graph"):
        bench_step(World(), runners=("captured",), **SMALL)
    with pytest.raises(UserError, match="expected an image a rank or more, found 4 ranks"):
        bench_step(World(size=4), batches=(3,), **SMALL)


def _rank(rank: int, folder: str) -> None:
    bench.machine_limits = lambda device, precision: LIMITS
    dist.init_process_group("gloo")
    group: Any = dist.new_group([0, 1])
    world = World(rank=rank, size=2, device=CPU, group=group, control=group)
    torch.save(bench_step(world, batches=(4, 8), **SMALL), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_report_what_they_gain_over_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, _rank, folder)
        found = torch.load(Path(folder) / "0.pt", weights_only=False)
    scaling = found["scaling"]
    assert found["world_size"] == 2
    assert found["milliseconds"]["collectives"] > 0
    assert 0 < scaling["collectives_share"] < 1
    assert scaling["images_per_second_per_rank"] == pytest.approx(found["images_per_second"] / 2)
    assert set(scaling["one_rank_images_per_second"]) == {"4", "8"}
    assert "2 ranks" in scaling["verdict"]
