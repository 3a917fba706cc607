"""JPEG 2000s of other depths than 8 bits, and with channels in another order than usual.

Pillow moves a channel's bits up or down to 8 without stretching or clamping them, so that white becomes grey or black,
and looks neither at the order of channels nor at how alpha was applied. Its copy of openjpeg, which knows all that, is
called here.
"""

from __future__ import annotations

import ctypes
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, _imaging

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.structure import jp2_colours

_SIZ = b"\xff\x4f\xff\x51"
_CODESTREAM, _JP2 = 0, 2
_SYCC, _CMYK = (3, 4), 5
_BY_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_MODES = {*_BY_CHANNELS.values(), "CMYK", "P", "PA"}
_ALPHA, _PREMULTIPLIED, _UNSPECIFIED = (1, 2), 2, 65535
_WHITE_IS_ZERO, _YCBCR, _READ_RIGHT = 0, (1, 3, 4), (12, 15, 16, 17, 18)
"""Numbers of colour spaces (ISO/IEC 15444-1, table I.10, and 15444-2, table M.25)."""
_BLOCK = 2**20
_LONGEST_PARAMETERS = 2**14
"""Bytes, more than openjpeg's opj_dparameters_t has."""
_READ = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_SKIP = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_SEEK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)


class _Component(ctypes.Structure):
    """opj_image_comp_t."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("dx", "dy", "width", "height", "left", "top", "depth", "obsolete")),
        *((name, ctypes.c_uint32) for name in ("signed", "resolutions", "factor")),
        ("data", ctypes.POINTER(ctypes.c_int32)),
        ("alpha", ctypes.c_uint16),
    )


class _Picture(ctypes.Structure):
    """opj_image_t."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("left", "top", "right", "bottom", "number")),
        ("space", ctypes.c_int),
        ("components", ctypes.POINTER(_Component)),
    )


