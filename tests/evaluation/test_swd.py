"""Sliced Wasserstein distance: against a plain reference, and as an eye would have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from gan_dist.data.prepare.synthetic import paint
from gan_dist.distributed.world import World
from gan_dist.evaluation import swd

ALONE = World()


@pytest.fixture(scope="module")
def paintings() -> Tensor:
    """400 small paintings, uint8 [400, 3, 64, 64]."""
    pictures = [np.asarray(paint(index, 0, (64, 64)).convert("RGB")) for index in range(400)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def described(images: Tensor, seed: int = 0) -> list[Tensor]:
    return swd.descriptors(images, swd.positions(len(images), images.shape[-1], seed))


def between(real: Tensor, fake: Tensor) -> list[float]:
    return swd.sliced_wasserstein(ALONE, described(real), described(fake), 0)


def reference_pyramid(image: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The Laplacian pyramid of [3, S, S], one shifted copy of the image after the other."""
    line = np.array([1, 4, 6, 4, 1]) / 16

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (1, 2):
            wide = np.pad(x, [(0, 0) if k != axis else (2, 2) for k in range(3)], mode="reflect")
            x = sum(weight * wide.take(range(k, k + x.shape[axis]), axis) for k, weight in enumerate(line))
        return x

    found = []
    while image.shape[-1] > 16:
        coarse = blur(image)[:, ::2, ::2]
        spread = np.zeros_like(image)
        spread[:, ::2, ::2] = coarse
        found.append(image - 4 * blur(spread))
        image = coarse
    return [*found, image]


def reference_distance(real: Tensor, fake: Tensor, *, patches: int = 16, own: bool = False) -> list[float]:
    """The distance patch by patch and direction by direction, in float64; `own`: each set normalised by itself."""
    levels = []
    for number, where in enumerate(swd.positions(len(real), real.shape[-1], 0, patches)):
        sets = []
        for images in (real, fake):
            cut = []
            for image, corners in zip(images.double().numpy() / 127.5 - 1, where.tolist(), strict=True):
                level = reference_pyramid(image)[number]
                cut += [level[:, top : top + 7, left : left + 7].ravel() for top, left in corners]
            sets.append(np.stack(cut))
        source = torch.Generator().manual_seed(0)
        # The directions of this level: the levels draw theirs one after the other.
        drawn = [torch.randn(147, swd.DIRECTIONS, generator=source) for _ in range(number + 1)][-1].double().numpy()
        drawn /= np.linalg.norm(drawn, axis=0)
        lines = []
        for one in sets:
            channels = (one if own else sets[0]).reshape(-1, 3, 49)
            mean, deviation = channels.mean((0, 2)).repeat(49), channels.std((0, 2), ddof=1).repeat(49)
            lines.append(np.sort((one - mean) / deviation @ drawn, axis=0))
        levels.append(1000 * float(np.abs(lines[0] - lines[1]).mean()))
    return levels


def test_it_matches_a_plain_reference(paintings: Tensor) -> None:
    real, fake = paintings[:30], paintings[30:60]
    assert between(real, fake) == pytest.approx(reference_distance(real, fake), rel=1e-4)


def test_the_published_form_matches_a_plain_reference_and_is_blind_to_tint_and_contrast(paintings: Tensor) -> None:
    real, fake = paintings[:20], paintings[20:40]

    def published(fake: Tensor) -> list[float]:
        where = swd.positions(20, 64, 0, swd.PUBLISHED_PATCHES)
        at, there = (swd.descriptors(images, where) for images in (real, fake))
        return swd.sliced_wasserstein(ALONE, at, there, 0, published=True)

    found = published(fake)
    assert found == pytest.approx(reference_distance(real, fake, patches=128, own=True), rel=1e-4)
    faded = (64 + fake * 0.5).round().byte()
    assert sum(published(faded)) < 1.5 * sum(found) < sum(between(real, faded))


def test_a_level_may_be_left_out(paintings: Tensor) -> None:
    where = swd.positions(5, 64, 0)
    for level, expected in enumerate(swd.descriptors(paintings[:5], where)):
        (found,) = swd.descriptors(paintings[:5], [w if i == level else None for i, w in enumerate(where)])
        assert torch.equal(found, expected)


def test_equal_sets_are_at_no_distance_and_order_does_not_matter(paintings: Tensor) -> None:
    assert between(paintings, paintings) == [0.0, 0.0, 0.0]
    at = described(paintings)
    shuffled = [level[torch.randperm(len(level), generator=torch.Generator().manual_seed(1))] for level in at]
    assert swd.sliced_wasserstein(ALONE, at, shuffled, 0) == pytest.approx([0, 0, 0], abs=1e-3)


def blurred(images: Tensor, strength: float) -> Tensor:
    found: Tensor = gaussian_blur(images, [9, 9], [strength, strength])
    return found


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 20 * strength * noise).clamp(0, 255).byte()


def tinted(images: Tensor, strength: float) -> Tensor:
    shift = torch.tensor([15.0, 0, -15.0])[:, None, None] * strength
    return (images + shift).clamp(0, 255).byte()


@pytest.mark.parametrize("damage", [blurred, noisy, tinted])
def test_it_grows_with_damage(paintings: Tensor, damage: object) -> None:
    real, other = paintings[:200], paintings[200:]
    assert callable(damage)
    found = [sum(between(real, other)), *(sum(between(real, damage(other, strength))) for strength in (0.5, 1.0, 2.0))]
    assert found == sorted(found) and found[-1] > 1.5 * found[0]


def test_each_level_tells_of_its_own_scale(paintings: Tensor) -> None:
    real, other = paintings[:200], paintings[200:]
    sound = between(real, other)
    fine = [a / b for a, b in zip(between(real, noisy(other, 1.0)), sound, strict=True)]
    assert fine[0] > 3 * fine[-1]
    broad = [a / b for a, b in zip(between(real, tinted(other, 2.0)), sound, strict=True)]
    assert broad[-1] > 3 * broad[0]


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_levels_of_every_resolution(resolution: int) -> None:
    sides = swd.levels(resolution)
    assert sides[0] == resolution and sides[-1] == 16
    images = torch.rand(2, 3, resolution, resolution)
    assert [level.shape[-1] for level in swd.pyramid(images)] == list(sides)
