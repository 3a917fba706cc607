"""The losses' kernel gives torch's results: in Triton's interpreter, against float64."""

from __future__ import annotations

import importlib
from typing import Any, get_args

import pytest
import torch

from gan_dist.config.schema import LossName
from gan_dist.model import losses
from tests.helpers.games import worst
from tests.helpers.interpreted import OTHER_GAMES, Case, cases, interpreted_results, logits, played, terms_of

pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What the interpreter made of everything."""
    return interpreted_results("save_losses", tmp_path_factory.mktemp("losses"))


@pytest.mark.parametrize("player", ["discriminator", "generator"])
@pytest.mark.parametrize("name", get_args(LossName))
def test_it_equals_torch_in_float64(found: dict[Any, Any], player: str, name: str) -> None:
    mine: list[Case] = [case for case in cases() if case[:2] == (player, name)]
    assert len(mine) >= 3
    for case in mine:
        _, _, count, dtype, target = case
        loss, sums, gradient = found[case]
        expected = terms_of(losses, player, name, logits(count, dtype).double(), target)
        assert gradient.dtype == dtype and loss.dtype == sums.dtype == torch.promote_types(dtype, torch.float32)
        assert sums[0] == loss
        # Sums of numbers with different signs have the digits that their largest terms leave.
        scale = logits(count, dtype).double().square().mean().sqrt() * count
        exact = TOLERANCES[dtype]
        for what, one, other in (("loss", loss, expected[0]), ("sums", sums, expected[1])):
            assert ((one.double() - other).abs() <= exact * (other.abs() + scale * 1e-3)).all(), (
                case,
                what,
                one,
                other,
            )
        # Each to its own digits, however small, but where a target is nearly met: two numbers below 1 differ little.
        near = exact if target is not None else torch.finfo(dtype).tiny
        rounded = 2**-7 if dtype == torch.bfloat16 else exact  # the interpreter cuts digits off
        assert ((gradient.double() - expected[2]).abs() <= rounded * expected[2].abs() + near).all(), (case, gradient)


@pytest.mark.parametrize("name", OTHER_GAMES)
def test_other_games_are_the_same(found: dict[Any, Any], name: str) -> None:
    assert worst(found["games"][name], played(losses, OTHER_GAMES[name])) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # Triton's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", get_args(LossName))
def test_it_is_right_on_a_gpu(name: Any, dtype: torch.dtype) -> None:
    importlib.import_module("gan_dist.model.losses_triton").check(torch.device("cuda", 0), dtype, name)


def test_the_check_passes_the_right_kernel_and_sees_a_wrong_one(found: dict[Any, Any]) -> None:
    assert found["right"] == ["", ""]
    assert all(" of generator_terms differs from torch's by more than 1e-05" in text for text in found["wrong"])
