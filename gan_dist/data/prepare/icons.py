"""Icons and cursors of Windows and macOS: the largest, deepest picture of several, read as the file that it is."""

from __future__ import annotations

import io
import struct

from PIL import IcnsImagePlugin, IcoImagePlugin, Image

from gan_dist.data.prepare.png import SIGNATURE

_ICON, _CURSOR, _ICNS = b"\0\0\1\0", b"\0\0\2\0", b"icns"
_FILES = (SIGNATURE, b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
"""How the files (PNG, JPEG 2000) begin that an icon may hold as they are."""


def as_icon(data: bytes) -> bytes:
    """Returns a cursor as an icon, any other file as it is. (A TGA may begin as a cursor does.)"""
    if data.startswith(_CURSOR) and data[4:6] != b"\0\0" and data[9:10] == b"\0" and len(data) > 22:
        size, start = struct.unpack("<II", data[14:22])
        if 22 <= start < start + size <= len(data):
            return _ICON + data[4:]
    return data


def inner_file(data: bytes) -> bytes | None:
    """Returns the file that is the best picture of an icon, or None where it is stored in the icon's own way.

    Raises whatever Pillow raises for a damaged icon."""
    if not data.startswith((_ICON, _ICNS)):
        return None
    if data.startswith(_ICNS):
        icon = IcnsImagePlugin.IcnsFile(io.BytesIO(data))
        places = [icon.dct[code] for code, _ in icon.SIZES[icon.bestsize()] if code in icon.dct]
    else:
        places = [_entries(data)[0][2:]]
    files = (data[start : start + size] for start, size in places)
    return next((file for file in files if file.startswith(_FILES)), None)


def opened(data: bytes) -> Image.Image:
    """Returns the best picture of an icon that stores it in its own way. Raises whatever Pillow raises."""
    if data.startswith(_ICNS):
        return IcnsImagePlugin.IcnsImageFile(io.BytesIO(data), "")
    depth, _, start, size = _entries(data)[0]
    if start + size > len(data):
        raise OSError(f"the picture at byte {start} is truncated")
    # an icon of this picture alone, with its true depth: Pillow takes the shallowest, and reads alpha by this number
    for bits in (depth, 24):
        entry = data[6:8] + b"\0\0\1\0" + struct.pack("<HII", bits, size, 22)
        image = IcoImagePlugin.IcoFile(io.BytesIO(_ICON + b"\1\0" + entry + data[start : start + size])).frame(0)
        if bits != 32 or image.mode != "RGBA" or image.getextrema()[-1] != (0, 0):
            break  # what is transparent everywhere has its transparency in the mask alone
    image.format = "ICO"
    return image


def _entries(data: bytes) -> list[tuple[int, int, int, int]]:
    """Returns depth, pixels, start and size of each picture of an .ico or .cur, the largest and deepest first.

    The directory is trusted in places alone: its depths are often 0, and in a cursor they are something else."""
    entries = []
    for place in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        size, start = struct.unpack("<II", data[place + 8 : place + 16])
        content = data[start : start + 40]
        if content.startswith(SIGNATURE):
            width, height, bits, kind = struct.unpack(">IIBB", content[16:26])
            depth = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1)
        else:
            width, height, depth = *struct.unpack("<ii", content[4:12]), int.from_bytes(content[14:16], "little")
            height = abs(height) // 2
        entries.append((depth, width * height, start, size))
    return sorted(entries, key=lambda entry: (-entry[1], -entry[0]))
