"""WebPs decoded in two steps, to see whether their data end where their pixels do.

A WebP has no checksum, and its decoder stops when it has all pixels. But after damage it reads other numbers of bits,
so it is nearly never done within the last bytes. libwebp tells that only to whoever gives it a file piece by piece,
which Pillow does not do; so its copy of libwebp is called here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.structure import riff_chunks

_OK, _SUSPENDED = 0, 5
_MODES = {"RGB": 0, "RGBA": 1}
_UNREAD = {b"VP8 ": 8, b"VP8L": 2}
"""Bytes at the end of the data that a decoder may not need: of lossy ones libwebp writes up to 3 such, libvpx 6."""
_PADDING = 32
"""Zeros that may follow."""


@lru_cache(maxsize=1)
def _library() -> Any:
    """Returns the libwebp that Pillow has loaded, or None where it cannot be called."""
    try:
        from PIL import _webp  # a Pillow may be built without it

        library = ctypes.CDLL(_webp.__file__)
        library.WebPINewRGB.restype = ctypes.c_void_p
        library.WebPINewRGB.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.WebPIUpdate.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        library.WebPIDecGetRGB.restype = ctypes.c_void_p
        library.WebPIDecGetRGB.argtypes = [ctypes.c_void_p, *4 * [ctypes.POINTER(ctypes.c_int)]]
        library.WebPIDelete.argtypes = [ctypes.c_void_p]
    except (ImportError, OSError, AttributeError):
        return None
    return library


def available() -> bool:
    """Returns whether libwebp can be called."""
    return _library() is not None


def decode(data: bytes, mode: str, size: tuple[int, int]) -> Image.Image | None:
    """Returns the picture of a WebP of `mode` (RGB or RGBA) and `size`, or None where only Pillow can decode it. The
    first picture of a film is checked, but left to Pillow.

    Raises Rejected where the pixels end before or after their data do."""
    library = _library()
    if library is None or mode not in _MODES:
        return None
    for kind, start, length in riff_chunks(data):
        if kind == b"ANMF":  # place, size - 1, duration and flags; then the chunks of a still picture
            frame = data[start + 16 : start + length]
            width, height = (int.from_bytes(data[start + i : start + i + 3], "little") + 1 for i in (6, 9))
            _decode(library, frame, riff_chunks(frame, 0), np.empty((height, width, 4), np.uint8))
            _check_alpha(library, frame, riff_chunks(frame, 0), (width, height))
            return None
    pixels = np.empty((size[1], size[0], len(mode)), np.uint8)
    if not _decode(library, data, riff_chunks(data), pixels):
        return None
    _check_alpha(library, data, riff_chunks(data), size)
    return Image.frombytes(mode, size, pixels)


def _check_alpha(library: Any, data: bytes, chunks: Iterator[tuple[bytes, int, int]], size: tuple[int, int]) -> None:
    """Raises Rejected unless the alpha of a lossy picture, where it is packed, ends where its data do: it is a lossless
    picture without its head (WebP container specification, "Alpha")."""
    width, height = size
    for kind, start, length in chunks:
        if kind == b"ALPH" and length and data[start] & 3 == 1:
            head = b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little")
            stream = head + data[start + 1 : start + length]
            chunk = b"VP8L" + len(stream).to_bytes(4, "little") + stream + bytes(len(stream) % 2)
            still = b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
            if not _decode(library, still, riff_chunks(still), np.empty((height, width, 4), np.uint8)):
                raise Rejected("corrupt", "WEBP: its alpha cannot be decoded")


def _decode(library: Any, data: bytes, chunks: Iterator[tuple[bytes, int, int]], pixels: NDArray[np.uint8]) -> bool:
    """Decodes a still picture into `pixels` and returns True; False where it is not one of that size."""
    kind, start, length = next((chunk for chunk in chunks if chunk[0] in _UNREAD), (b"VP8 ", 0, 0))
    end = min(start + length, len(data))
    padding = _PADDING - len(data[max(start, end - _PADDING) : end].rstrip(b"\0")) if length > _PADDING else 0
    needed = max(0, end - padding - _UNREAD[kind])
    numbers = [ctypes.c_int() for _ in range(4)]
    mode = _MODES["RGBA" if pixels.shape[2] == 4 else "RGB"]
    decoder = library.WebPINewRGB(mode, pixels.ctypes.data, pixels.nbytes, pixels.strides[0])
    try:
        status = library.WebPIUpdate(decoder, data, needed)
        if status == _OK:
            raise Rejected("corrupt", "WEBP: its pixels are complete before their data end")
        if status == _SUSPENDED:
            status = library.WebPIUpdate(decoder, data, len(data))
        library.WebPIDecGetRGB(decoder, *map(ctypes.byref, numbers))
    finally:
        library.WebPIDelete(decoder)
    if status == _SUSPENDED and start + length <= len(data):
        raise Rejected("corrupt", "WEBP: its pixels' data end too early")
    return status == _OK and (numbers[2].value, numbers[1].value) == pixels.shape[:2]
