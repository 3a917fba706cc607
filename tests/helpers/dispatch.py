"""What a step asks of a GPU, counted without one: fake CUDA tensors and a log of every operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gan_dist.distributed.world import World

KERNELS = {
    # ours: batchnorm_triton.py and losses_triton.py say what each launches
    "gan_dist::batch_statistics": 2,
    "gan_dist::gradient_sums": 2,
    # torch's: sums, their inverse and the running statistics, the result; sums and the result
    "aten::_native_batch_norm_legit": 3,
    "aten::native_batch_norm": 3,
    "aten::cudnn_batch_norm": 3,
    "aten::native_batch_norm_backward": 2,
    "aten::cudnn_batch_norm_backward": 2,
    "aten::convolution_backward": 2,
}
"""How many kernels an operation launches where it is not one."""
NOTHING = {
    "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::set_", "aten::_local_scalar_dense",
}  # fmt: skip
"""Operations that launch nothing, beside those that return views."""
ONLY_WRITTEN = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_"}
"""Operations that do not read what they write."""


class Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts launches, collectives and the bytes that pass through memory, and notes what leaves the GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.order: list[tuple[str, int]] = []
        """Each collective and how many numbers it takes in."""
        self.reduced = 0
        """Bytes that collectives take in."""
        self.elsewhere: list[str] = []
        """Operations with a tensor that is not on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        read, written = _tensors((args, kwargs)), _tensors(out)
        if any(tensor.device.type != "cuda" for tensor in (*read, *written)):
            self.elsewhere.append(str(func))
        if name.startswith("c10d::"):
            self.collectives[name.removeprefix("c10d::").rstrip("_")] += 1
            taken = _tensors(args[1] if "gather" in name else args[0])
            self.order.append((name, sum(tensor.numel() for tensor in taken)))
            self.reduced += _bytes(taken)
        elif name.startswith(("aten::", "gan_dist::")) and name not in NOTHING and not func.is_view:
            self.launches[name] += KERNELS.get(name, 1)
            written = written or [tensor for tensor in read if "!" in str(func._schema)]
            if name in ONLY_WRITTEN:
                read = _tensors(args[1:])
            self.num_bytes[name] += _bytes(read) + _bytes(written)
        return out

    @property
    def total(self) -> tuple[int, int]:
        """Launches, without collectives, and bytes."""
        return self.launches.total(), self.num_bytes.total()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _replace(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """Does what nn.Module._apply does by swapping the insides of tensors, which fake ones refuse."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else nn.Parameter(convert(parameter.detach()))
        for name, buffer in part._buffers.items():
            part._buffers[name] = convert(buffer)
    return module


@contextmanager
def fake_gpus(size: int, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> Iterator[World]:
    """Yields a rank of a world of `size` GPUs that do not exist; tensors made within it are fake.

    A fake tensor has a shape and a device, and no values: what asks for one raises.
    """
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(nn.Module, "_apply", _replace)
    group: Any = None
    if size > 1:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        group = dist.distributed_c10d._get_default_group()
    try:
        with FakeTensorMode():
            yield World(rank, size, device=torch.device("cuda", 0), group=group)
    finally:
        if size > 1:
            dist.destroy_process_group()
