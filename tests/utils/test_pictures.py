"""Grids of images are those that torchvision makes."""

from __future__ import annotations

import pytest
import torch
from torchvision.utils import make_grid

from gan_dist.utils.pictures import grid, grid_side


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (1, 4), (2, 1), (3, 5), (4, 2), (7, 3), (12, 12)])
def test_a_grid_is_that_of_torchvision(count: int, columns: int, padding: int) -> None:
    images = torch.randint(0, 255, (count, 3, 4, 6), dtype=torch.uint8)
    page = grid(images, columns, padding)
    assert torch.equal(page, make_grid(images, nrow=columns, padding=padding, pad_value=255))
    square = grid(images[..., :4], columns, padding)
    assert max(square.shape) == grid_side(count, 4, min(columns, count), padding)
