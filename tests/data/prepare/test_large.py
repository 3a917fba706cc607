"""Pictures that are far too large to be decoded whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gan_dist.data.prepare.prepare import prepare
from tests.helpers.sources import balanced, encode, rejects

# Made by another process: what its picture takes is not on this one's account.
MAKE = """
import sys
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
mode, side, progressive, path = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
image = Image.radial_gradient("L").resize((side, side), Image.Resampling.BILINEAR)
(image if mode == "L" else image.convert(mode)).save(path, quality=80, progressive=progressive)
"""


def make(path: Path, side: int, mode: str = "L", progressive: bool = False) -> Path:
    """Writes a square picture and returns its path."""
    subprocess.run([sys.executable, "-c", MAKE, mode, str(side), str(progressive), str(path)], check=True)
    return path


@pytest.mark.timeout(600)
@pytest.mark.parametrize("side", [12_000, pytest.param(30_000, marks=pytest.mark.chaos)])
def test_a_gigapixel_jpeg_costs_little_memory(tmp_path: Path, side: int) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in/huge.jpg", side)
    (tmp_path / "in/small.png").write_bytes(encode(1))
    account = prepare(tmp_path / "in", tmp_path / "out", workers=1)
    assert balanced(account) and account.written == 2
    assert (
        account.peak_worker_bytes < 400 * 2**20
    )  # 1 GiB is the promise; the pixels alone would be 144 to 900 MB in gray


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_what_cannot_be_scaled_is_refused_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in/huge.png", 30_000)
    make(tmp_path / "in/progressive.jpg", 21_000, "L", progressive=True)
    (tmp_path / "in/small.png").write_bytes(encode(1))
    account = prepare(tmp_path / "in", tmp_path / "out", workers=1, max_reject_fraction=1)
    assert rejects(tmp_path / "out") == {"huge.png": "too_large", "progressive.jpg": "too_large"}
    assert account.peak_worker_bytes < 400 * 2**20


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "mode", "side"),
    [
        ("a.png", "RGB", 12_700),
        ("a.png", "RGBA", 12_700),
        ("a.png", "P", 12_700),
        ("a.tif", "RGB", 8_500),
        ("a.tif", "F", 8_300),
        ("a.webp", "RGB", 6_900),
        ("a.jp2", "RGB", 5_700),
        ("a.avif", "RGB", 8_000),
        ("a.gif", "L", 9_900),
    ],
)
def test_the_largest_allowed_keep_the_promise(tmp_path: Path, name: str, mode: str, side: int) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / name, side, mode)
    account = prepare(tmp_path / "in", tmp_path / "out", workers=1)
    print(name, mode, side, account.peak_worker_bytes / 2**20, "MiB")
    assert account.written == 1
    assert account.peak_worker_bytes < 2**30


def test_the_test_can_see_memory(tmp_path: Path) -> None:
    """Were the decode not scaled, the peak would show it: the same picture as a PNG takes its pixels."""
    (tmp_path / "in").mkdir()
    Image.new("L", (12_000, 12_000)).save(tmp_path / "in/huge.png")
    account = prepare(tmp_path / "in", tmp_path / "out", workers=1)
    assert account.written == 1
    assert account.peak_worker_bytes > 130 * 2**20
