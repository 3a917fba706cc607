from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gan_dist.model.batchnorm import BatchNorm


def _pair() -> tuple[BatchNorm, nn.BatchNorm2d]:
    ours, theirs = BatchNorm(5).double(), nn.BatchNorm2d(5).double()
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        ours.bias.normal_(generator=torch.Generator().manual_seed(1))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_alone_it_is_torchs() -> None:
    ours, theirs = _pair()
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_groups_equal_separate_passes_and_not_one_concatenated_pass() -> None:
    ours, theirs = _pair()
    real = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    fake = 3 + 2 * torch.randn(6, 5, 4, 4, dtype=torch.float64)
    both = torch.cat([real, fake]).requires_grad_()
    upstream = torch.randn(12, 5, 4, 4, dtype=torch.float64)
    grouped = ours(both, groups=2)
    separate = torch.cat([theirs(real), theirs(fake)])
    assert torch.equal(grouped, separate)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())  # moved in order
    assert ours.num_batches_tracked == 2
    (gradient,) = torch.autograd.grad(grouped, both, upstream, retain_graph=True)
    halves = [part.clone().requires_grad_() for part in (real, fake)]
    for half, up, ours_half in zip(halves, upstream.chunk(2), gradient.chunk(2), strict=True):
        y = F.batch_norm(half, None, None, theirs.weight, theirs.bias, True)
        torch.testing.assert_close(torch.autograd.grad(y, half, up)[0], ours_half, rtol=1e-13, atol=1e-13)
    concatenated = F.batch_norm(both, None, None, theirs.weight, theirs.bias, True)
    assert (concatenated - grouped).abs().max() > 0.1


def test_under_bf16_the_statistics_stay_float32() -> None:
    ours = BatchNorm(5)
    y = ours(torch.randn(64, 5, 8, 8).to(torch.bfloat16), groups=2)
    assert y.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32
    # bfloat16 holds three digits: a float32 running mean has more than it could.
    assert not torch.equal(ours.running_mean, ours.running_mean.to(torch.bfloat16).float())


class _Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of each of torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_one_group_costs_no_copy_of_its_gradient() -> None:
    ours, x = BatchNorm(5), torch.randn(6, 5, 4, 4, requires_grad=True)
    with _Counts() as counts:
        torch.autograd.grad(ours(x).sum(), x)
    assert "cat.default" not in counts.calls and "split.Tensor" not in counts.calls


def test_ranks_make_no_zeros_for_gradients_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda out, value, group: out.copy_(value))
    monkeypatch.setattr(dist, "all_reduce", lambda value, group: None)
    ours, alone = _pair()
    ours.process_group = object()  # type: ignore[assignment]
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    with _Counts() as counts:
        found = torch.autograd.grad((ours(x) * weights).sum(), [x, ours.weight, ours.bias])
    assert not [name for name in counts.calls if name.startswith(("zeros", "new_zeros"))]
    expected = torch.autograd.grad((alone(x) * weights).sum(), [x, alone.weight, alone.bias])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
