"""How the update runs: eagerly, compiled, captured as a CUDA graph, or both. The algorithm is update.py's alone.

Shapes never change inside a run, so each runner prepares once, at its first step.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from gan_dist.distributed.world import World
from gan_dist.training.update import NO_REQUESTS, Precision, Requests, Update
from gan_dist.utils.errors import GanDistError, UserError, first_line

RUNNERS = ("eager", "compiled", "captured", "captured_compiled")
PASSES = ("generate", "change", "discriminator_pass", "generator_pass")
WARM_UP_STEPS = 3
"""Steps before a capture: cuDNN chooses its algorithms and the allocator finds its blocks (torch's manual)."""


class Runner(Protocol):
    """Something that steps."""

    name: str
    """One of RUNNERS: what `auto` came to."""
    reason: str
    """Why, in one clause, for the console."""

    def step(
        self,
        reals: Sequence[Tensor],
        latents: Sequence[Tensor],
        requests: Requests = NO_REQUESTS,
        draws: Sequence[Tensor] = (),
    ) -> Tensor:
        """Returns STATS as Update.step does; the vector is valid until the following call."""

    def close(self, orderly: bool = True) -> None:
        """Frees what the runner holds of the device; not `orderly` after an error, when the device may be broken.

        To be called before the process group is destroyed: NCCL waits, without end, for every CUDA graph that recorded
        one of its collectives.
        """


class Eager:
    """Calls the update as it is written."""

    name = "eager"

    def __init__(self, update: Update, reason: str) -> None:
        self.update = update
        self.reason = reason

    def step(
        self,
        reals: Sequence[Tensor],
        latents: Sequence[Tensor],
        requests: Requests = NO_REQUESTS,
        draws: Sequence[Tensor] = (),
    ) -> Tensor:
        return self.update.step(reals, latents, requests, draws)

    def close(self, orderly: bool = True) -> None:
        """Has nothing to free."""


class Compiled:
    """Compiles the update's four passes, batch-norm collectives included, each as one graph.

    Gradients, the all-reduce and fused Adam stay between the graphs: so it is right on every torch from 2.11, where one
    graph of the whole step is silently wrong before 2.14.
    """

    name = "compiled"

    def __init__(self, update: Update, reason: str, backend: str = "inductor") -> None:
        self.update = update
        self.reason = reason
        for name in PASSES:
            compiled = torch.compile(getattr(update, name), backend=backend, fullgraph=True, dynamic=False)
            setattr(update, name, compiled)

    def step(
        self,
        reals: Sequence[Tensor],
        latents: Sequence[Tensor],
        requests: Requests = NO_REQUESTS,
        draws: Sequence[Tensor] = (),
    ) -> Tensor:
        try:
            return self.update.step(reals, latents, requests, draws)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise GanDistError(
                f"torch.compile could not compile the step ({first_line(error)}); set train.runner=eager"
            ) from error

    def close(self, orderly: bool = True) -> None:
        """Has nothing to free."""


class Captured:
    """Records one step as a CUDA graph and replays it: one launch a step instead of some hundreds.

    The graph has the addresses of everything: inputs are copied into buffers of its own, state moves in place only.
    With `compiled` it records the passes as Compiled makes them.
    """

    def __init__(self, update: Update, reason: str, may_fall_back: bool = False, *, compiled: bool = False) -> None:
        self.name = "captured_compiled" if compiled else "captured"
        self.update = Compiled(update, reason).update if compiled else update
        self.reason = reason
        self.may_fall_back = may_fall_back
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.stats = torch.empty(0)

    def step(
        self,
        reals: Sequence[Tensor],
        latents: Sequence[Tensor],
        requests: Requests = NO_REQUESTS,
        draws: Sequence[Tensor] = (),
    ) -> Tensor:
        if self.graph is None and self.name != "eager":
            self._capture_or_fall_back(reals, latents, draws)
        if self.graph is None:
            return self.update.step(reals, latents, requests, draws)
        for static, value in zip(self.inputs, (*reals, *latents, *draws), strict=True):
            static.copy_(value, non_blocking=True)
        for slot, request in zip(self.requests, requests, strict=True):
            slot.fill_(request)
        self.graph.replay()
        return self.stats

    def close(self, orderly: bool = True) -> None:
        """Destroys the graph; when `orderly`, after its last replay has ended."""
        if self.graph is not None:
            with nullcontext() if orderly else suppress(RuntimeError):
                if orderly:
                    torch.cuda.synchronize(self.update.world.device)
                self.graph.reset()
        self.graph, self.inputs, self.stats = None, [], torch.empty(0)

    def _capture_or_fall_back(
        self, reals: Sequence[Tensor], latents: Sequence[Tensor], draws: Sequence[Tensor]
    ) -> None:
        """Captures, or becomes an eager runner where that may be and some rank could not capture.

        The ranks agree by their hosts after the warm-up, before anything waits for the device, and again after the
        recording, which runs nothing yet. A rank that is lost in the warm-up leaves the others' devices waiting in its
        collectives: then all end, with one reason, long before NCCL's watchdog ends them without a word.
        """
        world = self.update.world
        self.inputs = [value.clone() for value in (*reals, *latents, *draws)]
        self.requests = torch.zeros(len(NO_REQUESTS), device=world.device)
        first, second = len(reals), len(reals) + len(latents)
        words = (self.inputs[:first], self.inputs[first:second], self.requests, self.inputs[second:])
        kept = self.update.snapshot()
        with _convolutions_by_trial():
            failures = self._together(lambda: self._warm_up(words))
            if 0 < len(failures) < world.size:
                error = GanDistError(f"the step could not be warmed up for capture ({failures[0]}); {self._instead}")
                error.exit_now = True
                error.reported_elsewhere = not failures[0].startswith(f"rank {world.rank} ")
                raise error
            if not failures:
                failures = self._together(lambda: self._record(words, kept))
        if not failures:
            return
        self.update.load_state_dict(kept)
        self.close(orderly=False)
        reason = f"the step could not be captured ({failures[0]})"
        if not self.may_fall_back:
            raise GanDistError(f"{reason}; {self._instead}")
        self.name, self.reason = "eager", reason

    @property
    def _instead(self) -> str:
        return f"set train.runner={'captured' if self.name == 'captured_compiled' else 'eager'}"

    def _together(self, work: Callable[[], None]) -> list[str]:
        """Returns on every rank why `work` failed on those where it did: `rank 1 on host: ...`, or the reason alone.

        Raises torch's OutOfMemoryError on the ranks where that is why, and on the others what names the first of them.
        """
        handled, world = sys.exception(), self.update.world
        failure: RuntimeError | None = None
        try:
            work()
        except RuntimeError as error:
            failure = error
        reason = None if failure is None else first_line(_root(failure, handled))
        full = isinstance(failure, torch.OutOfMemoryError)
        told = world.gather_objects((world.host, reason, full))
        failures = [
            (f"rank {rank} on {host}: {reason}" if world.size > 1 else reason, full)
            for rank, (host, reason, full) in enumerate(told)
            if reason is not None
        ]
        if any(full for _, full in failures):
            if full and failure is not None:
                raise failure
            elsewhere = GanDistError(next(reason for reason, full in failures if full))
            elsewhere.exit_now = elsewhere.reported_elsewhere = True
            raise elsewhere
        return [reason for reason, _ in failures]

    def _warm_up(self, words: Any) -> None:
        """Plays some steps on a side stream."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    self.update.step(*words)
        finally:
            torch.cuda.current_stream().wait_stream(side)

    def _record(self, words: Any, kept: dict[str, Any]) -> None:
        """Restores the state that the warm-up changed, and records a step."""
        self.update.load_state_dict(kept)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the prefetch thread and NCCL's watchdog may call CUDA while this thread records.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.stats = self.update.step(*words)


@contextmanager
def _convolutions_by_trial() -> Iterator[None]:
    """Within it cuDNN takes the kernels that it finds fastest, unless the run is to repeat its bits: then these would
    depend on what else the GPU did in that moment."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _root(error: BaseException, handled: BaseException | None) -> BaseException:
    """Returns what `error` began with: torch's own for a failed capture hides it. `handled` was there before."""
    while (earlier := error.__cause__ or error.__context__) is not None and earlier is not handled:
        error = earlier
    return error


def make_runner(name: str, update: Update) -> Runner:
    """Returns the runner `name`, or what `auto` means, saying why.

    auto: captured on a GPU whose collectives a CUDA graph can record, else eager.
    Raises UserError for a runner that the device cannot do.
    """
    device = update.world.device
    if name not in ("auto", *RUNNERS):
        raise UserError(f"train.runner: expected auto, {', '.join(RUNNERS)}, found {name!r}")
    if name == "auto":
        if device.type == "cuda" and not _records(update.world):
            return Eager(update, "a CUDA graph cannot record gloo's collectives")
        if device.type == "cuda":
            reason = "one launch a step; whether captured_compiled is faster has not been measured"
            return Captured(update, reason, may_fall_back=True)
        return Eager(update, "on a CPU the convolutions bound the step, and compiling costs a minute at the start")
    if name in ("captured", "captured_compiled"):
        if device.type != "cuda":
            raise UserError(
                f"train.runner={name} records a CUDA graph, but this rank drives {device.type}; "
                "use eager, compiled or auto"
            )
        if not _records(update.world):
            raise UserError(
                f"train.runner={name} records a CUDA graph, which cannot record gloo's collectives; "
                "set dist.backend=nccl, or use eager or auto"
            )
        return Captured(update, "set by train.runner", compiled=name == "captured_compiled")
    if name == "compiled":
        if device.type == "cpu" and not compiler():
            raise UserError(
                "train.runner=compiled needs a C++ compiler (g++ or clang++) and found none; install one, or use eager"
            )
        return Compiled(update, "set by train.runner")
    return Eager(update, "set by train.runner")


def _records(world: World) -> bool:
    """Returns whether a CUDA graph can record the world's collectives."""
    return world.group is None or "cuda:nccl" in dist.get_backend_config(world.group)


def compiler() -> str | None:
    """Returns the path of the C++ compiler that torch.compile would use on a CPU, or None."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and (path := shutil.which(candidate)):
            return path
    return None


def native_bf16(device: torch.device) -> bool:
    """Returns whether the device multiplies bfloat16 in hardware: x86 with AMX or AVX512-BF16, NVIDIA from Ampere."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    probes: list[Any] = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16")]
    return any(probe() for probe in probes)


def resolve_precision(name: str, device: torch.device) -> tuple[Precision, str]:
    """Returns the precision that `name` (a Precision or auto) means on `device`, and why in one clause.

    auto: bf16 where the device has it natively, else fp32. Raises UserError for one that the device cannot do.
    """
    native = native_bf16(device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
    if name == "auto":
        return ("bf16", f"{kind} has it natively") if native else ("fp32", f"{kind} has no bf16 of its own")
    if name not in get_args(Precision):
        raise UserError(f"train.precision: expected auto, {', '.join(get_args(Precision))}, found {name!r}")
    if name == "bf16" and not native:
        raise UserError(
            f"train.precision=bf16, but {kind} has no bf16 of its own (emulation is many times slower); use fp32"
        )
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"train.precision=tf32 is an NVIDIA GPU's, but this rank drives {device.type}; use fp32")
    precision: Any = name
    return precision, "set by train.precision"
