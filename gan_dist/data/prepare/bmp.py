"""Run-length encoded BMPs, unpacked here: Pillow loses the place after rows that are empty, and sees no damage."""

from __future__ import annotations

import io

from PIL import Image, ImageFile

from gan_dist.data.prepare.account import Rejected

_PADDING = 32
"""Zeros that may follow the pixels."""


def is_packed(image: Image.Image) -> bool:
    """Returns whether an opened picture is a run-length encoded BMP."""
    return isinstance(image, ImageFile.ImageFile) and any(tile.codec_name == "bmp_rle" for tile in image.tile)


def load(image: Image.Image, data: bytes, patient: bool) -> bool:
    """Loads the pixels of a run-length encoded BMP, and returns whether it seems to be damaged: runs exceed a row, or
    do not end as they should, where the file says that they do.

    Raises Rejected where the pixels end too early, unless `patient`."""
    assert isinstance(image, ImageFile.ImageFile)
    (tile,) = image.tile
    assert isinstance(tile.args, tuple)
    _, in_halves, direction = tile.args
    pixels, end, fits = _unpacked(data, tile.offset, image.size, bool(in_halves))
    if end is None and not patient:
        raise Rejected("truncated", f"{image.format}: its rows are not complete")
    # Pillow goes on as with pixels that were never packed
    raw_mode = {"1": "1;8"}.get(image.mode, image.mode)
    image.tile = [tile._replace(codec_name="raw", offset=0, args=(raw_mode, 0, direction))]
    image.fp = io.BytesIO(pixels)
    image.load()
    return end is None or not fits or not _ends_where_it_says(data, tile.offset, end, image.size)


def _unpacked(data: bytes, place: int, size: tuple[int, int], in_halves: bool) -> tuple[bytes, int | None, bool]:
    """Returns the pixels, a byte each, in the order of the file; where their data end, or None if pixels are missing
    there; whether all runs fit into their rows and a mark stands at the end.

    What is passed over has the first colour: rows, and the picture, may end early. `in_halves`: two pixels a byte."""
    width, height = size
    pixels = bytearray(width * height)
    x = y = 0
    fits = True
    while place + 1 < len(data) and y < height:
        count, value = data[place], data[place + 1]
        place += 2
        if count == 0 and value == 0:
            x, y = 0, y + 1
            continue
        if count == 0 and value == 1:
            return bytes(pixels), place, fits and (y >= height - 1 or not data[place:].strip(b"\0"))
        if count == 0 and value == 2:
            step = data[place : place + 2]
            if len(step) < 2:
                break
            place, x, y = place + 2, x + step[0], y + step[1]
            fits = fits and x <= width
            continue
        if count:
            run = _halves(bytes([value]) * ((count + 1) // 2))[:count] if in_halves else bytes([value]) * count
        else:
            run = data[place : place + (value + 1) // 2 if in_halves else place + value]
            place += len(run) + len(run) % 2
            run = _halves(run)[:value] if in_halves else run
            count = len(run)  # less than `value` where the file ends
        fits, run = fits and x + count <= width, run[: max(0, width - x)]
        pixels[y * width + x : y * width + x + len(run)] = run
        x += count
    if y >= height:  # a mark of the end follows
        return bytes(pixels), place + 2, fits and (y, data[place : place + 2]) == (height, b"\0\1")
    return bytes(pixels), place if (x, y) == (width, height - 1) else None, False


def _halves(values: bytes) -> bytes:
    """Returns the upper and the lower half of each byte."""
    return bytes(half for value in values for half in (value >> 4, value & 15))


def _ends_where_it_says(data: bytes, start: int, end: int, size: tuple[int, int]) -> bool:
    """Returns whether pixels end where the header has them end. It is believed where it says the same twice, and not
    what they would have without being packed."""
    whole, packed = (int.from_bytes(data[place : place + 4], "little") for place in (2, 34))
    unpacked = {(size[0] * bits + 31) // 32 * 4 * size[1] for bits in (4, 8)}
    if data[:2] != b"BM" or whole != start + packed or packed == 0 or packed in unpacked:
        return True
    return end <= whole <= end + _PADDING and not data[end:whole].strip(b"\0") and whole <= len(data)
