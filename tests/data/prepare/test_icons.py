"""Icons and cursors: the largest and deepest picture counts, read as the file that it is, and cursors are icons."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gan_dist.data.prepare import icons
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.sources import skip_kind
from tests.bench import damage
from tests.helpers.images import encode

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's remarks on odd files
RECIPE = Recipe(64, full_decode=True)
SIZE = 64


def picture(mode: str = "RGB", seed: int = 1) -> Image.Image:
    return damage.picture(seed, "RGB").resize((SIZE, SIZE)).convert(mode)


def icon(*files: bytes, kind: int = 1, hints: tuple[int, int] = (0, 0)) -> bytes:
    """Returns an .ico (2: a .cur) of these pictures, each said to have 64 x 64 pixels; `hints`: planes and depth, or in
    a cursor the place of its tip."""
    place, head = 6 + 16 * len(files), struct.pack("<3H", 0, kind, len(files))
    for file in files:
        head += struct.pack("<4B2H2I", SIZE, SIZE, 0, 0, *hints, len(file), place)
        place += len(file)
    return head + b"".join(files)


def bitmap(image: Image.Image, alpha: int | None = None, hidden: int = 0) -> bytes:
    """Returns a picture as icons store it: upside down, doubled height, then a mask of which `hidden` rows are set.
    `alpha`: of all pixels (32 bits)."""
    data = encode(image, "DIB") if alpha is None else b""
    if alpha is not None:
        raw = np.dstack([np.asarray(image.convert("RGB"))[::-1, :, ::-1], np.full((SIZE, SIZE), alpha, np.uint8)])
        data = struct.pack("<IiiHHIIiiII", 40, SIZE, SIZE, 1, 32, 0, raw.size, 0, 0, 0, 0) + raw.tobytes()
    mask = bytes(SIZE // 8 * (SIZE - hidden)) + b"\xff" * (SIZE // 8 * hidden)
    return data[:8] + struct.pack("<i", 2 * SIZE) + data[12:] + mask


def shown(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return square(data, RECIPE).pixels.astype(np.int64)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_a_png_in_an_icon_is_read_as_a_png(mode: str) -> None:
    """Palettes, and one colour that is transparent, too."""
    options: dict[str, Any] = {"transparency": 3} if mode == "P" else {}
    image = picture("RGB").quantize(8) if mode == "P" else picture(mode)
    file = encode(image, **options)
    expected = shown(file)
    icns = b"icns" + struct.pack(">I", 16 + len(file)) + b"icp6" + struct.pack(">I", 8 + len(file)) + file
    for name, data in {"ico": icon(file), "cur": icon(file, kind=2, hints=(3, 32)), "icns": icns}.items():
        assert np.array_equal(shown(data), expected), name
        assert square(data, RECIPE).format == ("ICNS" if name == "icns" else "ICO")


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_bitmaps_in_icons_and_cursors(mode: str, kind: int) -> None:
    expected = shown(encode(picture(mode)))
    half = expected.copy()
    half[:, : SIZE // 2] = 255
    assert np.array_equal(shown(icon(bitmap(picture(mode)), kind=kind, hints=(7, 32))), expected)
    assert np.array_equal(shown(icon(bitmap(picture(mode), hidden=SIZE // 2), kind=kind)), half)


@pytest.mark.parametrize("hints", [(0, 0), (1, 32)])
def test_alpha_of_icons_counts_unless_it_is_zero_everywhere(hints: tuple[int, int]) -> None:
    expected = shown(encode(picture()))
    assert np.array_equal(shown(icon(bitmap(picture(), alpha=255), hints=hints)), expected)
    assert np.array_equal(shown(icon(bitmap(picture(), alpha=0), hints=hints)), expected)
    assert shown(icon(bitmap(picture(), alpha=1), hints=hints)).mean() > 250


def test_of_several_the_deepest_and_largest_counts() -> None:
    deep, small = bitmap(picture()), encode(picture().resize((16, 16)))
    files = [small, bitmap(picture("1", seed=2)), deep, small]
    for order in (files, files[::-1]):
        assert np.array_equal(shown(icon(*order)), shown(encode(picture())))


def test_a_tga_that_begins_as_a_cursor_does_is_none() -> None:
    data = encode(picture(), "TGA")
    assert data.startswith(b"\0\0\2\0") and icons.as_icon(data) is data
    assert np.array_equal(shown(data[: data.index(b"TRUEVISION") - 8]), shown(encode(picture())))


def test_damaged_icons_have_a_reason_and_cursors_are_images() -> None:
    data = icon(encode(picture()))
    for bad in (data[:30], data[: len(data) // 2], icon(b""), icon()):
        with pytest.raises(Rejected) as rejected:
            square(bad, RECIPE)
        assert rejected.value.reason in ("truncated", "corrupt")
    with pytest.raises(Rejected, match="unsupported"):
        square(b"BA(\0\0\0" + bytes(60), RECIPE)  # of OS/2
    assert skip_kind("a/hand.CUR") is None
