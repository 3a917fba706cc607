"""Whatever arithmetic a layer takes, values and gradients are those of torch's own convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gan_dist.model.convolution import conv_down, conv_up, fold, from_latents, to_logits
from tests.helpers.dispatch import Log

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "from_latents": (
        from_latents,
        lambda x, w: F.conv_transpose2d(x[:, :, None, None], w),
        (5, 6),
        (6, 3, 4, 4),
    ),
    "to_logits": (to_logits, lambda x, w: F.conv2d(x, w).flatten(), (5, 6, 4, 4), (1, 6, 4, 4)),
    **{
        f"conv_down {side}": (conv_down, lambda x, w: F.conv2d(x, w, None, 2, 1), (5, 3, side, side), (7, 3, 4, 4))
        for side in (8, 16)
    },
    **{
        f"conv_up {side}": (
            conv_up,
            lambda x, w: F.conv_transpose2d(x, w, None, 2, 1),
            (5, 7, side, side),
            (7, 3, 4, 4),
        )
        for side in (4, 8)
    },
}


def _both_ways(layer: Callable[..., Tensor], maps: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    maps, weight = maps.clone().requires_grad_(), weight.clone().requires_grad_()
    out = layer(maps, weight)
    return (out.detach(), *torch.autograd.grad(out, [maps, weight], upstream))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_torchs(case: str, channels_last: bool) -> None:
    ours, theirs, *shapes = CASES[case]
    stream = torch.Generator().manual_seed(3)
    maps, weight = (torch.randn(shape, dtype=torch.float64, generator=stream) for shape in shapes)
    upstream = torch.randn(theirs(maps, weight).shape, dtype=torch.float64, generator=stream)
    expected = _both_ways(theirs, maps, weight, upstream)
    if channels_last:
        maps, weight, upstream = (
            t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (maps, weight, upstream)
        )
    for found, wanted in zip(_both_ways(ours, maps, weight, upstream), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", ["conv_down 8", "conv_up 4"])
def test_under_autocast_the_weights_gradient_is_float32_and_as_near_as_torchs(case: str) -> None:
    ours, theirs, (_, *shape), weights = CASES[case]
    stream = torch.Generator().manual_seed(4)
    maps, weight = torch.randn(64, *shape, generator=stream), torch.randn(weights, generator=stream)
    upstream = torch.randn(theirs(maps, weight).shape, generator=stream)
    exact = _both_ways(theirs, *(t.double() for t in (maps, weight, upstream)))
    with torch.autocast("cpu", torch.bfloat16):
        low = maps.bfloat16(), weight, upstream.bfloat16()
        found, torchs = _both_ways(ours, *low), _both_ways(theirs, *low)
    assert [t.dtype for t in found] == [t.dtype for t in torchs] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for mine, other, wanted in zip(found, torchs, exact, strict=True):
        error, common = ((t.double() - wanted).norm() / wanted.norm() for t in (mine, other))
        assert error < 1.2 * common + 1e-6


@pytest.mark.parametrize("case", ["conv_down 8", "conv_up 4"])
def test_under_autocast_maps_may_come_in_float32(case: str) -> None:
    ours, _, *shapes = CASES[case]
    maps, weight = (torch.randn(shape, requires_grad=True) for shape in shapes)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(maps, weight)
    assert out.dtype == torch.bfloat16
    assert [one.dtype for one in torch.autograd.grad(out.float().sum(), [maps, weight])] == [torch.float32] * 2


@pytest.mark.parametrize("case", ["conv_down 8", "conv_up 4"])
def test_a_frozen_weight_costs_no_product(case: str) -> None:
    ours, theirs, *shapes = CASES[case]
    maps, weight = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    maps.requires_grad_()
    with FlopCounterMode(display=False) as frozen:
        (found,) = torch.autograd.grad(ours(maps, weight).sum(), maps)
    (expected,) = torch.autograd.grad(theirs(maps, weight).sum(), maps)
    torch.testing.assert_close(found, expected)
    with FlopCounterMode(display=False) as free:
        torch.autograd.grad(ours(maps, weight.requires_grad_()).sum(), [maps, weight])
    assert free.get_total_flops() == 1.5 * frozen.get_total_flops()


def test_a_folded_weight_takes_nothing_from_the_host() -> None:
    """A CUDA graph cannot record a copy out of pageable memory."""
    with FakeTensorMode(), Log() as log:
        assert fold(torch.empty(5, 4, 3, 3, device="cuda")).shape == (5, 4, 4, 4)
    assert log.launches and not log.elsewhere
