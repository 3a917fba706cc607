"""Every format, layout and depth gives the same picture, the same way up: what Pillow writes, and hand-made headers."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, TiffImagePlugin

from gan_dist.data.prepare import tiff as tiff_module
from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import _TRANSPOSE, Recipe, square
from tests.helpers.images import encode
from tests.helpers.tiff import tiff

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's remarks on odd files
SIZE = 64
RECIPE = Recipe(SIZE, full_decode=True)


def colours(width: int = SIZE, height: int = SIZE) -> NDArray[np.uint8]:
    """Returns smooth uint8 [height, width, 3] that no turn or negative leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([20 + 180 * x // width, 60 + 120 * y // height, (x + y) * 100 // (width + height)], 2).astype(
        np.uint8
    )


def gray() -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = colours()[..., 0] // 2 + colours()[..., 1] // 3
    return values


def found(data: bytes) -> NDArray[np.int64]:
    """Returns the square of a picture of SIZE x SIZE: its pixels, int [SIZE, SIZE, 3]."""
    return square(data, RECIPE).pixels.transpose(1, 2, 0).astype(np.int64)


def same(data: bytes, expected: NDArray[Any], limit: float = 1.0) -> bool:
    wanted = np.dstack([expected] * 3) if expected.ndim == 2 else expected
    return bool(np.abs(found(data) - wanted).mean() <= limit)


def deepened(values: NDArray[np.uint8], kind: str) -> NDArray[Any]:
    """Returns 8-bit values at another depth, white becoming that depth's white."""
    if kind == "f4":
        return (values / 255).astype(np.float32)
    top = {"u1": 255, "u2": 65535, "i2": 32767, "u4": 2**32 - 1}[kind]
    return np.rint(values.astype(np.float64) * top / 255).astype(kind)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "f4"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_tiffs(kind: str, photometric: int, deflated: bool, big_endian: bool) -> None:
    """Right, or `unsupported`; at 8 and 16 bits always right."""
    values = gray() if photometric else 255 - gray()
    data = tiff(deepened(values, kind), photometric=photometric, deflated=deflated, big_endian=big_endian, rows=16)
    if kind == "i2" and not photometric:
        return  # nobody says what white as zero means there
    try:
        assert same(data, gray())
    except Rejected as rejected:
        assert rejected.reason == "unsupported" and kind == "u4"


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("channels", ["rgb", "rgb and alpha", "rgb and more", "cmyk"])
def test_colour_tiffs(channels: str, kind: str, planes: bool, deflated: bool, big_endian: bool) -> None:
    values, tags, photometric = colours(), {}, 2
    if channels == "cmyk":
        values, photometric = np.dstack([255 - values, np.zeros_like(values[..., 0])]), 5
    elif channels != "rgb":
        values = np.dstack([values, np.full_like(values[..., 0], 255)])
        tags = {338: (3, [2 if "alpha" in channels else 0])}
    data = tiff(
        deepened(values, kind),
        photometric=photometric,
        deflated=deflated,
        planes=planes,
        big_endian=big_endian,
        rows=16,
        tags=tags,
    )
    assert same(data, colours())


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bits_the_other_way_round(channels: int, kind: str, big_endian: bool, deflated: bool) -> None:
    """A fill order of 2 turns those of each byte, also of what is packed."""
    values, photometric = (gray(), 1) if channels == 1 else (colours(), 2)
    if channels == 4:
        values, photometric = np.dstack([255 - values, np.zeros_like(values[..., 0])]), 5
    stored = deepened(values, kind).astype(f"{'>' if big_endian else '<'}{kind}").tobytes()
    strip = np.frombuffer(zlib.compress(stored) if deflated else stored, np.uint8)
    turned = np.packbits(np.unpackbits(strip[:, None], axis=1, bitorder="little"), axis=1).tobytes()
    for tags, packed in (({266: (3, [2])}, turned), ({}, strip.tobytes())):
        tags |= {259: (3, [8 if deflated else 1])}
        data = tiff(
            deepened(values, kind), photometric=photometric, big_endian=big_endian, packed=packed, tags=dict(tags)
        )
        assert same(data, gray() if channels == 1 else colours()) and square(data, RECIPE).flags == []


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_sun_pixels_of_32_bits_begin_with_a_byte_that_does_not_count(kind: int) -> None:
    ordered = colours() if kind == 3 else colours()[..., ::-1]
    raw = np.dstack([np.full((SIZE, SIZE), 7, np.uint8), ordered]).tobytes()
    raw = raw.replace(b"\x80", b"\x80\0") if kind == 2 else raw
    data = struct.pack(">8I", 0x59A66A95, SIZE, SIZE, 32, len(raw), kind, 0, 0) + raw
    assert same(data, colours()) and square(data, RECIPE).flags == []


def test_twelve_bits() -> None:
    values = np.rint(gray() / 255.0 * 4095).astype(np.uint16).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    assert same(tiff(deepened(gray(), "u2"), bits=12, packed=packed.astype(np.uint8).tobytes()), gray())


def test_planes_need_the_other_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: Pillow's own reader of planes makes something else of 16 bits."""
    data = tiff(deepened(colours(), "u2"), photometric=2, planes=True)
    assert same(data, colours())
    monkeypatch.setattr(tiff_module, "opened", lambda data: TiffImagePlugin.TiffImageFile(io.BytesIO(data), ""))
    assert not same(data, colours(), 5)


WRITTEN = {
    "PNG": ("RGB", "L", "1", "P", "RGBA", "I;16", "LA"),
    "TIFF": ("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "LA"),
    "JPEG": ("RGB", "L", "1", "CMYK"),
    "WEBP": ("RGB", "L", "1", "P", "RGBA", "CMYK", "LA"),
    "AVIF": ("RGB", "L", "1", "P", "RGBA", "CMYK", "LA"),
}
"""The modes that Pillow writes in each format (of I;16 it would make 8 bits by clipping in the last two)."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in WRITTEN.items() for mode in modes])
def test_every_mode_and_format_comes_out_upright(mode: str, format: str, orientation: int) -> None:
    """Against the upright picture in a PNG (a TIFF for CMYK)."""
    stored = Image.fromarray(colours(90, 60))
    if mode == "I;16":
        stored = Image.fromarray(deepened(np.asarray(stored.convert("L")), "u2"))
    elif mode == "P":
        stored = stored.quantize(60)
    else:
        stored = stored.convert(mode)
    turn = _TRANSPOSE.get(orientation)
    upright = stored.transpose(turn) if turn is not None else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if format in ("JPEG", "WEBP", "AVIF") else {}
    data = encode(stored, format, exif=exif, **options)
    made = square(data, RECIPE)
    expected = square(encode(upright, "TIFF" if mode == "CMYK" else "PNG"), RECIPE)
    assert (made.width, made.height) == upright.size
    limit = 4.0 if options else 0.0
    if mode == "1":
        limit *= 3
    assert np.abs(made.pixels.astype(int) - expected.pixels).mean() <= limit
    assert ("oriented" in made.flags) == (orientation > 1)


def bmp(alpha: int) -> bytes:
    """Returns a 32-bit BMP that declares an alpha channel, in which every byte is `alpha`."""
    raw = np.dstack([colours()[..., ::-1], np.full((SIZE, SIZE), alpha, np.uint8)])[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, SIZE, SIZE, 1, 32, 3, len(raw), 2835, 2835, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(raw), 0, 0, 14 + len(header)) + header + raw


def old_tga(depth: int, kind: int = 2, alpha: int = 0) -> bytes:
    """Returns a TGA of version 1, without a footer."""
    image = np.dstack([colours()[..., ::-1], np.full((SIZE, SIZE), alpha, np.uint8)])[..., : depth // 8]
    head = bytes([0, 0, kind]) + bytes(9) + struct.pack("<HHBB", SIZE, SIZE, depth, 0x20)
    return head + (image if depth > 8 else gray()).tobytes()


def gray_with_alpha(format: str, alpha: int) -> bytes:
    pixels = np.dstack([gray(), np.full_like(gray(), alpha)]).tobytes()
    if format == "TGA":
        return bytes([0, 0, 3]) + bytes(9) + struct.pack("<HHBB", SIZE, SIZE, 16, 0x28) + pixels
    head = struct.pack("<7I44x", 124, 0x100F, SIZE, SIZE, 2 * SIZE, 0, 0) + struct.pack("<2I4x", 32, 0x20001)
    return b"DDS " + head + struct.pack("<5I", 16, 255, 0, 0, 0xFF00) + struct.pack("<I16x", 0x1000) + pixels


def tga_with_colours(depth: int, bits: int) -> bytes:
    """Returns a TGA of the colours of a gray scale, whose colours have alpha, 0 everywhere."""
    scale = np.arange(256, dtype=np.uint8)
    table = np.dstack([scale] * 3 + [np.zeros_like(scale)]).astype(np.uint8).tobytes()
    if bits == 16:
        table = (np.arange(256, dtype=np.uint16) // 8 * 0x421).astype("<u2").tobytes()
    return struct.pack("<3B2HB4H2B", 0, 1, 1, 0, 256, bits, 0, 0, SIZE, SIZE, depth, 0x20) + table + gray().tobytes()


def test_an_alpha_of_zeros_everywhere_was_never_written() -> None:
    for data in (bmp(0), bmp(255), old_tga(32, alpha=0), old_tga(32, alpha=255)):
        assert same(data, colours())
    assert square(bmp(0), RECIPE).flags == ["alpha_ignored"] and square(bmp(255), RECIPE).flags == []
    for data in (*(gray_with_alpha(format, alpha) for format in ("TGA", "DDS") for alpha in (0, 255)),
                 tga_with_colours(8, 32)):  # fmt: skip
        assert same(data, gray())
    assert same(tga_with_colours(8, 16), gray(), limit=6)  # of 5 bits


def of_1555(opaque: NDArray[np.bool_]) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Returns colours of 5 bits with one of alpha, and what they are on white."""
    red, green, blue = (colours() >> 3).astype(np.uint16).transpose(2, 0, 1)
    shown = np.where(opaque[..., None], (colours() >> 3).astype(float) * 255 / 31, 255)
    return red << 10 | green << 5 | blue | opaque.astype(np.uint16) << 15, shown


def test_one_bit_of_alpha() -> None:
    """In a TGA and a BMP; where it is the same everywhere, the TGA's means nothing."""
    half = np.arange(SIZE)[None].repeat(SIZE, 0) > SIZE // 2
    tga = bytes([0, 0, 2]) + bytes(9) + struct.pack("<HHBB", SIZE, SIZE, 16, 0x21)
    for opaque in (half, np.ones_like(half), np.zeros_like(half)):
        values, shown = of_1555(opaque)
        assert same(tga + values.astype("<u2").tobytes(), shown if opaque is half else of_1555(half | True)[1], 2)
    values, shown = of_1555(half)
    raw = values[::-1].astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 56, SIZE, SIZE, 1, 16, 3, len(raw), 0, 0, 0, 0)
    header += struct.pack("<4I", 0x7C00, 0x3E0, 0x1F, 0x8000)
    assert same(b"BM" + struct.pack("<IHHI", 70 + len(raw), 0, 0, 70) + header + raw, shown, 2)
    opaque_only = header[:-4] + bytes(4)  # which gives no bit to alpha
    assert same(b"BM" + struct.pack("<IHHI", 70 + len(raw), 0, 0, 70) + opaque_only + raw, of_1555(half | True)[1], 2)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    "case", ["gray and alpha", "no word of alpha", "more than alpha", "multiplied", "cmyk and more"]
)
def test_planes_with_more_than_colours(case: str, orientation: int, deflated: bool) -> None:
    alpha = np.arange(SIZE)[None].repeat(SIZE, 0).astype(np.uint8) * 4

    def on_white(values: NDArray[Any]) -> NDArray[np.float64]:
        return 255 - (255 - values.astype(float)) * (alpha[..., None] / 255)

    tags: dict[int, tuple[int, list[int]]] = {274: (3, [orientation])}
    values, shown, photometric = np.dstack([colours(), alpha]), on_white(colours()), 2
    match case:
        case "gray and alpha":
            values, tags[338], photometric = np.dstack([gray(), alpha]), (3, [2]), 1
            shown = on_white(np.dstack([gray()] * 3))
        case "more than alpha":
            values, tags[338] = np.dstack([values, gray()]), (3, [2, 0])
        case "multiplied":
            values, tags[338] = np.dstack([colours() * (alpha[..., None] / 255), alpha]).astype(np.uint8), (3, [1])
        case "cmyk and more":
            values, tags[338] = np.dstack([255 - colours(), np.zeros_like(gray()), alpha]), (3, [0])
            shown, photometric = colours().astype(float), 5
    data = tiff(values, photometric=photometric, planes=True, deflated=deflated, rows=16, tags=tags)
    assert same(data, np.rot90(shown, -1) if orientation == 6 else shown)
    if deflated:
        at = len(data) * 3 // 10
        with pytest.raises(Rejected, match="corrupt"):
            square(data[:at] + bytes(40) + data[at + 40 :], RECIPE)


