"""What D sees is changed as DiffAugment does: each change against slices and sums, with its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gan_dist.model.augment import NUMBERS, Augment

ALL = Augment(colour=True, translation=True, cutout=True)
ALWAYS, NEVER = torch.tensor(1.0), torch.tensor(0.0)


def _images(count: int, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _numbers(count: int, seed: int = 2) -> Tensor:
    return torch.rand(count, NUMBERS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_changed_where_nothing_is_to_be() -> None:
    images, numbers = _images(5), _numbers(5)
    assert torch.equal(Augment(translation=True, cutout=True)(images, numbers, NEVER), images)
    torch.testing.assert_close(ALL(images, numbers, NEVER), images, rtol=0, atol=1e-15)
    assert not Augment().changes and not Augment(target=0.6).adapts and ALL.changes
    assert ALL(images.bfloat16(), numbers.float(), ALWAYS).dtype == torch.bfloat16


def test_each_change_is_made_with_its_probability() -> None:
    images, numbers = torch.ones(4000, 3, 8, 8, dtype=torch.float64), _numbers(4000)
    for augment in (Augment(colour=True), Augment(translation=True), Augment(cutout=True)):
        changed = (augment(images, numbers, torch.tensor(0.3)) != images).flatten(1).any(1).double().mean()
        # of 3 x 3 shifts one moves nothing
        assert abs(changed - 0.3 * (8 / 9 if augment.translation else 1)) < 0.03, augment


@given(st.integers(0, 2), st.integers(0, 2), st.floats(0.01, 0.32), st.floats(0.01, 0.32))
def test_a_shift_is_a_slice_in_a_field_of_zeros(down: int, right: int, at: float, to: float) -> None:
    images = _images(1, 8)  # an eighth of 8: by -1, 0 or 1
    numbers = torch.tensor([[0, 0, 0, down / 3 + at, right / 3 + to, 0, 0, 0, 0, 0]], dtype=torch.float64)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    expected = padded[:, :, down : down + 8, right : right + 8]
    assert torch.equal(Augment(translation=True)(images, numbers, ALWAYS), expected)


@pytest.mark.parametrize(("at", "rows"), [(0.0, range(4)), (0.5, range(4, 12)), (0.999, range(12, 16))])
def test_a_square_is_cut_out_and_no_more(at: float, rows: range) -> None:
    images = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    numbers = torch.tensor([[0, 0, 0, 0, 0, at, 0.5, 0, 0, 0]], dtype=torch.float64)
    cut = Augment(cutout=True)(images, numbers, ALWAYS)
    expected = images.clone()
    expected[:, :, rows.start : rows.stop, 4:12] = 0
    assert torch.equal(cut, expected)


def test_colours_change_in_brightness_saturation_and_contrast_alone() -> None:
    images = _images(1)

    def changed(*numbers: float) -> Tensor:
        row = torch.tensor([[*numbers, *[0.0] * 7]], dtype=torch.float64)
        return Augment(colour=True)(images, row, ALWAYS)

    torch.testing.assert_close(changed(0.9, 0.5, 0.5), images + 0.4)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(changed(0.5, 0.0, 0.5), grey.expand_as(images))
    torch.testing.assert_close(changed(0.5, 1.0, 0.5), 2 * images - grey)
    torch.testing.assert_close(changed(0.5, 0.5, 0.0), (images + images.mean()) / 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_an_image_is_changed_alike_in_any_batch(count: int, lo: int, hi: int) -> None:
    images, numbers = _images(count), _numbers(count)
    whole = ALL(images, numbers, torch.tensor(0.6))
    part = ALL(images[lo:hi], numbers[lo:hi], torch.tensor(0.6))
    torch.testing.assert_close(part, whole[lo:hi], rtol=1e-14, atol=1e-14)


def test_its_gradient_is_the_changes_own() -> None:
    images, numbers = _images(3, 8).requires_grad_(), _numbers(3)
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(lambda x: ALL(x, numbers, ALWAYS), images)


def test_the_probability_follows_how_sure_d_is() -> None:
    augment = Augment(translation=True, target=0.6, probability=0.8, images_to_full=100)
    assert augment.adapts
    probability, done = torch.tensor(0.0), torch.tensor(0.0)
    for sign, expected in [(0.7, 0.1), (0.9, 0.2), (0.5, 0.1), (0.5, 0.0), (0.1, 0.0)]:
        augment.adapt(probability, torch.tensor(sign, dtype=torch.float64), 10, done)
        assert probability.item() == pytest.approx(expected, abs=1e-6)
    augment.adapt(probability, torch.tensor(1.0), 10_000, done)
    assert probability.item() == pytest.approx(0.8)  # the most
    augment.adapt(probability, torch.tensor(torch.nan), 10, torch.tensor(1.0))  # of a step that was skipped
    assert probability.item() == pytest.approx(0.8)
