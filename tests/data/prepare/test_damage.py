"""Damaged pixels are found in every format; sound ones pass, whatever stands beside them."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from gan_dist.data.prepare import avif, jpeg, png, structure, tiff, webp
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.prepare import prepare
from tests.bench import damage
from tests.helpers.avif import grid
from tests.helpers.images import ORANGE, encode, plain
from tests.helpers.tiff import tiff as tiff_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's remarks on odd files
RECIPE = Recipe(32)
CERTAIN = {
    "JPEG": 5,
    "JPEG, optimised": 5,
    "JPEG, progressive": 4,
    "JPEG, restart markers": 5,
    "JPEG, gray": 5,
    "JPEG, CMYK": 5,
    "PNG": 9,
    "PNG, palette": 9,
    "TIFF, deflate": 9,
    "TIFF, JPEG": 5,
    "AVIF": 9,
}
"""Formats in which at least so many kinds of damage, the gross ones, are always found. Random bytes in a JPEG are not:
one time in some hundred they have no marker among them, and codes for as many blocks as stood there before."""


def texture(size: tuple[int, int] = (320, 240), mode: str = "RGB") -> Image.Image:
    return damage.picture(1, mode).resize(size)


def reason(data: bytes, recipe: Recipe = RECIPE) -> str:
    """Returns the reason for which a file is rejected, or nothing."""
    try:
        square(data, recipe)
    except Rejected as rejected:
        return rejected.reason
    return ""


@pytest.mark.parametrize("name", list(damage.FORMATS))
def test_sound_files_are_never_flagged(name: str) -> None:
    assert [damage.outcome(damage.encode(seed, name)) for seed in range(4)] == [""] * 4


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CERTAIN)), st.integers(0, 8), st.floats(0.2, 0.7), st.integers(0, 2**32))
def test_gross_damage_is_found(name: str, kind: int, where: float, seed: int) -> None:
    """Lost, doubled, overwritten and converted parts, in formats with checksums single bits, too."""
    gross = ["cut", "cut, filled with zeros", "line ends", "512 bytes lost", "512 bytes zero", "512 bytes random"]
    kinds = [*gross, "512 bytes twice", "4 bytes", "one bit"][: CERTAIN[name]]
    data = damage.encode(0, name)
    way = damage.DAMAGES[kinds[kind % len(kinds)]]
    bad = way(data, int(where * len(data)), np.random.default_rng(seed))
    before, after = damage.pillow(data), damage.pillow(bad)
    assert before is not None
    if after is None or np.abs(after - before).mean() > damage.LIMIT:
        assert damage.outcome(bad), (name, kinds[kind % len(kinds)], where)


def jpegs() -> list[bytes]:
    whole = texture((800, 600))
    kinds: list[dict[str, object]] = [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 7}]
    return [encode(whole.convert(mode), "JPEG", quality=92, **kind) for mode in ("RGB", "L", "CMYK") for kind in kinds]


@pytest.mark.parametrize("number", range(12))
def test_what_libjpeg_warns_of_is_rejected(number: int) -> None:
    data = jpegs()[number]
    half = len(data) // 2
    ways = {
        "cut and ended": data[:half] + b"\xff\xd9",
        "middle lost": data[: half // 2] + data[half:],
        "line ends": data.replace(b"\n", b"\r\n"),
        "sector": data[:half] + bytes(8192) + data[half + 8192 :],
        "doubled": data[:half] + data[half - 5000 :],
    }
    reasons = {way: reason(bad) for way, bad in ways.items()}
    assert set(reasons.values()) <= {"corrupt", "truncated"}, reasons
    assert reason(data) == "" and damage.outcome(data) == ""


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(640, 480), (333, 501), (9, 7)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_the_library_that_warns_decodes_as_pillow_does(
    mode: str, size: tuple[int, int], options: dict[str, int]
) -> None:
    data = encode(texture(size, mode), "JPEG", **options)
    for edge in (None, 16, 64):
        header = Image.open(io.BytesIO(data))
        if edge:
            header.draft(None, (edge, edge))
        ours = jpeg.decode(data, header.mode, header.size)
        if mode == "CMYK" and options == {"subsampling": 1}:
            assert ours is None and damage.outcome(data) in ("", "enlarged")  # left to Pillow
            continue
        assert ours is not None
        expected = np.asarray(header) if mode != "CMYK" else 255 - np.asarray(header)  # Pillow inverts
        assert np.array_equal(np.asarray(ours), expected)


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def test_what_is_odd_before_the_pixels_of_a_jpeg_does_not_lose_it() -> None:
    data = encode(texture(), "JPEG")
    jfif, scan = data.index(b"JFIF"), data.index(b"\xff\xda")
    after = jfif + 14
    odd = {
        "version": data[: jfif + 5] + b"\x07" + data[jfif + 6 :],
        "scan parameters": data[: scan + 11] + b"\0\0\0" + data[scan + 14 :],
        "stray bytes": data[:after] + segment(0xE1, b"Exif\0\0junk") + b"left over" + data[after:],
        "stray bytes after a header": data[:after] + b"\xff\0\0\2" + data[after:],
        "no end": data[:-2],
        "added": data + bytes(1000) + b"more",
        "a thumbnail": data[:after] + segment(0xE1, b"Exif\0\0" + encode(plain(ORANGE), "JPEG")) + data[after:],
    }
    whole = square(data, RECIPE).pixels
    for way, content in odd.items():
        made = square(content, RECIPE)
        assert np.array_equal(made.pixels, whole) and "enlarged" not in made.flags, way
    table = data.index(b"\xff\xdb")  # stray bytes after a table are no metadata: the table is damaged
    assert reason(data[: table + 4] + b"\r" + data[table + 4 :]) == "corrupt"


def test_a_progressive_jpeg_without_its_details_is_truncated() -> None:
    data = encode(texture(), "JPEG", progressive=True)
    starts = [place for place in range(len(data)) if data[place : place + 2] in (b"\xff\xda", b"\xff\xc4")]
    begun = starts.index(data.find(b"\xff\xda"))
    assert len(starts) - begun > 10
    for end in starts[begun + 1 :]:
        for more in (b"", b"\xff\xd9", data[end : end + 3]):
            assert reason(data[:end] + more) == "truncated", (end, more)
        assert reason(data[: end + 3] + b"\xff\xd9")
    assert reason(data[:-2]) == reason(data) == ""


def test_a_jpeg_of_a_scan_a_component_is_truncated_without_one() -> None:
    """Baseline JPEGs may send their components one after the other. libjpeg says nothing of missing ones."""
    scans, tables = [], b""
    for number, band in enumerate(texture((96, 64)).convert("YCbCr").split(), 1):
        data = encode(band, "JPEG", quality=90)
        tables = data[2 : data.index(b"\xff\xc0")] + data[data.index(b"\xff\xc4") : data.index(b"\xff\xda")]
        scans.append(segment(0xDA, bytes((1, number, 0, 0, 63, 0))) + data[data.index(b"\xff\xda") + 10 : -2])
    frame = segment(0xC0, struct.pack(">BHHB", 8, 64, 96, 3) + b"".join(bytes((i, 0x11, 0)) for i in (1, 2, 3)))
    for given_, expected in (
        (scans, ""),
        (scans[:2], "truncated"),
        (scans[::2], "truncated"),
        (scans[:1], "truncated"),
    ):
        assert reason(b"\xff\xd8" + tables + frame + b"".join(given_) + b"\xff\xd9") == expected, len(given_)


def test_zeros_that_a_picture_may_have_are_no_hole() -> None:
    flat = Image.new("RGB", (3000, 2000), ORANGE)
    flat.paste((0, 0, 0), (0, 0, 1500, 2000))
    for format, options in (("JPEG", {"optimize": True}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})):
        assert reason(encode(flat, format, **options)) == "", (format, options)
    assert reason(encode(flat.convert("L"), "JPEG", optimize=True)) == ""
    assert reason(encode(flat.resize((600, 400)), "AVIF")) == ""


def test_a_scan_is_judged_by_its_own_codes() -> None:
    """Grey in the standard codes is 001010 for a block of brightness, and zeros alone for one of colour."""
    data = encode(Image.new("RGB", (256, 256)), "JPEG", subsampling=0)
    scan = data.find(b"\xff\xda")
    light = "001010" * 1024
    hole = "001010" * 512 + "0" * 573 + "001010" * 509  # of which three blocks are made
    parts = {1: b"", 2: bytes(512), 3: bytes(512)}

    def whole(order: Sequence[int]) -> bytes:
        heads = {component: bytes([1, component, 0x11 if component > 1 else 0, 0, 63, 0]) for component in order}
        return data[:scan] + b"".join(b"\xff\xda\0\x08" + heads[i] + parts[i] for i in order) + b"\xff\xd9"

    for order in ([1, 2, 3], [2, 1, 3], [3, 2, 1]):
        for bits, expected in ((light, ""), (hole, "corrupt")):
            filled = bits + "1" * (-len(bits) % 8)
            parts[1] = int(filled, 2).to_bytes(len(filled) // 8, "big")
            assert reason(whole(order)) == expected


@pytest.mark.parametrize("fill", [b" ", b"\x55", b"\xaa", b"\x10", b"\xfe"])
def test_a_gif_that_is_filled_up_is_seen(fill: bytes) -> None:
    """Whatever the bytes mean as blocks; but the two that close the last one and the file may be missing."""
    data = encode(texture().quantize(200), "GIF")
    assert data[-2:] == b"\0;"
    for end in (-1, -2):
        assert reason(data[:end]) == "" and "odd_structure" not in square(data[:end], RECIPE).flags
    for part in (0.1, 0.3, 0.5, 0.7):
        filled = data[: int(len(data) * part)].ljust(len(data), fill)
        assert reason(filled) or "odd_structure" in square(filled, RECIPE).flags


@pytest.mark.skipif(not webp.available(), reason="Pillow's libwebp cannot be called")
@pytest.mark.parametrize("film", [False, True])
def test_damaged_alpha_of_a_lossy_webp_is_seen(film: bool) -> None:
    y, x = np.mgrid[0:240, 0:320]
    picture = texture((320, 240)).convert("RGBA")
    picture.putalpha(Image.fromarray((255 - np.hypot(x - 160, y - 120) + x % 7).clip(0, 255).astype(np.uint8)))
    more = {"save_all": True, "append_images": [picture.rotate(180)], "duration": 100} if film else {}
    data = encode(picture, "WEBP", quality=80, **more)
    at = data.find(b"ALPH")
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    assert data[at + 8] & 3 == 1 and reason(data) == ""  # packed
    random, whole, seen, harmed = np.random.default_rng(0), square(data, RECIPE).pixels.astype(int), 0, 0
    for _ in range(20):
        place = at + 9 + int(random.integers(length // 10, length - 70))
        damaged = data[:place] + random.bytes(64) + data[place + 64 :]
        found = reason(damaged)
        harm = bool(found) or np.abs(square(damaged, RECIPE).pixels - whole).mean() > 2
        seen, harmed = seen + bool(found), harmed + harm
    assert harmed >= 10 and seen >= 0.8 * harmed, (seen, harmed)


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 100, "method": 0}, {"lossless": True, "method": 0}])
def test_flat_areas_of_a_webp_are_no_hole(options: dict[str, int]) -> None:
    """A page, a product on white, a picture between bars, dots: their coded areas of one colour are runs of zeros."""
    inner = texture((600, 450))
    y, x = np.mgrid[0:900, 0:1200]
    sound = [Image.new("RGB", (1200, 900), colour) for colour in ("white", "white", "black")]
    sound[1].paste(inner, (300, 200))
    sound[2].paste(inner.resize((1200, 600)), (0, 150))
    sound += [Image.fromarray(((x % 16 > 0) | (y % 16 > 0)).astype(np.uint8) * 255).convert("RGB")]
    for picture in sound:
        assert reason(encode(picture, "WEBP", **options)) == ""
    data = bytearray(encode(inner, "WEBP", **options | {"method": 4}))
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    assert reason(bytes(data)) == "corrupt"


@pytest.mark.parametrize("format", ["ICO", "ICNS"])
def test_the_pngs_of_an_icon_are_checked(format: str) -> None:
    data = encode(texture((128, 128)), format, sizes=[(128, 128), (64, 64)])
    assert reason(data) == ""
    places = [match.start() for match in re.finditer(b"IDAT", data)]
    for place in places:
        end = place + 4 + int.from_bytes(data[place - 4 : place], "big")  # where the checksum is
        assert reason(data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]) == "corrupt"
    assert len(places) > 1


def chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


PNG = encode(texture((90, 70)))
BESIDE = {
    "text of a wrong checksum": chunk(b"tEXt", b"Comment\0hello", 1),
    "profile of a wrong checksum": chunk(b"iCCP", b"x\0\0" + zlib.compress(b"junk"), 1),
    "profile that cannot be unpacked": chunk(b"iCCP", b"x\0\0junk"),
    "80 MB of XMP, packed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(80 * 2**20))),
    "80 MB of EXIF, packed": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(80 * 2**20))),
    "80 MB of history": chunk(b"zTXt", b"History\0\0" + zlib.compress(bytes(2**21))) * 40,
    "short chromaticities": chunk(b"cHRM", b"\0\0"),
    "short gamma": chunk(b"gAMA", b""),
    "short density": chunk(b"pHYs", b"\1"),
    "short animation": chunk(b"acTL", b"\1"),
    "frames out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">I", 7) + bytes(22)),
    "unknown packing": chunk(b"zTXt", b"a\0\x78junk") + chunk(b"iTXt", b"a\0\1\7\0\0junk"),
    "a length that leads nowhere": b"\0\1\0\0" + chunk(b"tEXt", b"Comment\0hello")[4:],
    "broken EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_pixels_of_a_png_does_not_lose_it(name: str) -> None:
    """Before the pixels, after them, and cut off after them."""
    whole = square(PNG, RECIPE).pixels
    for data in (
        PNG[:33] + BESIDE[name] + PNG[33:],
        PNG[:-12] + BESIDE[name] + PNG[-12:],
        PNG[:-12] + BESIDE[name][:9],
    ):
        assert np.array_equal(square(data, RECIPE).pixels, whole)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("kind", "bits", "samples"), [(2, 8, 3), (0, 16, 1), (3, 4, 1), (6, 8, 4)])
@pytest.mark.parametrize("height", [1, 2, 9])
def test_a_png_has_all_its_rows_or_is_truncated(
    kind: int, bits: int, samples: int, height: int, interlaced: int
) -> None:
    """Though every checksum is right. Black rows at the end are no missing ones."""
    width, places = 13, [(0, 0, 1, 1)] if not interlaced else png._ADAM7
    rows = [
        bytes([0, *([value] * ((len(range(x, width, across)) * bits * samples + 7) // 8))])
        for x, y, across, down in places
        for value, _ in zip((7, 0) * height, range(y, height, down), strict=False)
        if len(range(x, width, across))
    ]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced))
    head += chunk(b"PLTE", bytes(range(48))) if kind == 3 else b""

    def made(rows: list[bytes]) -> bytes:
        packed = zlib.compress(b"".join(rows))
        return png.SIGNATURE + head + chunk(b"IDAT", packed[:9]) + chunk(b"IDAT", packed[9:]) + chunk(b"IEND", b"")

    assert reason(made(rows)) == "" and reason(made([bytes(len(row)) for row in rows])) == ""
    for short in ([*rows[:-1], rows[-1][:-1]], rows[: len(rows) // 2], [bytes(len(row)) for row in rows[:-1]]):
        if short:
            assert reason(made(short)) == "truncated", len(short)


def test_chunks_of_a_png_in_places_where_they_do_not_count() -> None:
    """As libpng has it, and so every browser: after the pixels, before the palette, or of a wrong length."""
    flat = Image.new("L", (64, 48), 77)
    profile = chunk(
        b"iCCP", b"x\0\0" + zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    )
    gray, colours = encode(flat), encode(flat.convert("RGB").quantize(4))
    hidden, end = chunk(b"tRNS", b"\0\x4d"), b"IDAT"
    before, after = gray.index(end) - 4, len(gray) - 12
    assert square(gray[:before] + hidden + gray[before:], RECIPE).pixels.min() == 255
    assert square(gray[:after] + hidden + gray[after:], RECIPE).pixels.max() == 77
    assert square(gray[:before] + chunk(b"tRNS", b"\x4d") + gray[before:], RECIPE).pixels.max() == 77
    entries = int.from_bytes(colours[colours.index(b"PLTE") - 4 : colours.index(b"PLTE")], "big") // 3
    place, palette = colours.index(end) - 4, colours.index(b"PLTE") - 4
    for length, where, shown in ((entries, place, 255), (entries + 1, place, 77), (entries, palette, 77)):
        data = colours[:where] + chunk(b"tRNS", bytes(length)) + colours[where:]
        assert square(data, RECIPE).pixels.max() == shown, (length, where)
    for where, counts in ((palette, True), (place, False)):
        assert (
            any("profile" in flag for flag in square(colours[:where] + profile + colours[where:], RECIPE).flags)
            == counts
        )


def test_chunks_that_decide_about_pixels_are_checked() -> None:
    palette = encode(texture((90, 70)).quantize(20), transparency=3)
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
        place = palette.index(kind) + 4
        assert reason(palette[:place] + bytes([palette[place] ^ 1]) + palette[place + 1 :]) == "corrupt", kind
    assert reason(PNG[:-13] + bytes([PNG[-13] ^ 1]) + PNG[-12:]) == "corrupt"  # the checksum of the pixels itself
    assert reason(PNG[:33] + chunk(b"NEWS", b"") + PNG[33:]) == "unsupported"
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    assert square(encode(texture((90, 70)), exif=exif), RECIPE).flags == ["oriented"]
    assert square(PNG[:33] + chunk(b"iTXt", xmp) + PNG[33:], RECIPE).flags == []  # other programs pass over it, too


@pytest.mark.parametrize(
    "ending", ["WEBP", "AVIF", "TIFF", "JPEG2000", "PNG", "JPEG", "GIF", "BMP", "PPM", "QOI", "DDS"]
)
def test_what_is_cut_is_truncated(ending: str) -> None:
    options = {"compression": "tiff_lzw"} if ending == "TIFF" else {}
    data = encode(texture(), ending, **options)
    assert {reason(data[: len(data) * part // 10]) for part in (3, 5, 7, 9)} == {"truncated"}


def test_what_is_cut_before_its_pixels_is_truncated() -> None:
    jpeg, gif = encode(texture(), "JPEG", progressive=True), encode(texture(mode="P"), "GIF")
    places = [match.start() + 9 for match in re.finditer(b"\xff[\xdb\xc4\xc2\xda]\0", jpeg)]
    assert {reason(jpeg[:place]) for place in places} == {"truncated"} and len(places) > 6
    assert {reason(gif[:place]) for place in (15, 200, 800)} == {"truncated"}
    assert reason(gif[:790] + bytes([99]) + gif[791:]) != "truncated"


KEPT = {
    "JPEG": {},
    "PNG": {},
    "GIF": {},
    "WEBP": {"quality": 90},
    "WEBP, lossless": {"lossless": True},
    "AVIF": {},
    "JPEG2000": {"quality_mode": "rates", "quality_layers": [8]},
    "JPEG2000, tiles": {"tile_size": (64, 64)},
    "QOI": {},
    "DDS": {},
    "TGA": {"compression": "tga_rle"},
    "BMP": {},
    "PPM": {},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_there_is_of_a_truncated_file_can_be_kept(name: str) -> None:
    """Of a file that lacks its last third, at least one part in six is as in the whole (a BMP begins at its foot)."""
    format, keep, whole = name.split(",")[0], Recipe(64, keep_truncated=True), texture()
    data = encode(whole, format, **KEPT[name])  # type: ignore[arg-type]
    expected, made = square(data, Recipe(64)).pixels.astype(int), square(data[: 2 * len(data) // 3], keep)
    assert made.flags == ["truncated"] and reason(data[: 2 * len(data) // 3]) == "truncated"
    apart = np.abs(made.pixels - expected).mean((0, 2))
    if name == "JPEG2000":  # it is sharpened from one end of the file to the other
        assert apart.mean() < 10
    else:
        assert np.count_nonzero(apart < 3) >= 64 // 6


@pytest.mark.parametrize("deflated", [False, True])
def test_what_there_is_of_a_truncated_tiff_can_be_kept(deflated: bool) -> None:
    """As long as its directory is there: some programs write it last."""
    gray, keep = texture(mode="L"), Recipe(64, keep_truncated=True)
    data = tiff_of(np.asarray(gray), deflated=deflated, rows=16)
    made = square(data[: 2 * len(data) // 3], keep)
    apart = np.abs(made.pixels.astype(int) - square(data, Recipe(64)).pixels).mean((0, 2))
    assert made.flags == ["truncated"] and np.count_nonzero(apart < 3) > 20
    assert reason(encode(gray, "TIFF", compression="tiff_lzw")[:-2000], keep) == "truncated"


def test_a_truncated_file_without_any_pixels_is_not_kept() -> None:
    data = encode(texture(), "BMP")
    assert reason(data[:60], Recipe(64, keep_truncated=True)) == "truncated"
    assert reason(encode(texture(), "WEBP")[:24], Recipe(64, keep_truncated=True)) in ("truncated", "corrupt")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"RIFF\0\1\0\0WEBP", b"\0\0\0\x0cftypavif", b"\xff\x4f\xff\x51", b"II*\0", b"MM\0*", b"BM"])
    | st.sampled_from(
        [b"\1\xda", b"\1\xda\1\1", b"\1\xda\0\1", b"qoif", b"DDS ", b"GIF89a", b"8BPS", b"P6", b"\x89PNG"]
    ),
    st.binary(max_size=60),
    st.booleans(),
)
@example(b"qoif", b"\xff" * 16, True)  # four billion pixels a side
def test_the_beginning_of_a_file_is_damaged_or_none(head: bytes, rest: bytes, keep: bool) -> None:
    """Nothing else is raised, however little of it there is."""
    data = head + rest
    reason(data, Recipe(32, keep_truncated=keep))
    structure.filled_up(data)


def test_an_account_that_cannot_be_read_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise TypeError("a place that is a text")

    assert reason(b"\1\xda") == "truncated"
    monkeypatch.setattr(structure, "cut_short", broken)
    assert reason(b"\1\xda") == "corrupt"


@pytest.mark.parametrize("format", ["QOI", "SGI", "GIF"])
def test_a_file_that_lost_its_last_bytes_is_truncated(format: str) -> None:
    """Not more than a part of what marks its end."""
    data = encode(texture((40, 30), "RGB").quantize(20) if format == "GIF" else texture((40, 30)), format)
    assert not structure.cut_short(data, format) and reason(data) == ""
    for lost in (1,) if format == "GIF" else (1, 3, 7):
        assert structure.cut_short(data[:-lost], format)
    assert not structure.cut_short(data + bytes(3), "GIF") or format != "GIF"


def damaged(data: bytes, part: bytes) -> bytes:
    """Returns a file with another bit in the middle of a part of it."""
    place = data.rindex(part) + len(part) // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_the_tiles_of_an_avif_are_checked_though_they_are_larger_than_the_picture() -> None:
    tiles = [encode(damage.picture(seed, "RGB").resize((256, 256)), "AVIF", quality=60) for seed in (1, 2)]
    data = grid(tiles, 2, (256, 256), (300, 200))  # of which the last row and column are cut
    made = square(data, Recipe(200, resample="box", full_decode=True))
    assert (made.width, made.height, made.flags) == (300, 200, [])
    first, second = avif._pictures(data)
    assert first != second and reason(damaged(data, first)) == reason(damaged(data, second)) == "corrupt"


def test_each_tile_of_an_avif_is_checked_once_and_nothing_that_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, real = encode(Image.new("RGB", (64, 64), "white"), "AVIF"), encode(texture((64, 64)), "AVIF", quality=60)
    data = grid([*[flat] * 15, real], 4, (64, 64), (256, 256), strangers=500)
    looked, is_damaged = list[bytes](), avif._is_damaged

    def noted(library: Any, part: bytes, pixels: int) -> bool:
        looked.append(part)
        return is_damaged(library, part, pixels)

    monkeypatch.setattr(avif, "_is_damaged", noted)
    assert reason(data) == "" and len(looked) == 2
    assert reason(damaged(data, looked[1])) == "corrupt"


def test_what_stands_behind_the_damage_of_an_avif_is_not_believed() -> None:
    """Of a table of places that is cut, what came before counts; one of many items in a few bytes is no work."""
    place = bytes((0x44, 0, 0, 2)) + struct.pack(">HHHII", 1, 0, 1, 7, 9) + b"\0\2"
    found = dict[int, Any]()
    with pytest.raises(IndexError):
        found.update(avif._extents(bytes(4) + place))
    assert found == {1: ((7, 16),)}
    empty = bytes((1, 0, 0, 0, 0, 0)) + b"\0\2" + bytes((0, 1, 0, 0, 0, 0, 0xFF, 0xFF)) * 2
    assert list(avif._extents(empty)) == [(1, ())] * 2


def test_files_that_hold_more_than_they_say_are_flagged() -> None:
    for format in ("WEBP", "BMP", "AVIF"):
        data = encode(texture(), format)
        assert structure.odd(data, format) is None
        half = len(data) // 2
        assert damage.outcome(data[:half] + data[half - 100 :]) in ("odd_structure", "corrupt", "truncated"), format


def test_every_picture_of_an_avif_is_checked_but_thumbnails() -> None:
    """Its transparency is a picture of its own."""
    image = texture((96, 64), "RGBA")
    image.putalpha(texture((96, 64), "L"))
    data = encode(image, "AVIF", quality=80)
    parts = list(avif._pictures(data))
    assert len(parts) == 2 and reason(data) == ""
    for part in parts:
        place = data.index(part) + len(part) // 2
        bad = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        assert reason(bad) == "corrupt"
        assert reason(bad.replace(b"auxl", b"thmb")) == ("" if part is parts[1] else "corrupt")


def broken(check: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    target, name, instead = {
        "avif": (avif, "check", lambda *_: None),
        "webp": (webp, "decode", lambda *_: None),
        "strips": (tiff, "_strips", lambda *_: ()),
        "jpeg": (jpeg, "_look_for_damage", lambda *_: None),
    }[check]
    return lambda: monkeypatch.setattr(target, name, instead)


@pytest.mark.parametrize("check", ["avif", "webp", "strips", "jpeg"])
def test_each_check_is_needed(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: without the check, this damage passes."""
    names = {"avif": "AVIF", "webp": "WebP", "strips": "TIFF, deflate", "jpeg": "JPEG"}
    name = names[check]
    data = damage.encode(0, name)

    def unfound() -> int:
        ways = [
            data[:place] + bytes(512) + data[place + 512 :] for place in range(len(data) // 3, len(data) - 900, 200)
        ]
        return sum(not damage.outcome(bad) for bad in ways)

    assert unfound() == 0
    broken(check, monkeypatch)()
    assert unfound() > 0


def test_fast_checks_leave_out_what_is_dear_and_say_so(tmp_path: Path) -> None:
    for name in ("AVIF", "TIFF, deflate"):
        data = damage.encode(0, name)
        bad = data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :]
        assert reason(bad) == "corrupt" and reason(bad, Recipe(32, fast_checks=True)) == ""
        assert np.array_equal(square(data, RECIPE).pixels, square(data, Recipe(32, fast_checks=True)).pixels)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tif").write_bytes(data)
    careful, fast = (prepare(tmp_path / "in", tmp_path / str(f), workers=0, fast_checks=f) for f in (False, True))
    assert any("--fast-checks" in note for note in fast.notes) and not careful.notes
    recipes = [json.loads((tmp_path / str(f) / "manifest.json").read_bytes())["recipe"] for f in (False, True)]
    assert [recipe.get("fast_checks") for recipe in recipes] == [None, True]  # older datasets can be continued