@lru_cache(maxsize=1)
def _library() -> Any:
    """Returns the openjpeg that Pillow has loaded, or None where it cannot be called."""
    try:
        library = ctypes.CDLL(_imaging.__file__)
        stream, codec, picture = ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Picture)
        for name, result, *arguments in (
            ("opj_stream_create", stream, ctypes.c_size_t, ctypes.c_int),
            ("opj_stream_set_read_function", None, stream, _READ),
            ("opj_stream_set_skip_function", None, stream, _SKIP),
            ("opj_stream_set_seek_function", None, stream, _SEEK),
            ("opj_stream_set_user_data_length", None, stream, ctypes.c_uint64),
            ("opj_stream_destroy", None, stream),
            ("opj_create_decompress", codec, ctypes.c_int),
            ("opj_set_default_decoder_parameters", None, ctypes.c_char_p),
            ("opj_setup_decoder", ctypes.c_int, codec, ctypes.c_char_p),
            ("opj_decoder_set_strict_mode", ctypes.c_int, codec, ctypes.c_int),
            ("opj_read_header", ctypes.c_int, stream, codec, ctypes.POINTER(picture)),
            ("opj_decode", ctypes.c_int, codec, stream, picture),
            ("opj_destroy_codec", None, codec),
            ("opj_image_destroy", None, picture),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library


def corrected(image: Image.Image, data: bytes, patient: bool) -> Image.Image:
    """Returns a picture that Pillow has loaded as its file means it. `patient`: what can be decoded of a cut one.

    Raises Rejected where openjpeg is needed and cannot be called, or cannot decode it."""
    if not is_unusual(image, data):
        return _of_space(image, data)
    if (library := _library()) is None:
        raise Rejected("unsupported", "JPEG2000: of other than 8 bits, and openjpeg cannot be called here")
    try:
        return _of_space(_corrected(library, image, data, patient), data)
    except Rejected:
        if patient:  # Pillow has made something of what there is
            return image
        raise


def check_space(data: bytes) -> None:
    """Raises Rejected for a JP2 of colours that nothing here can read."""
    space = _space(data)
    if space is not None and space < 256 and space not in (_WHITE_IS_ZERO, *_YCBCR, *_READ_RIGHT):
        raise Rejected("unsupported", f"JPEG2000: the colour space {space}")


def _space(data: bytes) -> int | None:
    """Returns the number of the colour space that a JP2 names, if it does."""
    colours = jp2_colours(data)
    return int.from_bytes(colours[3:7], "big") if colours[:1] == b"\1" and len(colours) >= 7 else None


def _of_space(image: Image.Image, data: bytes) -> Image.Image:
    """Returns a JP2 in a colour space that Pillow does not look at in one that it has."""
    space = _space(data)
    if space == _WHITE_IS_ZERO and image.mode == "L":
        return ImageChops.invert(image)
    if space in _YCBCR and image.mode == "RGB" and not _is_subsampled(data):  # which tells by itself
        return Image.merge("YCbCr", image.split()).convert("RGB")
    return image


def _is_subsampled(data: bytes) -> bool:
    """Returns whether a channel has fewer samples than the first."""
    place = data.find(_SIZ) + 40
    steps = data[place + 3 : place + 2 + 3 * int.from_bytes(data[place : place + 2], "big")]
    return len(set(steps[::3])) > 1 or len(set(steps[1::3])) > 1


def _corrected(library: Any, image: Image.Image, data: bytes, patient: bool) -> Image.Image:
    """Returns a picture as openjpeg decodes it."""
    mode = image.mode
    with _decoded(library, data, image.size, patient) as picture:
        components = [picture.components[i] for i in range(picture.number)]
        planes = [Image.fromarray(_plane(component, image.size)) for component in components]
        alphas = [component.alpha for component in components]
        steps = {(component.dx, component.dy) for component in components}
        if _has_palette(data):  # which is applied by now
            mode = "CMYK" if picture.space == _CMYK else _BY_CHANNELS.get(len(planes), "?")
        is_sycc = picture.space in _SYCC or (picture.space < 1 and len(steps) > 1)
    # colours are in order by now; without a box that says so, the second or fourth channel is alpha
    colours = [plane for plane, alpha in zip(planes, alphas, strict=True) if not alpha]
    bands = [*colours, *(plane for plane, alpha in zip(planes, alphas, strict=True) if alpha in _ALPHA)]
    if _UNSPECIFIED in alphas and not set(_ALPHA) & set(alphas):
        mode = {"RGBA": "RGB", "LA": "L"}.get(mode, mode)
    if mode not in _MODES or len(bands) < (number := Image.getmodebands(mode)):
        raise Rejected("unsupported", f"JPEG2000: {len(bands)} channels for {mode}")
    bands = bands[:number]
    if is_sycc and mode in ("RGB", "RGBA"):
        bands[:3] = Image.merge("YCbCr", bands[:3]).convert("RGB").split()
    if _PREMULTIPLIED in alphas and mode in ("LA", "RGBA"):
        return Image.merge(f"{mode[:-1]}a", bands).convert(mode)
    return Image.merge(mode, bands)


def _has_palette(data: bytes) -> bool:
    return b"pclr" in data[: max(0, data.find(_SIZ))]


def is_unusual(image: Image.Image, data: bytes) -> bool:
    """Returns whether there is a palette, a channel has other than 8 bits or a sign, or a box says of channels what is
    not usual, and more than grey is in it."""
    channels = len(image.getbands())
    if image.mode not in _MODES:
        return False
    if _has_palette(data):  # of which Pillow takes equal colours for one
        return True
    place = data.find(_SIZ)
    depths = data[place + 42 : place + 42 + 3 * channels : 3]
    if place < 0 or len(depths) < channels:
        return False
    at = data.find(b"cdef", 0, place)
    told = data[at + 6 : at + 6 + 6 * channels] if at >= 0 else b""
    usual = b"".join(struct.pack(">3H", i, 0, i + 1) for i in range(channels))
    with_alpha = usual[:-6] + struct.pack(">3H", channels - 1, 1, 0)
    return any(depth != 7 for depth in depths) or (at >= 0 and told not in (usual, with_alpha))


@contextmanager
def _decoded(library: Any, data: bytes, size: tuple[int, int], patient: bool) -> Iterator[_Picture]:
    """A context with what openjpeg decodes of a picture of `size`."""
    source = io.BytesIO(data)

    def read(buffer: int, size: int, _: object) -> int:
        piece = source.read(size)
        ctypes.memmove(buffer, piece, len(piece))
        return len(piece) or 2**64 - 1

    def skip(size: int, _: object) -> int:
        source.seek(size, io.SEEK_CUR)
        return size

    def seek(place: int, _: object) -> bool:
        return source.seek(place) == place

    callbacks = _READ(read), _SKIP(skip), _SEEK(seek)  # kept as long as they may be called
    parameters, picture = ctypes.create_string_buffer(_LONGEST_PARAMETERS), ctypes.POINTER(_Picture)()
    stream = library.opj_stream_create(_BLOCK, 1)
    codec = library.opj_create_decompress(_CODESTREAM if data.startswith(_SIZ) else _JP2)
    try:
        for name, callback in zip(("read", "skip", "seek"), callbacks, strict=True):
            getattr(library, f"opj_stream_set_{name}_function")(stream, callback)
        library.opj_stream_set_user_data_length(stream, len(data))
        library.opj_set_default_decoder_parameters(parameters)
        done = (
            library.opj_setup_decoder(codec, parameters)
            and library.opj_decoder_set_strict_mode(codec, not patient)
            and library.opj_read_header(stream, codec, ctypes.byref(picture))
            and _size(picture.contents) == size
            and library.opj_decode(codec, stream, picture)
        )
        if not done:
            raise Rejected("corrupt", "JPEG2000: openjpeg cannot decode it")
        yield picture.contents
    finally:
        library.opj_destroy_codec(codec)
        library.opj_stream_destroy(stream)
        if picture:
            library.opj_image_destroy(picture)


def _size(picture: _Picture) -> tuple[int, int]:
    return picture.right - picture.left, picture.bottom - picture.top


def _plane(component: _Component, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns a channel of a picture of `size` as [H, W], with its largest value at 255."""
    shape = component.height, component.width
    across, down = -(-size[0] // component.dx), -(-size[1] // component.dy)
    values = np.ctypeslib.as_array(component.data, shape)[:down, :across].astype(np.float32)
    if component.signed:
        values += 2.0 ** (component.depth - 1)
    scaled = np.rint(values * np.float32(255 / (2.0**component.depth - 1))).clip(0, 255).astype(np.uint8)
    whole = scaled.repeat(component.dy, axis=0).repeat(component.dx, axis=1)[: size[1], : size[0]]
    return np.pad(whole, ((0, size[1] - whole.shape[0]), (0, size[0] - whole.shape[1])), mode="edge")