def test_gray_under_alpha_that_is_multiplied_in() -> None:
    alpha = np.full_like(gray(), 128)
    data = tiff(np.dstack([gray() // 2, alpha]), tags={338: (3, [1])})
    assert same(data, gray() / 2 + 127)


def test_colours_that_several_pixels_of_a_tiff_share() -> None:
    ycc = np.asarray(Image.fromarray(colours()).convert("YCbCr"))
    blocks = [ycc[y : y + 2, x : x + 2, 0].tobytes() + ycc[y, x, 1:].tobytes() for y in range(0, SIZE, 2)
              for x in range(0, SIZE, 2)]  # fmt: skip
    assert same(tiff(ycc, photometric=6, packed=b"".join(blocks), tags={530: (3, [2, 2])}), colours(), limit=3)


@pytest.mark.parametrize("top", [255, 65535])
def test_the_colours_of_a_tiff_have_16_bits_or_8(top: int) -> None:
    table = [value * top // 255 for value in (*range(256), *range(255, -1, -1), *range(256))]
    expected = np.dstack([gray(), 255 - gray(), gray()])
    assert same(tiff(gray(), photometric=3, tags={320: (3, table)}), expected)


@pytest.mark.parametrize(("layers", "shown"), [(b"", False), (b"\0\1", False), (b"\xff\xff", True)])
def test_the_fourth_channel_of_a_psd_is_its_alpha_or_a_selection(layers: bytes, shown: bool) -> None:
    alpha = np.full_like(gray(), 128)
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 4, SIZE, SIZE, 8, 3) + bytes(8)
    section = struct.pack(">I", len(layers) + 22) + layers + bytes(20) if layers else b""
    planes = b"".join(np.ascontiguousarray(plane).tobytes() for plane in (*colours().transpose(2, 0, 1), alpha))
    data = head + struct.pack(">I", len(section)) + section + b"\0\0" + planes
    assert same(data, colours() * (128 / 255) + 127 if shown else colours())


@pytest.mark.parametrize(("bits", "zero", "scale"), [(16, 32768, 1), (32, 2**31, 1), (16, 0, 1 / 128), (-32, 1, 1)])
def test_the_values_of_a_fits_are_as_its_header_scales_them(bits: int, zero: float, scale: float) -> None:
    white = {16: 65535, 32: 2.0**32 - 1, -32: 255}[bits] if scale == 1 else 255
    stored = ((gray()[::-1] / 255.0 * white - zero) / scale).round().astype({16: ">i2", 32: ">i4", -32: ">f4"}[bits])
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": SIZE, "NAXIS2": SIZE, "BZERO": f"{zero:.1f}"}
    cards |= {"BSCALE": f"{scale:E}".replace("E", "D")}
    lines = [f"{key:8}= {value!s:>20} / BZERO = 3" for key, value in cards.items()]
    lines.insert(1, "HISTORY BZERO   = 7")
    head = "".join(line.ljust(80) for line in [*lines, "END"])
    body = stored.tobytes()
    assert same(head.ljust(2880).encode() + body + bytes(-len(body) % 2880), gray())


@pytest.mark.parametrize("name", [b"", b"a", b"ab"])
@pytest.mark.parametrize("whole", [None, True, False])
def test_a_psd_without_its_merged_picture_is_not_a_white_one(whole: bool | None, name: bytes) -> None:
    padded = bytes([len(name)]) + name + bytes((len(name) + 1) % 2)
    other = b"8BIM" + struct.pack(">H", 1000) + padded + struct.pack(">I", 3) + b"abc\0"
    told = b"8BIM\x04\x21" + padded + struct.pack(">II?", 5, 1, bool(whole)) + b"\0"
    resources = other + (b"" if whole is None else told)
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIZE, SIZE, 8, 3) + bytes(4)
    planes = b"".join(np.ascontiguousarray(plane).tobytes() for plane in colours().transpose(2, 0, 1))
    data = head + struct.pack(">I", len(resources)) + resources + bytes(4) + b"\0\0" + planes
    assert rejected_as(data) == "unsupported" if whole is False else same(data, colours())


def row_of_packbits(row: NDArray[np.uint8]) -> bytes:
    return b"".join(bytes([len(part) - 1]) + part for part in (row.tobytes()[i : i + 128] for i in range(0, SIZE, 128)))


@pytest.mark.parametrize("more", [0, 1, 2])
@pytest.mark.parametrize(("mode", "number"), [(1, 1), (3, 3), (4, 4)])
def test_a_packed_psd_may_have_more_channels_than_are_shown(mode: int, number: int, more: int) -> None:
    """Selections and spot colours: the lengths of their rows stand before the pixels, too."""
    channels = [*colours().transpose(2, 0, 1)]
    planes = {1: [gray()], 3: channels, 4: [*channels, gray() * 0 + 255]}[mode]
    selection = np.where(gray() > 80, 255, 0).astype(np.uint8)
    rows = [row_of_packbits(row) for plane in (*planes, *more * [selection]) for row in plane]
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, number + more, SIZE, SIZE, 8, mode) + bytes(12) + b"\0\1"
    data = head + b"".join(struct.pack(">H", len(row)) for row in rows) + b"".join(rows)
    assert same(data, gray() if mode == 1 else colours())


@pytest.mark.parametrize("format", ["TIFF", "PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_what_xmp_says_of_orientation_counts_for_nothing(format: str, orientation: int) -> None:
    """As in other programs; EXIF, or a TIFF's own tag, tells."""
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    whole = Image.fromarray(colours(96, SIZE))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    choices: dict[str, dict[str, Any]] = {
        "TIFF": {"tiffinfo": {700: xmp.encode()}},
        "PNG": {"pnginfo": info, "exif": exif},
        "WEBP": {"xmp": xmp.encode(), "lossless": True},
        "JPEG": {"xmp": xmp.encode(), "exif": exif, "quality": 100, "subsampling": 0},
    }
    data = encode(whole, format, **choices[format])
    assert same(data, colours(96, SIZE)[:, 16:80]) and "oriented" not in square(data, RECIPE).flags


def test_what_two_formats_claim_may_be_kinds_of_one() -> None:
    for data in (b"8BPS\0\2" + bytes(60), b"8BPS\0\2"):
        with pytest.raises(Rejected, match="unsupported"):
            square(data, RECIPE)


XPM = {
    "colours of 12 digits": (b"#FF0000", b"#FFFF00000000", "unsupported"),
    "colours of 3 digits": (b"#FF0000", b"#F00", "unsupported"),
    "names of colours": (b"#FF0000", b"red", "unsupported"),
    "a row that is too long": (b"abab", b"ababab", "corrupt"),
    "a row that is missing": (b'"abababababababab",\n', b"", "truncated"),
}


@pytest.mark.parametrize("name", XPM)
def test_an_xpm_that_would_be_misread_is_refused(name: str) -> None:
    old, new, reason = XPM[name]
    rows = ",\n".join('"' + "ab" * 8 + '"' for _ in range(16))
    text = '/* XPM */\nstatic char *a[] = {\n"16 16 2 1",\n"a c #FF0000",\n"b c None",\n' + rows + "};\n"
    red = square(text.encode(), Recipe(16)).pixels
    assert (red[:, 0, :4] == [[255] * 4, [0, 255, 0, 255], [0, 255, 0, 255]]).all()
    with pytest.raises(Rejected, match=reason):
        square(text.encode().replace(old, new, 1), Recipe(16))


def test_old_tgas() -> None:
    assert same(old_tga(24), colours()) and same(old_tga(8, 3), gray())
    footed = encode(Image.fromarray(colours()), "TGA")
    assert same(footed, colours())
    for broken in (old_tga(24)[:-1000], b"\0\0\2" + bytes(40), old_tga(24)[:16] + b"\x13" + old_tga(24)[17:]):
        with pytest.raises(Rejected, match="not_an_image"):
            square(broken, RECIPE)


def test_what_two_formats_claim_is_read_by_the_one_that_can() -> None:
    rows = ",\n".join('"' + "".join("ab"[(x + y) % 2] for x in range(16)) + '"' for y in range(16))
    text = '/* XPM */\nstatic char *a[] = {\n"16 16 2 1",\n"a c #FF0000",\n"b c #0000FF",\n' + rows + "};\n"
    assert square(text.encode(), Recipe(16)).format == "XPM"
    bits = b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {\n" + b"0xff, " * 7 + b"0xff};\n"
    made = square(bits, Recipe(8))
    assert made.format == "XBM" and made.pixels.max() == 0  # ink
    with pytest.raises(Rejected, match="truncated"):
        square(text.encode()[:40], Recipe(16))
    named = b"\x0a" + old_tga(24)[1:18] + b"ten bytes." + old_tga(24)[18:]  # its text makes it begin as a PCX does
    assert square(named, RECIPE).format == "TGA" and same(named, colours())
    pcx = encode(Image.fromarray(colours()), "PCX")
    assert square(pcx, RECIPE).format == "PCX" and same(pcx, colours())


def with_properties(data: bytes, *properties: bytes) -> bytes:
    """Returns an AVIF of Pillow's with more properties, given to the first item."""
    box = {kind: data.index(kind) - 4 for kind in (b"meta", b"iprp", b"ipco", b"ipma", b"iloc")}
    size = {kind: int.from_bytes(data[at : at + 4], "big") for kind, at in box.items()}
    number = boxes_in(data[box[b"ipco"] + 8 : box[b"ipco"] + size[b"ipco"]]) + 1
    ipma = bytearray(data[box[b"ipma"] : box[b"ipma"] + size[b"ipma"]])
    count = 8 + 4 + 4 + 2
    for more in range(len(properties)):
        ipma[count] += 1
        ipma.insert(count + ipma[count], 0x80 | number + more)
    ipma[:4] = struct.pack(">I", len(ipma))
    ipco = data[box[b"ipco"] : box[b"ipco"] + size[b"ipco"]] + b"".join(properties)
    ipco = struct.pack(">I", len(ipco)) + ipco[4:]
    iprp = b"iprp" + ipco + bytes(ipma)
    meta = bytearray(data[box[b"meta"] : box[b"iprp"]] + struct.pack(">I", 4 + len(iprp)) + iprp)
    meta += data[box[b"iprp"] + size[b"iprp"] : box[b"meta"] + size[b"meta"]]
    meta[:4] = struct.pack(">I", len(meta))
    mdat, grown = data.index(b"mdat") + 4, len(meta) - size[b"meta"]
    where = bytes(meta).index(struct.pack(">I", mdat))
    meta[where : where + 4] = struct.pack(">I", mdat + grown)
    return data[: box[b"meta"]] + bytes(meta) + data[box[b"meta"] + size[b"meta"] :]


def boxes_in(ipco: bytes) -> int:
    """Returns the number of boxes in a row."""
    number, place = 0, 0
    while place < len(ipco):
        number, place = number + 1, place + int.from_bytes(ipco[place : place + 4], "big")
    return number


@pytest.mark.parametrize("aperture", [False, True])
@pytest.mark.parametrize("quarters", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_an_avif_is_cut_turned_and_mirrored(aperture: bool, quarters: int | None, axis: int | None) -> None:
    """In this order."""
    shown = Image.fromarray(colours(200, 120))
    data, properties = encode(shown, "AVIF", quality=95), []
    if aperture:
        properties.append(struct.pack(">I4s8i", 40, b"clap", 100, 1, 80, 1, -30, 1, 10, 1))
        shown = shown.crop((20, 30, 120, 110))
    if quarters is not None:
        properties.append(struct.pack(">I4sB", 9, b"irot", quarters))
        shown = shown.rotate(90 * quarters, expand=True)
    if axis is not None:
        properties.append(struct.pack(">I4sB", 9, b"imir", axis))
        shown = shown.transpose((Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)[axis])
    made, expected = square(with_properties(data, *properties), RECIPE), square(encode(shown), RECIPE)
    assert (made.width, made.height) == shown.size
    assert np.abs(made.pixels.astype(int) - expected.pixels).mean() < 3


def test_the_exif_of_an_avif_may_be_broken() -> None:
    """It says nothing of its pixels: Pillow writes an orientation as a property, too."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    data = encode(Image.fromarray(colours(90, 60)), "AVIF", exif=exif)
    whole = square(data, RECIPE)
    for broken in (b"??\0*", b"MM\xff\xff", bytes(4)):
        made = square(data.replace(b"MM\0*", broken), RECIPE)
        assert np.array_equal(made.pixels, whole.pixels) and made.flags == ["oriented", "enlarged"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_gray_of_a_shallow_png(bits: int) -> None:
    values = np.tile((np.arange(SIZE) * 2**bits // SIZE).astype(np.uint8), (SIZE, 1))
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    packed = (values.reshape(SIZE, -1, 8 // bits) << shifts).sum(2).astype(np.uint8)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">2I5B", SIZE, SIZE, bits, 0, 0, 0, 0)
    middle = 2 ** (bits - 1) - 1
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(">H", middle)), (b"IDAT", pixels), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    ]
    shown = np.where(values == middle, 255, values.astype(int) * 255 // (2**bits - 1))
    assert same(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), np.repeat(shown[..., None], 3, 2))


def deep_png(values: NDArray[np.uint16], transparent: tuple[int, ...], interlaced: bool = False) -> bytes:
    """Returns a PNG of 16 bits, gray or RGB, of which one colour is transparent."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    passes = [values]
    if interlaced:
        steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        passes = [values[top::down, left::right] for top, left, down, right in steps]
    rows = [b"\0" + row.astype(">u2").tobytes() for part in passes for row in part]
    kind = 0 if values.ndim == 2 else 2
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, interlaced)
    chunks = chunk(b"IHDR", head) + chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_deep_png(channels: int, interlaced: bool) -> None:
    """Only what equals it in all 16 bits is transparent, which shows as white."""
    values = deepened(gray() if channels == 1 else colours(), "u2")
    values[:32] = 0x1234
    values[:32, :32] = 0x1299  # the same in 8 bits
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)
    expected[:32, 32:] = 255
    assert same(deep_png(values, (0x1234,) * channels, interlaced), expected, 0.6)
    one_off = (0x1234,) * (channels - 1) + (0x1235,)
    expected[:32, 32:] = 0x12
    assert same(deep_png(values, one_off, interlaced), expected, 0.6)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_big_tiffs(kind: str, big_endian: bool, orientation: int) -> None:
    """Of more than 4 GB, or written as if they were."""
    order: Literal["<", ">"] = ">" if big_endian else "<"
    values = deepened(gray(), kind)
    tags = {256: (3, SIZE), 257: (3, SIZE), 258: (3, 8 * values.itemsize), 259: (3, 1), 262: (3, 1), 273: (16, 0)}
    tags |= {274: (3, orientation), 277: (3, 1), 278: (3, SIZE), 279: (16, values.nbytes)}
    start = 16 + 8 + 20 * len(tags) + 8
    tags[273] = (16, start)
    entries = b"".join(
        struct.pack(f"{order}HHQ", tag, of, 1) + struct.pack(order + ("Q" if of == 16 else "H6x"), value)
        for tag, (of, value) in sorted(tags.items())
    )
    magic = (b"MM\0\x2b" if big_endian else b"II\x2b\0") + struct.pack(f"{order}HHQQ", 8, 0, 16, len(tags))
    data = magic + entries + bytes(8) + values.astype(values.dtype.newbyteorder(order)).tobytes()
    assert same(data, gray() if orientation == 1 else np.rot90(gray(), -1))
    assert ("oriented" in square(data, RECIPE).flags) == (orientation == 6)


def rejected_as(data: bytes) -> str:
    with pytest.raises(Rejected) as rejected:
        square(data, RECIPE)
    return str(rejected.value.reason)


def test_what_this_pillow_cannot_read_is_unsupported_and_not_damaged() -> None:
    packed = {
        compression: tiff(gray(), packed=b"x" * 500, tags={259: (3, [compression])}) for compression in (50001, 9)
    }
    assert rejected_as(packed[9]) == "unsupported"
    assert rejected_as(packed[50001]) == ("unsupported" if tiff_module.codec_missing("webp") else "corrupt")
    bitfields = bytearray(encode(Image.fromarray(colours()), "BMP"))
    bitfields[28:34] = struct.pack("<HI", 16, 3)  # 16 bits, by masks that are nonsense
    assert rejected_as(bytes(bitfields)) == "unsupported"
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 4, SIZE, SIZE, 16, 4) + bytes(16 + 8 * SIZE * SIZE)
    assert rejected_as(psd) == "unsupported"
    heic = b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(8) + b"\0\0\0\x08mdat"
    assert rejected_as(heic) == "unsupported"


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_white_of_a_shallow_jpeg_2000_is_white(bits: int, boxed: bool) -> None:
    """Made of one of 8 bits, whose header is told fewer: its middle, 128, becomes theirs."""
    values = gray().astype(int) * 2**bits // 256
    image = Image.fromarray((values - 2 ** (bits - 1) + 128).astype(np.uint8))
    data = bytearray(encode(image, "JPEG2000", no_jp2=not boxed))
    data[data.find(b"\xff\x4f\xff\x51") + 42] = bits - 1
    assert same(bytes(data), values * 255 / (2**bits - 1), limit=0.5)


def with_depth(data: bytes, bits: int, signed: bool = False) -> bytes:
    """Returns a lossy JPEG 2000 of 8 bits whose header is told another depth: the same picture, with that many bits."""
    told, at = bytearray(data), data.find(b"\xff\x4f\xff\x51") + 42
    for channel in range(int.from_bytes(data[at - 2 : at], "big")):
        told[at + 3 * channel] = bits - 1 + 128 * signed
    return bytes(told)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("bits", [9, 10, 12, 16])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_white_of_a_deep_jpeg_2000_is_white(mode: str, bits: int, boxed: bool) -> None:
    """Lossy black and white: what exceeds white is cut off, and is not black."""
    noise = np.random.default_rng(bits).integers(0, 2, (SIZE, SIZE, len(mode)), np.uint8) * 255
    options = {"no_jp2": not boxed, "irreversible": True, "quality_mode": "rates", "quality_layers": [3]}
    data = encode(Image.fromarray(noise, mode), "JPEG2000", **options)
    assert np.abs(found(with_depth(data, bits)) - found(data)).max() <= 2


def test_equal_colours_in_a_palette_of_a_jp2_are_two() -> None:
    """Pillow takes them for one, so that all that follow are moved."""
    table = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    table[100:150] = table[50:100]
    numbers = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    data = encode(Image.fromarray(numbers), "JPEG2000")
    palette = struct.pack(">HB3B", 256, 3, 7, 7, 7) + table.tobytes()
    mapping = b"".join(struct.pack(">HBB", 0, 1, column) for column in range(3))
    boxes = b"".join(
        struct.pack(">I", 8 + len(content)) + kind + content
        for kind, content in ((b"pclr", palette), (b"cmap", mapping))
    )
    head, colour = data.find(b"jp2h") - 4, data.find(b"colr") - 4
    size = int.from_bytes(data[head : head + 4], "big")
    changed = data[head + 4 : colour] + data[colour : colour + 11] + struct.pack(">I", 16)  # sRGB, not grey
    boxed = changed + data[colour + 15 : head + size] + boxes
    assert same(data[:head] + struct.pack(">I", size + len(boxes)) + boxed + data[head + size :], table[numbers])


def test_what_there_is_of_a_cut_deep_jpeg_2000_can_be_kept() -> None:
    data = with_depth(encode(Image.fromarray(colours()), "JPEG2000", irreversible=True, no_jp2=True), 12)
    keep = Recipe(SIZE, full_decode=True, keep_truncated=True)
    with pytest.raises(Rejected, match="truncated"):
        square(data[:150], keep)
    assert "truncated" in square(data[: len(data) * 2 // 3], keep).flags


@pytest.mark.parametrize(
    ("space", "read"), [(0, "negative"), (1, "YCbCr"), (4, "YCbCr"), (14, None), (16, "RGB"), (24, None)]
)
def test_the_space_of_a_jp2_is_the_one_that_it_names(space: int, read: str | None) -> None:
    picture = Image.fromarray(255 - gray()) if read == "negative" else Image.fromarray(colours())
    stored = Image.merge("RGB", picture.convert("YCbCr").split()) if read == "YCbCr" else picture
    data = encode(stored, "JPEG2000")
    at = data.find(b"colr") + 7
    data = data[:at] + struct.pack(">I", space) + data[at + 4 :]
    if read is None:
        assert rejected_as(data) == "unsupported"
    else:
        assert same(data, gray() if read == "negative" else colours(), limit=1.5)
        deep = encode(stored, "JPEG2000", irreversible=True)
        at = deep.find(b"colr") + 7
        deep = with_depth(deep[:at] + struct.pack(">I", space) + deep[at + 4 :], 12)
        assert read == "negative" or same(deep, colours(), limit=2)


def test_a_channel_of_a_jp2_that_is_not_specified_is_no_alpha() -> None:
    data = encode(Image.fromarray(np.dstack([colours(), gray()])), "JPEG2000")
    told = b"".join(struct.pack(">3H", i, 0, i + 1) for i in range(3)) + struct.pack(">3H", 3, 65535, 65535)
    head = data.find(b"jp2h") - 4
    size, at = int.from_bytes(data[head : head + 4], "big"), data.find(b"cdef") - 4
    box = struct.pack(">I4sH", 34, b"cdef", 4) + told
    if at > 0:
        data = data[:at] + box + data[at + int.from_bytes(data[at : at + 4], "big") :]
    else:
        data = data[:head] + struct.pack(">I", size + 34) + data[head + 4 : head + size] + box + data[head + size :]
    assert same(data, colours())


def test_signs_in_a_jpeg_2000_are_understood() -> None:
    data = encode(Image.fromarray(colours()), "JPEG2000", irreversible=True)
    assert same(with_depth(data, 8, signed=True), colours())
    assert same(with_depth(data, 12, signed=True), colours())


def test_colours_of_a_jp2_may_be_multiplied_by_alpha() -> None:
    alpha = np.full((SIZE, SIZE, 1), 128, np.uint8)
    data = encode(Image.fromarray(np.dstack([colours() // 2, alpha])), "JPEG2000")
    at = data.find(b"cdef") if b"cdef" in data else None
    told = b"".join(struct.pack(">3H", i, 0, i + 1) for i in range(3)) + struct.pack(">3H", 3, 2, 0)
    box = struct.pack(">I4sH", 34, b"cdef", 4) + told
    if at is not None:
        data = data[: at - 4] + box + data[at - 4 + int.from_bytes(data[at - 4 : at], "big") :]
    else:
        head = data.find(b"jp2h") - 4
        size = int.from_bytes(data[head : head + 4], "big")
        grown = struct.pack(">I", size + len(box)) + data[head + 4 : head + size] + box
        data = data[:head] + grown + data[head + size :]
    assert same(data, colours() / 2 + 127, limit=1.5)


def test_the_channels_of_a_jp2_may_be_in_another_order() -> None:
    data = encode(Image.fromarray(colours()), "JPEG2000")
    at = data.find(b"jp2h") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        told = b"".join(struct.pack(">3H", channel, 0, 1 + colour) for channel, colour in enumerate(order))
        box = struct.pack(">I4sH", 28, b"cdef", 3) + told
        head = struct.pack(">I", size + len(box)) + data[at + 4 : at + size] + box
        expected = np.empty_like(colours())
        expected[..., order] = colours()
        assert same(data[:at] + head + data[at + size :], expected)
