"""images.square: every mode comes out in the right colours and the right way up; every breakage has its reason."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.transforms import v2

from gan_dist.data.prepare import images
from gan_dist.data.prepare.account import REASONS, Rejected
from gan_dist.data.prepare.images import Recipe, square
from tests.helpers.images import ORANGE, cmyk_jpeg, deep, encode, plain, with_alpha


def texture(size: tuple[int, int] = (200, 150), seed: int = 0) -> Image.Image:
    """Returns a picture of smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def mean(data: bytes, recipe: Recipe | None = None) -> NDArray[np.float64]:
    """Returns the mean colour of the square."""
    made = square(data, recipe or Recipe(32))
    side = (recipe or Recipe(32)).resolution
    assert made.pixels.shape == (3, side, side) and made.pixels.dtype == np.uint8 and made.pixels.flags.c_contiguous
    colour: NDArray[np.float64] = made.pixels.mean(axis=(1, 2))
    return colour


def swapped_profile() -> bytes:
    """Returns a minimal ICC profile whose red is sRGB's blue and the reverse."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"swapped\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body = b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 132 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + struct.pack(
        ">6H", 2026, 1, 1, 0, 0, 0
    )
    head += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("RGB", encode(plain(ORANGE)), ORANGE),
        ("gray", encode(plain(120, "L")), (120, 120, 120)),
        ("1-bit", encode(plain(1, "1")), (255, 255, 255)),
        ("16-bit PNG", encode(deep(0x8080, np.uint16)), (128, 128, 128)),
        ("16-bit TIFF", encode(deep(0x8080, np.uint16), "TIFF"), (128, 128, 128)),
        ("16-bit PGM", b"P5 70 50 65535\n" + b"\x80\x80" * 3500, (128, 128, 128)),
        ("32-bit integers of 8", encode(deep(200, np.int32), "TIFF"), (200, 200, 200)),
        ("32-bit integers of 16", encode(deep(200 * 257, np.int32), "TIFF"), (200, 200, 200)),
        ("float to 1", encode(deep(0.5, np.float32), "TIFF"), (128, 128, 128)),
        ("float to 255", encode(deep(99.0, np.float32), "TIFF"), (99, 99, 99)),
        ("float of nan", encode(deep(float("nan"), np.float32), "TIFF"), (0, 0, 0)),
        ("palette", encode(plain(ORANGE).quantize(4)), ORANGE),
        ("gif", encode(plain(ORANGE), "GIF"), ORANGE),
        ("webp", encode(plain(ORANGE), "WEBP", lossless=True), ORANGE),
        ("bmp", encode(plain(ORANGE), "BMP"), ORANGE),
        ("tga", encode(plain(ORANGE), "TGA"), ORANGE),
        ("progressive", encode(plain(ORANGE), "JPEG", progressive=True, quality=100), ORANGE),
        ("CMYK", cmyk_jpeg(ORANGE, 0), ORANGE),
        ("CMYK not inverted", cmyk_jpeg(ORANGE, None), ORANGE),
        ("YCCK", cmyk_jpeg(ORANGE, 2), ORANGE),
        ("CMYK TIFF", encode(plain((25, 135, 225, 0), "CMYK"), "TIFF"), ORANGE),
        ("YCbCr JPEG", encode(plain(ORANGE).convert("YCbCr"), "JPEG", quality=100), ORANGE),
        ("Lab", encode(plain((128, 128, 128), "LAB"), "TIFF"), (119, 119, 119)),
        ("transparent RGBA", encode(plain((9, 9, 9, 0), "RGBA")), images.BACKGROUND),
        ("half RGBA", encode(plain((*ORANGE, 128), "RGBA")), tuple((v + 255) / 2 for v in ORANGE)),
        ("half LA", encode(plain((101, 128), "LA")), (178, 178, 178)),
        ("transparent palette", encode(with_alpha("P")), tuple((v + 255) / 2 for v in ORANGE)),
        ("left half RGBA", encode(with_alpha("RGBA")), tuple((v + 255) / 2 for v in ORANGE)),
        ("color key", encode(plain((9, 8, 7)), transparency=(9, 8, 7)), (255, 255, 255)),
        ("swapped profile", encode(plain((255, 0, 0)), icc_profile=swapped_profile()), (0, 0, 255)),
        ("broken profile", encode(plain(ORANGE), icc_profile=b"nonsense"), ORANGE),
        (
            "sRGB profile",
            encode(plain(ORANGE), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
            ORANGE,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_modes_come_out_in_the_right_colours(name: str, data: bytes, expected: tuple[float, ...]) -> None:
    assert mean(data) == pytest.approx(np.array(expected), abs=1.6), name


def in_jp2(profile: bytes, image: Image.Image) -> bytes:
    data = encode(image, "JPEG2000")
    at = data.find(b"colr") - 4
    size, start = int.from_bytes(data[at : at + 4], "big"), data.find(b"jp2h") - 4
    box = struct.pack(">I4sBBB", 11 + len(profile), b"colr", 2, 0, 0) + profile
    whole = struct.pack(">I", int.from_bytes(data[start : start + 4], "big") - size + len(box))
    return data[:start] + whole + data[start + 4 : at] + box + data[at + size :]


def in_bmp(profile: bytes, image: Image.Image) -> bytes:
    data = encode(image, "BMP")
    pixels = data[54:]
    header = struct.pack("<I", 124) + data[18:54] + struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0) + b"DEBM" + bytes(48)
    header += struct.pack("<4I", 4, 124 + len(pixels), len(profile), 0)
    return data[:10] + struct.pack("<I", 138) + header + pixels + profile


def in_gif(profile: bytes, image: Image.Image) -> bytes:
    data = encode(image, "GIF")
    at = 13 + 3 * 2 ** (data[10] % 8 + 1)
    pieces = [profile[i : i + 255] for i in range(0, len(profile), 255)]
    blocks = b"".join(bytes([len(piece)]) + piece for piece in pieces)
    return data[:at] + b"\x21\xff\x0bICCRGBG1012" + blocks + b"\0" + data[at:]


def test_colours_are_converted_before_they_are_laid_over_white() -> None:
    half = encode(plain((255, 0, 0, 128), "RGBA"), icc_profile=swapped_profile())
    assert mean(half) == pytest.approx(np.array((127, 127, 255)), abs=2)


def test_a_profile_that_is_called_srgb_may_be_another() -> None:
    """Such as the linear one of GIMP and Krita."""
    swapped = swapped_profile().replace(b"swapped\0", b"a sRGB \0")
    assert mean(encode(plain((255, 0, 0)), icc_profile=swapped)) == pytest.approx(np.array((0, 0, 255)), abs=1.6)


@pytest.mark.parametrize("within", [in_jp2, in_bmp, in_gif])
def test_profiles_that_pillow_does_not_look_for(within: Callable[[bytes, Image.Image], bytes]) -> None:
    data = within(swapped_profile(), plain((255, 0, 0)))
    assert mean(data) == pytest.approx(np.array((0, 0, 255)), abs=1.6)
    assert "profile" in square(data, Recipe()).flags
    nonsense = within(b"nonsense", plain(ORANGE))
    assert mean(nonsense) == pytest.approx(np.array(ORANGE), abs=3)
    assert "profile_ignored" in square(nonsense, Recipe()).flags


def test_a_long_comment_does_not_lose_the_picture() -> None:
    """Photoshop writes megabytes of edit history; Pillow refuses to unpack more than one."""
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    for how in ("add_text", "add_itxt"):
        info = PngImagePlugin.PngInfo()
        getattr(info, how)("History", "x" * 3_000_000, zip=True)
        assert mean(encode(plain(ORANGE), pnginfo=info)) == pytest.approx(np.array(ORANGE), abs=1.6)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


def test_what_is_smaller_than_its_square_is_flagged() -> None:
    assert square(encode(plain(ORANGE, size=(200, 63))), Recipe(64)).flags == ["enlarged"]
    assert square(encode(plain(ORANGE, size=(64, 64))), Recipe(64)).flags == []


def test_transparent_edges_take_no_colour_from_what_is_hidden() -> None:
    hidden = Image.new("RGBA", (256, 256), (255, 0, 0, 0))
    hidden.paste((0, 0, 0, 255), (0, 0, 128, 256))
    red, green, _ = square(encode(hidden), Recipe(32)).pixels.astype(int)
    assert np.array_equal(red, green)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [plain(color) for color in (ORANGE, (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert mean(data) == pytest.approx(np.array(ORANGE), abs=1.6)


@pytest.mark.parametrize("size", [(301, 200), (200, 333), (64, 64), (401, 243)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    stored = texture(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = square(encode(stored, exif=exif.tobytes()), Recipe(32))
    turn = images._TRANSPOSE.get(orientation)
    upright = stored.transpose(turn) if turn is not None else stored
    expected = square(encode(upright), Recipe(32))
    assert (made.width, made.height) == upright.size
    # box reduction starts at the stored corner, so a rest at the other edge may be weighed a little differently
    assert np.abs(made.pixels.astype(int) - expected.pixels).mean() < 0.3
    exact = Recipe(32, full_decode=True)
    turned = square(encode(stored, exif=exif.tobytes()), exact)
    assert np.array_equal(turned.pixels, square(encode(upright), exact).pixels)


@pytest.mark.parametrize("size", [(1203, 901), (905, 1307)])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_of_a_scaled_jpeg_is_applied(orientation: int, size: tuple[int, int]) -> None:
    """At a reduced scale the last row and column stick out of the picture: they must not become the first."""
    stored, exif = texture(size), Image.Exif()
    exif[0x0112] = orientation
    made = square(encode(stored, "JPEG", quality=95, exif=exif.tobytes()), Recipe(32))
    upright = stored.transpose(images._TRANSPOSE[orientation])
    expected = square(encode(upright, "JPEG", quality=95), Recipe(32, full_decode=True)).pixels.astype(int)
    assert (made.width, made.height, made.flags) == (*upright.size, ["oriented"])
    assert np.abs(made.pixels - expected).mean() < 0.5
    assert np.abs(np.roll(made.pixels, 1, axis=2) - expected).mean() > 2


@pytest.mark.parametrize(
    "size",
    [(640, 480), (333, 500), (64, 64), (40, 61), (65, 64), (1001, 77), (128, 129), (34, 2513), (687, 38), (2999, 3)],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_full_decode_with_bilinear_is_torchvisions_resize_and_crop(size: tuple[int, int], format: str) -> None:
    data = encode(texture(size), format)
    for side in (32, 64):
        transform = v2.Compose([v2.Resize(side), v2.CenterCrop(side)])
        expected = np.asarray(transform(Image.open(io.BytesIO(data)).convert("RGB"))).transpose(2, 0, 1)
        assert np.array_equal(square(data, Recipe(side, "bilinear", full_decode=True)).pixels, expected)


@pytest.mark.parametrize("size", [(1600, 1200), (1203, 2001)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_quick_way_stays_close_to_the_full_one(size: tuple[int, int], format: str) -> None:
    data = encode(texture(size), format)
    quick, full = (square(data, Recipe(64, full_decode=full)).pixels.astype(int) for full in (False, True))
    assert np.abs(quick - full).mean() < 0.5
    # the same picture cut elsewhere would differ more: this is a test of place, not only of colour
    assert np.abs(np.roll(quick, 1, axis=2) - full).mean() > 2 * np.abs(quick - full).mean()


@pytest.mark.parametrize("size", [(1, 1), (1, 60000), (60000, 1), (3, 700), (2, 2)])
def test_extreme_shapes_come_out_square(size: tuple[int, int]) -> None:
    assert mean(encode(plain(ORANGE, size=size))) == pytest.approx(np.array(ORANGE), abs=1.6)
    assert mean(encode(plain(ORANGE, size=size), "JPEG", quality=100)) == pytest.approx(np.array(ORANGE), abs=1.6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "L", "I;16"])
def test_strips_make_what_the_whole_makes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = texture((700, 500))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.quantize(32) if mode == "P" else image.convert(mode)
    data = encode(image, "TIFF")
    whole = square(data, Recipe(32)).pixels
    monkeypatch.setattr(images, "STRIP_PIXELS", 10_000)
    assert np.array_equal(square(data, Recipe(32)).pixels, whole)


GOOD = encode(texture(), "JPEG")
GOOD_PNG = encode(texture())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404</body></html>", "not_an_image"),
        (bytes(50), "not_an_image"),
        (GOOD[:50], "truncated"),
        (GOOD[:400], "truncated"),
        (GOOD[:-500], "truncated"),
        (GOOD_PNG[:60], "truncated"),
        (GOOD_PNG[: len(GOOD_PNG) // 2], "truncated"),
        (GOOD_PNG[:17] + b"\7" + GOOD_PNG[18:], "corrupt"),
        (b"\0\0\0\x20ftypheic" + bytes(40), "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported"),
        (b"\xff\x0a" + bytes(40), "unsupported"),
    ],
)
def test_breakages_have_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        square(data, Recipe())
    assert caught.value.reason == reason and reason in REASONS
    assert " at 0x" not in caught.value.detail


def test_small_and_large_are_refused_without_decoding() -> None:
    with pytest.raises(Rejected) as caught:
        square(encode(plain(ORANGE, size=(200, 40))), Recipe(min_side=41))
    assert caught.value.args == ("too_small", "200x40")
    header = encode(plain(0, "1", (8, 8)))
    huge = header[:16] + struct.pack(">II", 100_000, 100_000) + header[24:29]
    huge += struct.pack(">I", __import__("zlib").crc32(huge[12:29])) + header[33:]
    with pytest.raises(Rejected) as caught:
        square(huge, Recipe())
    assert caught.value.reason == "too_large"


def test_truncated_files_are_kept_on_request_and_flagged() -> None:
    recipe = Recipe(32, keep_truncated=True)
    for data in (GOOD[: len(GOOD) * 3 // 4], GOOD_PNG[: len(GOOD_PNG) * 3 // 4]):
        made = square(data, recipe)
        assert made.flags == ["truncated"]
        whole = square(GOOD if data[:2] == GOOD[:2] else GOOD_PNG, Recipe(32)).pixels.astype(int)
        assert np.abs(made.pixels[:, :16] - whole[:, :16]).mean() < 3  # the upper half is all there
    assert square(GOOD, recipe).flags == []


SEEDS = [GOOD, GOOD_PNG, cmyk_jpeg(ORANGE, 2), *(encode(texture((60, 40)), f) for f in ("GIF", "WEBP", "TIFF", "BMP"))]
SEEDS += [encode(texture((50, 40)), format) for format in ("JPEG2000", "AVIF", "ICO", "PPM", "TGA", "DDS", "QOI")]
SEEDS += [encode(texture((90, 70)), "JPEG", progressive=True), encode(texture((60, 40)).quantize(16))]


@settings(max_examples=300, deadline=5000)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0, 1))
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on odd files, which workers do not print
def test_mutated_files_never_crash(data: bytes, changes: list[tuple[float, int]], cut: float) -> None:
    mutated = bytearray(data[: int(len(data) * (1 - cut**4))])
    for where, value in changes:
        if mutated:
            mutated[int(where**2 * (len(mutated) - 1))] = value
    try:
        assert square(bytes(mutated), Recipe(32)).pixels.shape == (3, 32, 32)
    except Rejected as rejected:
        assert rejected.reason in REASONS
