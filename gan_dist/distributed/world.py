"""The World: which rank this process is, which device it drives, and the collectives it may call.

gan_dist knows ranks, not clusters: it reads the environment that torchrun writes (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT) and nothing of the scheduler that started it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gan_dist.distributed.rendezvous import meet
from gan_dist.utils.errors import GanDistError, UserError, first_line

T = TypeVar("T")
LEAVE_TIMEOUT = timedelta(seconds=30)
"""How long a rank that is done waits for the others before it leaves alone."""
NCCL_GRACE = timedelta(seconds=120)
"""How much later than the host NCCL's watchdog gives up a collective."""


@dataclass(frozen=True)
class World:
    """This process's place among the ranks that play one game.

    `group` carries the step's tensors (NCCL on GPUs, gloo elsewhere). `control` is a gloo group of its own for
    decisions taken outside steps: they can neither overtake nor block the step's collectives. `aside` is another, for
    the thread that saves. All are None when alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    aside: dist.ProcessGroup | None = None

    @property
    def host(self) -> str:
        """This machine's name."""
        return socket.gethostname()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`, summed over the ranks in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_aside(self, tensor: torch.Tensor) -> Any:
        """Begins to sum `tensor` over the ranks, in place, and returns what waits for it: `.wait()`, on a GPU by its
        stream alone. Only where there are other ranks."""
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def all_gather_into(self, out: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `out` [size, n, ...], filled with every rank's `tensor` [n, ...], in rank order."""
        if self.group is None:
            out[0].copy_(tensor)
        else:
            dist.all_gather_into_tensor(out.flatten(0, 1), tensor, group=self.group)
        return out

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`, overwritten with rank 0's."""
        if self.group is not None:
            dist.broadcast(tensor, src=0, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on at least one rank. A collective: every rank must call it."""
        if self.control is None:
            return flag
        word = torch.tensor([int(flag)])
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.control)
        return bool(word.item())

    def gather_objects(self, value: T) -> list[T]:
        """Returns every rank's `value`, in rank order, on every rank."""
        return self._gather(value, self.control)

    def gather_objects_aside(self, value: T) -> list[T]:
        """As gather_objects, for the one thread beside the main one that may talk to the other ranks' like it."""
        return self._gather(value, self.aside)

    def _gather(self, value: T, group: dist.ProcessGroup | None) -> list[T]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def from_first(self, work: Callable[[], T]) -> T:
        """Returns on every rank what `work` returns on rank 0, the only rank that runs it.

        Raises on every rank the GanDistError or OSError that `work` raised there: no rank waits for one that left.
        """
        if self.control is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (GanDistError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise self._reported_by(0, outcome[1])
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Returns this rank's `work()`; when it fails on any rank, every rank raises the first failing rank's error."""
        if self.control is None:
            return work()
        result: Any = None
        failure: GanDistError | OSError | None = None
        try:
            result = work()
        except (GanDistError, OSError) as error:
            failure = error
        failures = [(rank, error) for rank, error in enumerate(self.gather_objects(failure)) if error is not None]
        if failures:
            raise self._reported_by(*failures[0])
        returned: T = result
        return returned

    def _reported_by(self, rank: int, error: GanDistError | OSError) -> GanDistError | OSError:
        """Returns `error`, marked on all ranks but `rank` so that it is printed once."""
        if isinstance(error, GanDistError):
            error.reported_elsewhere = rank != self.rank
        return error

    def barrier(self) -> None:
        """Waits until every rank has called it."""
        if self.control is not None:
            dist.barrier(group=self.control)


def _environment_int(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} but {name} is {text or 'not set'}; "
            "start ranks with torchrun, or unset WORLD_SIZE to train alone"
        )
    return int(text)


LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""What parallel launchers that make no world tell each process of their number.

All that gan_dist reads of any of them, and only to refuse: whoever starts it so has not gone through launch/.
"""


def refuse_worlds_of_one() -> None:
    """Raises UserError where a launcher started several of these processes, and nothing makes one world of them."""
    for name, launcher in LAUNCHERS.items():
        count = os.environ.get(name, "")
        if "WORLD_SIZE" not in os.environ and count.isdigit() and int(count) > 1:
            raise UserError(
                f"{launcher} started {count} processes, but without WORLD_SIZE each of them would train alone; on "
                "SLURM, train with `python -m launch submit` or slurm/train.sbatch, elsewhere with torchrun (or set "
                "WORLD_SIZE=1 if they are runs of their own)"
            )


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Returns the device a rank drives: its own GPU, or the CPU.

    Raises UserError when a GPU is asked for and there is none for this rank.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UserError(
            "train.device=cuda, but torch sees no CUDA device here; see `gan-dist doctor`, or set train.device=cpu"
        )
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: torch sees {count} on {socket.gethostname()}; "
            "start one rank a GPU, or set train.device=cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join(
    device: str = "auto", backend: str = "auto", init_timeout_s: float = 600, timeout_s: float = 300
) -> Iterator[World]:
    """Joins the ranks of the environment and leaves them on the way out; alone where there is no WORLD_SIZE above 1.

    A process group that the caller has already made (a notebook, a test) is used and left standing.
    Raises UserError for an environment that is half set, for worlds of one that were meant to be one world, and for a
    rank without a device.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if not dist.is_initialized():
        refuse_worlds_of_one()
    if size == 1 and not dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK") or 0)
        chosen = choose_device(device, local_rank)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        yield World(local_rank=local_rank, device=chosen)
        return

    ours = not dist.is_initialized()
    rank = _environment_int("RANK") if ours else dist.get_rank()
    size = size if ours else dist.get_world_size()
    local_rank = _environment_int("LOCAL_RANK") if ours else int(os.environ.get("LOCAL_RANK") or rank)
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if ours:
        name = backend if backend != "auto" else "nccl" if chosen.type == "cuda" else "gloo"
        if name == "nccl" and chosen.type != "cuda":
            raise UserError("dist.backend=nccl moves GPU tensors only, but train.device resolves to cpu; use gloo")
        try:
            store = meet(rank, size, init_timeout_s)
            limit = timedelta(seconds=init_timeout_s)
            dist.init_process_group(name, store=store, timeout=limit, rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:  # torch.distributed's own errors are RuntimeErrors
            raise GanDistError(
                f"rank {rank} of {size} on {socket.gethostname()} could not meet the others at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within {init_timeout_s:g} s: "
                f"{first_line(error)}"
            ) from error
    timeout = timedelta(seconds=timeout_s)
    # A GPU's collectives end the process, without a word, when they time out: the host's own limit comes first.
    later = timeout + NCCL_GRACE if "nccl" in dist.get_backend_config() else timeout
    group: Any = dist.new_group(timeout=later)
    control: Any = dist.new_group(backend="gloo", timeout=timeout)
    aside: Any = dist.new_group(backend="gloo", timeout=timeout)
    world = World(rank, size, local_rank, chosen, group, control, aside)
    try:
        yield world
        # Gloo peers must not see a closed connection while they still send; a rank that is gone must not hold this one.
        dist.monitored_barrier(control, timeout=LEAVE_TIMEOUT)
    except GanDistError as error:
        ours = ours and not error.exit_now  # to destroy the group would wait for its kernels
        raise
    finally:
        if ours:
            dist.destroy_process_group()
