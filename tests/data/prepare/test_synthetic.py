"""The painted set: the same pictures every time, sound or broken as asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gan_dist.data.prepare.synthetic import paint, paint_folder


def test_a_painting_is_a_function_of_seed_and_number() -> None:
    assert paint(3, 1).tobytes() == paint(3, 1).tobytes()
    assert len({paint(i, s).tobytes() for i in range(4) for s in range(2)}) == 8
    assert paint(0, 0, (50, 30)).size == (50, 30)


def test_paintings_have_structure() -> None:
    """More of their variance is shared by neighbours than noise would have."""
    for index in range(12):
        gray = np.asarray(paint(index).convert("L"), dtype=np.float64)
        assert gray.std() > 10
        assert np.abs(np.diff(gray, axis=0)).mean() < 0.5 * gray.std()


def test_a_folder_is_reproducible_and_its_last_files_are_broken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        paint_folder(tmp_path / name, 20, seed=2, broken=4)
    files = sorted((tmp_path / "a").iterdir())
    assert [path.read_bytes() for path in files] == [(tmp_path / "b" / path.name).read_bytes() for path in files]
    assert len(files) == 20 and len({path.suffix for path in files}) >= 4
    for path in files[:16]:
        with Image.open(path) as image:
            image.load()
    for path in files[16:]:
        with pytest.raises((OSError, SyntaxError)), Image.open(path) as image:
            image.load()
