from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

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
