"""Pictures that Pillow decodes almost right: what their files say besides of alpha, of depth and of zero."""

from __future__ import annotations

import re
import struct

import numpy as np
from PIL import Image, ImageChops, ImageFile

from gan_dist.data.prepare import jpeg2000
from gan_dist.data.prepare.account import Rejected

_LOOSE_ALPHA = ("BMP", "DIB", "TGA", "DDS")
"""Formats whose writers often leave the fourth byte of a pixel at zero, whatever the header says about it."""
_SCALING = (b"BITPIX", b"BZERO", b"BSCALE")
_XPM_COLOUR = re.compile(rb"\bc\s+(#[0-9a-fA-F]{6}|None)(\s|$)")
_MASKS_OF_1555 = struct.pack("<4I", 0x7C00, 0x3E0, 0x1F, 0x8000)


def check_xpm(data: bytes) -> None:
    """Raises Rejected for an XPM with colours that Pillow does not know, all but #RRGGBB and None, and for one whose
    rows have not as many pixels as it says, which Pillow does not count."""
    strings = re.findall(rb'"([^"]*)"', data)
    if not strings:
        raise Rejected("truncated", "XPM: it ends before its size")
    width, height, number, letters = map(int, strings[0].split()[:4])
    if not all(_XPM_COLOUR.search(text[letters:]) for text in strings[1 : 1 + number]):
        raise Rejected("unsupported", "XPM: a colour that is neither #RRGGBB nor None")
    rows = strings[1 + number :]
    if len(rows) < height:
        raise Rejected("truncated", f"XPM: {len(rows)} of {height} rows")
    if any(len(row) != width * letters for row in rows[:height]):
        raise Rejected("corrupt", "XPM: a row with more or fewer pixels than it should have")


def prepared(header: Image.Image, data: bytes) -> None:
    """Lets an opened BMP of 16 bits a pixel that gives one of them to alpha be loaded with it, and a packed PSD with
    more channels than are shown from where its pixels begin: after the lengths of the rows of all of them."""
    if header.format == "PSD" and isinstance(header, ImageFile.ImageFile):
        more = 2 * header.height * (int.from_bytes(data[12:14], "big") - len(header.tile))
        header.tile = [
            tile._replace(offset=tile.offset + more) if tile.codec_name == "packbits" else tile for tile in header.tile
        ]
    if header.format != "BMP" or header.mode != "RGB" or data[14] < 56 or data[54:70] != _MASKS_OF_1555:
        return
    assert isinstance(header, ImageFile.ImageFile)
    (tile,) = header.tile
    if isinstance(tile.args, tuple) and tile.args[0] == "BGR;15":
        header.tile = [tile._replace(args=("BGRA;15", *tile.args[1:]))]
        header._mode = "RGBA"


def corrected(
    image: Image.Image, data: bytes, format: str, patient: bool, flags: list[str]
) -> tuple[Image.Image, float | None]:
    """Returns a loaded picture as its file means it, with the value of white where the file tells, and adds flags."""
    info, white = image.info, None
    match format:
        case "XBM":
            image = ImageChops.invert(image)  # a bit that is set is ink
        case "PSD" if not _psd_has_picture(data):
            raise Rejected("unsupported", "PSD: saved without the whole picture that its layers make")
        case "PSD" if image.mode == "1":
            image = ImageChops.invert(image)  # the same
        case "PSD" if image.mode in ("RGBA", "LA") and not _psd_has_transparency(data):
            image = image.convert(image.mode[:-1])  # a selection that was saved
        case "FITS":
            image, white = _fits(image, data)
        case "JPEG2000":
            image = jpeg2000.corrected(image, data, patient)
        case "TGA" if data[16] == 16 or (data[1] and data[7] == 16):
            image = _with_opposite_alpha(image)
    image.info = info
    if format in _LOOSE_ALPHA and image.has_transparency_data:
        shown = image.convert("RGBA") if image.mode == "P" else image
        if shown.getextrema()[-1] == (0, 0):
            image = shown.convert(shown.mode[:-1])
            flags.append("alpha_ignored")
    return image, white


def _psd_has_picture(data: bytes) -> bool:
    """Returns whether a PSD has its merged picture, and no blank one instead: resource 1057 says so (Adobe's
    specification, "Version Info")."""
    place = 30 + int.from_bytes(data[26:30], "big")
    end, place = place + 4 + int.from_bytes(data[place : place + 4], "big"), place + 4
    while place < end and data[place : place + 4] == b"8BIM":
        name = place + 6
        size = name + (data[name] // 2 + 1) * 2  # a name of even length, its own length included
        if data[place + 4 : place + 6] == b"\x04\x21":
            return data[size + 8] != 0
        length = int.from_bytes(data[size : size + 4], "big")
        place = size + 4 + length + length % 2
    return True


def _psd_has_transparency(data: bytes) -> bool:
    """Returns whether the fourth channel of a PSD's merged picture is its transparency: a number of layers below zero
    says so (Adobe's specification, "Layer info")."""
    place = 26
    for _ in range(2):  # colours, resources
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    return int.from_bytes(data[place : place + 4], "big") > 5 and data[place + 8] >= 128


def _with_opposite_alpha(image: Image.Image) -> Image.Image:
    """Returns a TGA whose pixels or colours have 16 bits with the last of them as alpha, 1 being opaque."""
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        *colours, alpha = image.split()
        image = Image.merge("RGBA", (*colours, ImageChops.invert(alpha)))
    return image


def _fits(image: Image.Image, data: bytes) -> tuple[Image.Image, float | None]:
    """Returns a FITS with its values as its header scales them, BZERO + BSCALE * stored (FITS 4.0, eq. 3), and white
    where these are integers without a sign."""
    numbers: dict[bytes, float] = {}
    for place in range(0, data.find(b"END     "), 80):
        key, value = data[place : place + 8].rstrip(), data[place + 10 : place + 80].partition(b"/")[0]
        if key in _SCALING:
            numbers.setdefault(key, float(value.strip().upper().replace(b"D", b"E")))
    zero, scale, bits = numbers.get(b"BZERO", 0.0), numbers.get(b"BSCALE", 1.0), int(numbers.get(b"BITPIX", 0))
    if (zero, scale) == (0, 1):
        return image, None
    stored = np.asarray(image)
    if bits in (16, 32):
        stored = stored.view(f"i{bits // 8}")
    values = (zero + scale * stored.astype(np.float64)).clip(0)
    white = 2.0**bits - 1 if bits > 0 and (zero, scale) == (2.0 ** (bits - 1), 1) else None
    return Image.fromarray(values.astype(np.float32)), white
