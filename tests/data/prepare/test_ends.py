"""Whether pixels end where their data do, in formats whose decoders do not say so; and what libtiff and libwebp say."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gan_dist.data.prepare import avif, ends, libtiff, structure, tiff, webp
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.prepare import prepare
from tests.bench import damage
from tests.helpers.images import encode
from tests.helpers.tiff import tiff as tiff_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's remarks on odd files
SIZE = (96, 64)
RGB = damage.picture(1, "RGB").resize(SIZE)
GRAY, PALETTE = RGB.convert("L"), RGB.quantize(60)
BITS = damage.picture(1, "RGB").resize((301, 200)).convert("1")


def literal(row: bytes, most: int, first: Callable[[int], int]) -> bytes:
    """Returns a row as packets of bytes as they are, whose first byte tells their number."""
    parts = [row[i : i + most] for i in range(0, len(row), most)]
    return b"".join(bytes([first(len(part))]) + part for part in parts)


def planes() -> list[bytes]:
    """Returns the rows of the three bands, one band after the other."""
    return [row.tobytes() for band in RGB.split() for row in np.asarray(band)]


def psd(packed: bool) -> bytes:
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIZE[1], SIZE[0], 8, 3) + bytes(12)
    rows = [literal(row, 70, lambda n: n - 1) for row in planes()]
    if not packed:
        return head + b"\0\0" + b"".join(planes())
    return head + b"\0\1" + struct.pack(f">{len(rows)}H", *map(len, rows)) + b"".join(rows)


def bitmap_psd(packed: bool) -> bytes:
    """Returns a PSD of one bit a pixel, whose rows have eighths of the bytes."""
    rows = [row.tobytes() for row in np.packbits(~np.asarray(BITS), axis=1)]
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, BITS.height, BITS.width, 1, 0) + bytes(12)
    if not packed:
        return head + b"\0\0" + b"".join(rows)
    rows = [literal(row, 70, lambda n: n - 1) for row in rows]
    return head + b"\0\1" + struct.pack(f">{len(rows)}H", *map(len, rows)) + b"".join(rows)


def sgi() -> bytes:
    flipped = [planes()[band * SIZE[1] + y] for band in range(3) for y in reversed(range(SIZE[1]))]
    rows = [literal(row, 70, lambda n: n | 128) + b"\0" for row in flipped]
    sizes = [len(row) for row in rows]
    starts = [512 + 8 * len(rows) + sum(sizes[:i]) for i in range(len(rows))]
    head = struct.pack(">HBBHHHHIII80sI404x", 474, 1, 1, 3, *SIZE, 3, 0, 255, 0, b"", 0)
    return head + struct.pack(f">{2 * len(rows)}I", *starts, *sizes) + b"".join(rows)


def sun() -> bytes:
    pixels = np.asarray(RGB)[..., ::-1].tobytes().replace(b"\x80", b"\x80\0")
    return struct.pack(">8I", 0x59A66A95, *SIZE, 24, len(pixels), 2, 0, 0) + pixels


def bmp() -> bytes:
    whole = encode(PALETTE, "BMP")
    start = int.from_bytes(whole[10:14], "little")
    rows = np.asarray(PALETTE)[::-1]
    pixels = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in rows)[:-2] + b"\0\1"
    head = bytearray(whole[:start])
    head[2:6], head[30:38] = struct.pack("<I", start + len(pixels)), struct.pack("<II", 1, len(pixels))
    return bytes(head) + pixels


def plain_ppm() -> bytes:
    numbers = " ".join(map(str, np.asarray(RGB).ravel()))
    return f"P3\n# by hand\n{SIZE[0]} {SIZE[1]}\n255\n{numbers}\n".encode()


FILES = {
    "GIF": encode(PALETTE, "GIF", interlace=0),
    "GIF, interlaced": encode(PALETTE, "GIF", interlace=1),
    "GIF, film": encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
    "TGA": encode(RGB, "TGA", compression="tga_rle"),
    "PCX": encode(RGB, "PCX"),
    "PCX, palette": encode(PALETTE, "PCX"),
    "PCX, gray": encode(GRAY, "PCX"),
    "SUN": sun(),
    "PPM": encode(RGB, "PPM"),
    "PPM, text": plain_ppm(),
    "SGI": encode(RGB, "SGI"),
    "SGI, packed": sgi(),
    "PSD": psd(packed=False),
    "PSD, packed": psd(packed=True),
    "PSD, bitmap": bitmap_psd(packed=False),
    "PSD, packed bitmap": bitmap_psd(packed=True),
    "BMP, packed": bmp(),
    "TIFF, PackBits": encode(RGB, "TIFF", compression="packbits"),
    "TIFF, Group 4": encode(RGB.convert("1"), "TIFF", compression="group4"),
    "TIFF, Group 3": encode(RGB.convert("1"), "TIFF", compression="group3"),
    "TIFF, JPEG CMYK": encode(RGB.convert("CMYK"), "TIFF", compression="jpeg"),
    "WebP": encode(RGB, "WEBP", quality=85),
    "WebP, lossless": encode(RGB, "WEBP", lossless=True),
    "WebP, film": encode(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)], quality=85),
}


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_were_doubled_or_lost_are_seen(name: str) -> None:
    data = FILES[name]
    expected = PALETTE if "GIF" in name or "alette" in name or "BMP" in name else RGB
    expected = GRAY if "gray" in name else BITS if "bitmap" in name else expected
    if "WebP" not in name and "Group" not in name and "JPEG" not in name:
        difference = square(data, Recipe(64)).pixels.astype(int) - square(encode(expected), Recipe(64)).pixels
        assert np.abs(difference).max() <= 1
    assert damage.outcome(data) == ""
    middle = len(data) * 2 // 5
    for place in (middle, middle + 60, middle + 200):
        assert damage.outcome(data[: place + 90] + data[place:]), ("doubled", place)
        assert damage.outcome(data[:place] + data[place + 90 :]), ("lost", place)


@pytest.mark.parametrize("name", ["GIF", "TGA", "PCX", "SUN"])
def test_what_a_decoder_leaves_needs_to_be_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control."""
    data = FILES[name]
    bad = [data[: place + 256] + data[place:] for place in range(len(data) // 3, len(data) - 300, len(data) // 40)]
    found = sum(bool(damage.outcome(each)) for each in bad)
    monkeypatch.setattr(ends, "streamed", lambda image, data: None)
    assert found > sum(bool(damage.outcome(each)) for each in bad)


def test_libtiff_needs_to_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control; and an account of it where that is impossible."""
    bad = bytearray(FILES["TIFF, Group 4"])
    bad[len(bad) // 2 : len(bad) // 2 + 20] = np.random.default_rng(0).bytes(20)
    assert damage.outcome(bytes(bad)) == "corrupt"
    monkeypatch.setattr(libtiff, "_library", lambda: None)
    assert damage.outcome(bytes(bad)) == "" and not libtiff.available()


def test_what_cannot_be_heard_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encode(RGB))
    assert libtiff.available() and webp.available() and avif.available()
    assert not prepare(tmp_path / "in", tmp_path / "all", workers=0).notes
    for module in (libtiff, webp, avif):
        monkeypatch.setattr(module, "_library", lambda: None)
    notes = prepare(tmp_path / "in", tmp_path / "less", workers=0).notes
    expected = ("TIFF", "WebP", *(["AVIF"] if find_spec("PIL._avif") else []))
    assert [word in note for word, note in zip(expected, notes, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize(
    "name", ["PSD, packed", "PSD, packed bitmap", "SGI, packed", "TIFF, Group 4", "TIFF, PackBits", "BMP, packed"]
)
def test_rows_that_were_overwritten_are_seen(name: str) -> None:
    data, rng = FILES[name], np.random.default_rng(0)
    for place in range(len(data) // 2, len(data) - 250, max(1, len(data) // 8)):
        assert damage.outcome(data[:place] + rng.bytes(200) + data[place + 200 :]), place


@pytest.mark.parametrize("name", FILES)
def test_what_ends_early_is_named_so(name: str) -> None:
    data = FILES[name]
    late = () if "film" in name or name in ("PCX, palette", "PCX, gray") else (0.6, 0.9, 0.97)  # all pixels are there
    for share in (0.1, 0.25, *late):
        with pytest.raises(Rejected) as caught:
            square(data[: int(len(data) * share)], Recipe(32))
        assert caught.value.reason == "truncated", (share, caught.value)


def test_a_packed_sgi_whose_table_is_damaged_is_corrupt() -> None:
    data = bytearray(FILES["SGI, packed"])
    data[512] = 1  # its first row would begin at 16 MB
    with pytest.raises(Rejected) as caught:
        square(bytes(data), Recipe(32))
    assert caught.value.reason == "corrupt"


def test_the_oldest_header_of_bmps_says_nothing_of_packing() -> None:
    """Where later ones say it, it has colours."""
    head = struct.pack("<IHHHH", 12, 8, 3, 1, 8) + bytes([9, 9, 9, 0, 1, 0, 0, 0, 0]) + bytes(768 - 9)
    data = b"BM" + struct.pack("<IHHI", 14 + len(head) + 24, 0, 0, 14 + len(head)) + head + bytes(24)
    assert data[30:34] == b"\1\0\0\0" and "odd_structure" not in square(data, Recipe(32)).flags


def packed_bmp(pixels: bytes, size: tuple[int, int] = (8, 4), bits: int = 8, shift: int = 0, stated: int = 0) -> bytes:
    """Returns a BMP of these packed pixels, of which colour i is (16 (i % 16), 0, 0); `shift`: bytes before them;
    `stated`: bytes that the header says they have too many."""
    palette = b"".join(bytes((0, 0, i % 16 * 16, 0)) for i in range(2**bits)) + bytes(shift)
    start, length = 54 + len(palette), len(pixels) + stated
    head = b"BM" + struct.pack("<IHHI", start + length, 0, 0, start)
    head += struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, 1 if bits == 8 else 2, length, 0, 0, 0, 0)
    return head + palette + pixels


PACKED: dict[str, tuple[bytes, list[int | tuple[int, ...]], bool]] = {
    "mark that is cut": (b"\x08\x11\0\0\x08\x22\0\0\x08\x33\0\0\x08\x44\0\2", [1, 2, 3, 4], False),
    "rows that end early": (b"\x08\x11\0\0\4\x22\0\0\x08\x33\0\0\x08\x44\0\1", [1, (2, 4), 3, 4], True),
    "empty rows": (b"\x08\x11\0\0\0\0\0\0\x08\x44\0\1", [1, 0, 0, 4], True),
    "only an end": (b"\0\1", [0, 0, 0, 0], True),
    "early end": (b"\x08\x11\0\0\4\x22\0\1", [1, (2, 4), 0, 0], True),
    "jump over rows": (b"\x08\x11\0\2\0\2\0\0\x08\x44\0\1", [1, 0, 0, 4], True),
    "jump within a row": (b"\0\2\4\1\4\x22\0\0\x08\x33\0\0\x08\x44\0\1", [0, (0, 4, 2), 3, 4], True),
    "pixels as they are": (
        b"\0\5\x11\x11\x11\x11\x22\0\3\x22\0\0\x08\x22\0\0\0\0\x08\x44\0\1",
        [(1, 4, 2), 2, 0, 4],
        True,
    ),
    "each row ends": (b"\x08\x11\0\0\x08\x22\0\0\x08\x33\0\0\x08\x44\0\0\0\1", [1, 2, 3, 4], True),
    "a row too many": (b"\x08\x11\0\0\x08\x22\0\0\x08\x33\0\0\x08\x44\0\0\x08\x55\0\1", [1, 2, 3, 4], False),
    "a row too long": (b"\x09\x11\0\0\x08\x22\0\0\x08\x33\0\0\x08\x44\0\1", [1, 2, 3, 4], False),
    "more after its end": (b"\x08\x11\0\0\x08\x22\0\1\x08\x33\0\1", [1, 2, 0, 0], False),
    "no mark of the end": (b"\x08\x11\0\0\x08\x22\0\0\x08\x33\0\0\x08\x44", [1, 2, 3, 4], False),
}
"""Packed rows of 8 pixels, the last row first: a row's colour, or its first colour, of how many, and the others'."""


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", PACKED)
def test_packed_bmps(name: str, bits: int, shift: int) -> None:
    """Rows may be empty, and the pixels may begin at an odd byte."""
    pixels, rows, sound = PACKED[name]
    if bits == 4:
        pixels = pixels.replace(b"\0\5\x11\x11\x11\x11\x22", b"\0\5\x11\x11\x22")
    expected = np.zeros((4, 8), int)
    for y, row in enumerate(rows):
        first, count, rest = (*row, 0)[:3] if isinstance(row, tuple) else (row, 8, 0)
        expected[3 - y] = [first] * count + [rest] * (8 - count)
    made = square(packed_bmp(pixels, bits=bits, shift=shift), Recipe(4, resample="box", full_decode=True))
    assert np.array_equal(made.pixels[0], 16 * expected[:, 2:6])
    assert ("odd_structure" not in made.flags) == sound


def test_a_packed_bmp_ends_where_it_says() -> None:
    """Unless it says what its pixels would take without being packed."""
    rows = b"\x08\1\0\0\x08\2\0\0\x08\3\0\0\x08\4\0\1"
    for extra, stated, sound in (
        (b"", 0, True),
        (b"\0\0\0", 0, True),
        (b"", 2, False),
        (b"", 32 - len(rows), True),
        (b"", -2, False),
        (b"\7", 0, False),
    ):
        flags = square(packed_bmp(rows + extra, stated=stated), Recipe(4)).flags
        assert ("odd_structure" not in flags) == sound, (extra, stated)
    for bits, cut in (
        (8, rows[:-5]),
        (8, b"\0\x08\1\1\1\1\1\1\1\1\0\0" * 3 + b"\0\x08\4\4\4"),
        (4, b"\0\x08\x11\x11\x11"),
    ):
        with pytest.raises(Rejected, match="truncated"):
            square(packed_bmp(cut, bits=bits), Recipe(4))
        kept = square(packed_bmp(cut, bits=bits), Recipe(4, keep_truncated=True))
        assert "truncated" in kept.flags and kept.pixels.any()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_tiff_need_not_state_its_subsampling(subsampling: int) -> None:
    """libtiff corrects the tag by the strip, and warns of it; the pixels are right."""
    strip = encode(RGB, "JPEG", quality=95, subsampling=subsampling)
    data = tiff_of(np.asarray(RGB), photometric=6, packed=strip, tags={259: (3, [7])})
    difference = square(data, Recipe(64)).pixels.astype(int) - square(encode(RGB), Recipe(64)).pixels
    assert damage.outcome(data) == "" and np.abs(difference).mean() < 4
    middle = len(data) - len(strip) // 2
    assert damage.outcome(data[:middle] + bytes(200) + data[middle + 200 :])


def test_errors_that_do_not_end_the_decoding_are_heard() -> None:
    """Pillow lets libtiff go on after an error in a strip of YCbCr."""
    data = encode(RGB.convert("YCbCr"), "TIFF", compression="tiff_lzw")
    assert damage.outcome(data) == ""
    middle = len(data) // 4
    assert damage.outcome(data[:middle] + bytes(512) + data[middle + 512 :]) == "corrupt"


def test_threads_do_not_hear_each_other() -> None:
    bad = bytearray(FILES["TIFF, Group 4"])
    bad[len(bad) // 2 : len(bad) // 2 + 20] = np.random.default_rng(0).bytes(20)
    inside, left, heard = threading.Event(), threading.Event(), list[str]()

    def other() -> None:
        with libtiff.messages() as said:
            inside.set()
            left.wait(10)
            Image.open(io.BytesIO(bad)).load()
        heard.extend(said.errors + said.warnings)

    thread = threading.Thread(target=other)
    with libtiff.messages() as mine:
        thread.start()
        inside.wait(0.3)
    left.set()
    thread.join()
    assert heard and not mine.errors + mine.warnings


def test_a_pillow_without_webp_prepares_other_files() -> None:
    code = (
        "import sys; sys.modules['PIL._webp'] = None\n"
        "from gan_dist.data.prepare import prepare, webp\n"
        "assert not webp.available() and webp.decode(b'', 'RGB', (1, 1)) is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@given(st.text("1 \n\t\v", max_size=40), st.integers(1, 9))
def test_words_are_counted_across_blocks(text: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ends, "_BLOCK", block)
        assert ends._words(text.encode()) == len(text.split())


def test_numbers_in_text_are_counted_in_little_memory() -> None:
    data = b"P3\n500 200\n255\n" + b"70 " * 300_001
    tracemalloc.start()
    try:
        assert ends._numbers_left_over(data, (500, 200)) == 1
        assert tracemalloc.get_traced_memory()[1] < 5 * ends._BLOCK
    finally:
        tracemalloc.stop()


def test_bytes_after_the_pixels_that_do_no_harm() -> None:
    """Padding, what may follow in each format, and a code of the end in a block of its own."""
    for name in ("GIF", "PCX", "SUN", "PPM", "SGI", "PSD, packed", "WebP"):
        assert damage.outcome(FILES[name] + bytes(20)) == "", name
    assert damage.outcome(FILES["PPM"] + FILES["PPM"]) == ""
    assert damage.outcome(FILES["GIF"][:-1] + b"!\xfe\7comment\0;") == ""
    for edge in (1, 2, 3, 5, 8):
        tiny = RGB.resize((edge, edge))
        for format in ("GIF", "TGA", "PCX", "PPM", "SGI", "WEBP", "QOI"):
            options = {"compression": "tga_rle"} if format == "TGA" else {}
            assert damage.outcome(encode(tiny, format, **options)) == "", (format, edge)


@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"quality": 20}, {"lossless": True}, {"quality": 70, "method": 0}]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webps_are_decoded_as_pillow_does(mode: str, options: dict[str, int]) -> None:
    picture = RGB.resize((333, 250)).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    data = encode(picture, "WEBP", **options)
    made = webp.decode(data, mode, picture.size)
    assert made is not None and np.array_equal(np.asarray(made), np.asarray(Image.open(io.BytesIO(data))))
    assert webp.decode(data, mode, (picture.width, 100)) is None  # another size than it says
    flat = encode(Image.new(mode, (400, 300), "white"), "WEBP", **options)
    assert damage.outcome(flat) == ""


def test_changed_bits_and_holes_of_a_webp_are_seen() -> None:
    """In grain, and in flat areas, where a hole of zeros is hardly to be told from what is coded there."""
    page = Image.new("RGB", (320, 240), "white")
    page.paste(RGB.resize((120, 90)), (100, 90))
    rng, missed, made = np.random.default_rng(1), 0, 0
    for picture in (damage.picture(1, "RGB"), page):
        data = encode(picture, "WEBP", quality=85)
        sound = damage.pillow(data)
        assert sound is not None
        for i in range(40):
            place = int(rng.integers(len(data) // 8, len(data) - 100))
            hole = bytes(60) if i % 2 else bytes([data[place] ^ 1 << i % 8])
            bad = data[:place] + hole + data[place + len(hole) :]
            after = damage.pillow(bad)
            if after is None or np.abs(after - sound).mean() > damage.LIMIT:
                made += 1
                missed += not damage.outcome(bad)
    assert made > 30 and missed <= made // 20


DEFLATED: dict[str, Callable[[], bytes]] = {
    "RGB": lambda: encode(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "predictor": lambda: encode(RGB, "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
    "gray": lambda: encode(GRAY, "TIFF", compression="tiff_adobe_deflate"),
    "palette": lambda: encode(PALETTE, "TIFF", compression="tiff_adobe_deflate"),
    "CMYK": lambda: encode(RGB.convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
    "RGBA": lambda: encode(RGB.convert("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
    "16 bits": lambda: tiff_of(np.asarray(GRAY).astype(np.uint16) * 257, deflated=True, rows=16),
    "16 bits, big-endian": lambda: tiff_of(
        np.asarray(GRAY).astype(np.uint16) * 200, deflated=True, rows=16, big_endian=True
    ),
}


@pytest.mark.parametrize("name", DEFLATED)
def test_deflated_strips_are_proved_without_being_unpacked_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, unpacked, inflate = DEFLATED[name](), list[bytes](), tiff._inflate

    def noted(strip: bytes) -> None:
        unpacked.append(strip)
        inflate(strip)

    monkeypatch.setattr(tiff, "_inflate", noted)
    assert damage.outcome(data) == "" and not unpacked
    middle = len(data) // 2
    for bad in (data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :], data[:middle] + data[middle + 9 :]):
        assert damage.outcome(bad)


def test_large_strips_are_not_copied_to_be_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of memory has no room for several copies of a picture in one strip."""
    data, unpacked = DEFLATED["predictor"](), list[bytes]()
    monkeypatch.setattr(tiff, "_inflate", unpacked.append)
    monkeypatch.setattr(tiff, "_MOST_PROVED", 3 * RGB.width * RGB.height)
    assert damage.outcome(data) == "" and not unpacked
    monkeypatch.setattr(tiff, "_MOST_PROVED", 3 * RGB.width * RGB.height - 1)
    assert damage.outcome(data) == "" and unpacked


def test_what_cannot_be_proved_is_unpacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes, turned pictures, inverted grey."""
    values, unpacked = np.asarray(GRAY), list[bytes]()
    files = [
        tiff_of(np.asarray(RGB), photometric=2, planes=True, deflated=True),
        tiff_of(values, deflated=True, tags={274: (3, [6])}),
        tiff_of(values, deflated=True, photometric=0),
    ]
    monkeypatch.setattr(tiff, "_inflate", unpacked.append)
    for number, data in enumerate(files):
        assert damage.outcome(data) in ("", "oriented") and len(unpacked) > number


def test_what_is_not_read_here_is_no_damage() -> None:
    for data in (b"P7\nWIDTH 4\nHEIGHT 4\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + bytes(48), b"PF\n4 4\n-1.0\n" + bytes(192)):
        with pytest.raises(Rejected, match="unsupported"):
            square(data, Recipe(32))
    rows = "".join(f'"{"  x" * 4}",\n' for _ in range(4))
    xpm = '/* XPM */\nstatic char *a[] = {\n"4 4 1 3",\n"  x c none-such",\n' + rows + "};\n"
    with pytest.raises(Rejected, match="unsupported"):
        square(xpm.encode(), Recipe(32))


def test_an_icon_that_lost_bytes_is_truncated() -> None:
    data = encode(RGB.convert("RGBA"), "ICO", bitmap_format="bmp", sizes=[(48, 32)])
    assert damage.outcome(data) in ("", "alpha_ignored")
    with pytest.raises(Rejected, match="truncated"):
        square(data[:800] + data[1000:], Recipe(32))


J2K: list[dict[str, Any]] = [
    {},
    {"irreversible": True, "quality_mode": "rates", "quality_layers": [20, 8, 4]},
    {"tile_size": (64, 48), "plt": True},
    {"no_jp2": True, "precinct_size": (64, 64), "codeblock_size": (16, 16), "progression": "RPCL"},
]


@pytest.mark.parametrize("options", J2K)
def test_bytes_that_jpeg_2000_never_writes_are_seen(options: dict[str, Any]) -> None:
    picture = damage.picture(2, "RGB")
    data = encode(picture, "JPEG2000", **options)
    assert damage.outcome(data) == ""
    rng, seen = np.random.default_rng(5), 0
    for _ in range(20):
        place = int(rng.integers(len(data) // 4, len(data) - 1000))
        seen += bool(damage.outcome(data[:place] + rng.bytes(512) + data[place + 512 :]))
    assert seen >= 6  # six in ten have such bytes
    for pair in (b"\xff\x90", b"\xff\xff", b"\xff\x92", b"\xff\x91\0\4"):
        assert damage.outcome(data[: len(data) // 2] + pair + data[len(data) // 2 + len(pair) :])


@pytest.mark.parametrize("in_a_tile", [False, True])
def test_marker_segments_between_packets_are_sound_where_they_are_announced(in_a_tile: bool) -> None:
    """A code stream of two parts of tiles, made by hand: segments SOP and EPH around the headers of packets."""

    def stream(style: int, packets: bytes) -> bytes:
        cod = b"\xff\x52" + struct.pack(">HB", 12, style) + bytes(9)
        head = b"\xff\x4f\xff\x51" + struct.pack(">H", 41) + bytes(39) + (b"" if in_a_tile else cod)
        own = cod if in_a_tile else b""
        length = 12 + len(own) + 2 + len(packets)
        parts = [b"\xff\x90" + struct.pack(">HHIBB", 10, 0, n, 0, 1) + own + b"\xff\x93" + packets for n in (length, 0)]
        return head + b"".join(parts) + b"\xff\xd9"

    packets = b"".join(
        b"\xff\x91\0\4" + number + b"\xc0\xff\x7f" + b"\xff\x92" + b"\xff\x8f\1\2"
        for number in (b"\0\0", b"\0\xff", b"\xff\x90", b"\xff\xff", b"\n\n")
    )
    assert structure.odd(stream(6, packets), "JPEG2000") is None
    for style, damaged in ((0, packets), (2, packets), (4, packets), (6, packets.replace(b"\xff\x8f", b"\xff\xa0"))):
        assert structure.odd(stream(style, damaged), "JPEG2000")
    assert structure.odd(stream(6, packets + b"\xff\x91\1\2\3\4"), "JPEG2000")  # no SOP
    after = b"\0\0\0\x18uuid" + b"\xff\x90\xff\xff" * 4
    for rest in (after, bytes(40), b""):
        assert structure.odd(stream(6, packets) + rest, "JPEG2000") is None
    thumbnail = stream(6, packets)
    boxes = struct.pack(">I", 8 + len(thumbnail)) + b"uuid" + thumbnail
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + boxes + struct.pack(">I", 8 + len(thumbnail)) + b"jp2c"
    assert structure.odd(boxes + thumbnail + after, "JPEG2000") is None
    assert structure.odd(boxes + stream(6, packets.replace(b"\xff\x8f", b"\xff\xa0")) + after, "JPEG2000")
    for cut in range(len(stream(6, packets))):
        structure.odd(stream(6, packets)[:cut], "JPEG2000")  # raises nothing


def test_bytes_that_were_inserted_into_a_plain_tiff_are_seen() -> None:
    picture = damage.picture(3, "RGB")
    data, exif = encode(picture, "TIFF"), Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"x" * 100
    with_exif = encode(picture, "TIFF", exif=exif)
    pages = encode(picture, "TIFF", save_all=True, append_images=[picture])
    stack = encode(picture, "TIFF", description="ImageJ=1.53\nimages=2") + b"x" * 1000
    for sound in (data, data + b"\n", data + bytes(1000), with_exif, pages, stack):
        assert damage.outcome(sound) == ""
    for place in (len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        assert damage.outcome(data[:place] + data[place - 512 :]) == "odd_structure"


@pytest.mark.parametrize("fill", [b"\n", b"\r\n", bytes(100)])
def test_what_fills_a_qoi_up_is_nothing(fill: bytes) -> None:
    data = encode(damage.picture(3, "RGB"), "QOI")
    assert damage.outcome(data + fill) == ""
    assert damage.outcome(data + b"x") == damage.outcome(data[: len(data) // 2] + bytes(len(data) // 2)) == "corrupt"


def test_a_cut_qoi_is_filled_with_little_and_black() -> None:
    """Pillow decodes it in Python, a pixel at a time."""
    data = encode(damage.picture(3, "RGB"), "QOI")
    for cut in range(len(data) // 2, len(data) // 2 + 12):  # within and between pixels
        filled = structure.filled_up(data[:cut])
        assert len(filled) - cut < 320 * 240 // 50
        pixels = np.asarray(Image.open(io.BytesIO(filled)).convert("RGB"))
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(pixels[:80], whole[:80]) and not pixels[-80:].any()
