"""How much the parts measure, and on what: a GPU, or in a dry run a CPU that plays one."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gan_dist.bench.step import build, time_steps
from gan_dist.distributed.world import World
from gan_dist.training.runner import Runner
from gan_dist.training.torch_settings import torch_settings
from gan_dist.training.update import Precision, Update

KEPT = "part.json"
LIMITS = {"matmul_gflop_per_second": 1e9, "copy_gb_per_second": 1e9}


@dataclass(frozen=True)
class Plan:
    """What the parts of a command ask about: devices and sizes."""

    device: torch.device
    precision: Precision
    shape: dict[str, int]
    batches: tuple[int, ...]
    large_batch: int
    seconds: float
    """Of each measurement."""
    rounds: int
    runners: tuple[str, ...]
    """Those that the device can do, by their names in a configuration."""
    words: tuple[str, ...] = ()
    """What a command line of gan-dist train needs in addition."""
    paintings: int = 103_250
    painted: int = 4000
    """Images that are truly painted; the others are these again."""
    resolution: int = 64
    steps: int = 2000
    """Of a run that is evaluated."""
    dry: bool = False

    @property
    def world(self) -> World:
        """Returns the one rank that measures."""
        return World(device=self.device)

    def images_per_second(
        self,
        batch: int,
        wrap: Callable[[Update], Runner],
        deterministic: bool = False,
        fill: bool = False,
        kernels: str = "auto",
    ) -> float:
        """Returns the median over steps of an update that `wrap` makes a runner of.

        `kernels` are train.batchnorm_kernels. `fill`: with torch's default of writing NaN into each new tensor, which
        only shows where it is deterministic.
        """
        torch._dynamo.reset()
        with torch_settings(self.device, deterministic, self.precision):
            memory: Any = torch.utils.deterministic
            before, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, fill
            try:
                update, reals, latents = build(self.world, batch, self.precision, self.shape, kernels)
                runner = wrap(update)
                try:
                    return batch / statistics.median(time_steps(self.world, runner, reals, latents, self.seconds))
                finally:
                    runner.close()
            finally:
                memory.fill_uninitialized_memory = before

    def microseconds(self, function: Callable[[], Any], repeats: int = 30) -> float:
        """Returns the time of one call inside a CUDA graph of its own, so that launches do not count."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        found = []
        for _ in range(1 if self.dry else repeats):
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return 1e6 * statistics.median(found)


GPU = Plan(
    device=torch.device("cuda", 0),
    precision="bf16",
    shape={"resolution": 64, "latent_dim": 100, "channels": 64},
    batches=(128, 1024),
    large_batch=4096,
    seconds=1.0,
    rounds=5,
    runners=("eager", "captured"),
)
_TINY = ("model.resolution=32", "model.latent_dim=8", "model.g_channels=4", "model.d_channels=4", "train.device=cpu")
DRY = Plan(
    device=torch.device("cpu"),
    precision="fp32",
    shape={"resolution": 32, "latent_dim": 8, "channels": 4},
    batches=(2,),
    large_batch=4,
    seconds=0.01,
    rounds=1,
    runners=("eager",),
    words=(*_TINY, "train.epochs=1", "train.global_batch=16", "evaluate.samples=100", "log.scalars_every=2"),
    paintings=110,
    painted=11,
    resolution=32,
    steps=4,
    dry=True,
)


def keep(work: Path, figures: dict[str, Any]) -> None:
    """Keeps what a part has measured so far: it counts even if the part does not come to its end."""
    initialized: Callable[[], bool] = torch.cuda.is_initialized
    device = torch.cuda.get_device_name() if initialized() else None
    whole = work / f"{KEPT}.tmp"
    whole.write_text(json.dumps({"device": device, **figures}), encoding="utf-8")
    whole.replace(work / KEPT)


def kept(work: Path) -> dict[str, Any]:
    """Returns what was kept last, empty where nothing was."""
    if not (work / KEPT).exists():
        return {}
    figures: dict[str, Any] = json.loads((work / KEPT).read_text(encoding="utf-8"))
    return figures


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """Within it CUDA's objects work on a CPU, nothing is compiled, and the machine's limits are not measured."""
    import pytest

    from gan_dist.bench import step
    from tests.bench import compare_step
    from tests.helpers.fake_cuda import play_cuda

    with pytest.MonkeyPatch.context() as patch:
        play_cuda(patch)
        patch.setattr(torch, "compile", lambda function, **options: function)
        for module in (step, compare_step):
            patch.setattr(module, "machine_limits", lambda device, precision: LIMITS)
        patch.setattr(compare_step, "elsewhere", lambda *words: nullcontext(lambda: 1.0))
        patch.setattr(compare_step, "tutorial_step", lambda *words: lambda: None)
        yield
