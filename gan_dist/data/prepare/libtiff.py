"""What libtiff says while Pillow decodes with it: Pillow silences its warnings, and passes over errors that do not end
the decoding. Its copy of libtiff is told here to report them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import _imaging

_WARN = ("Fax", "JPEG", "PackBits")
"""Decoders whose warnings tell of damage. (Others tell of tags, or that a file is old.)"""
_FAIL = (*_WARN, "LERC", "LZMA", "LZW", "LibJpeg", "LogL", "NeXT", "OJPEG", "Pixar", "Thunder", "WebP", "ZIP", "ZSTD")
"""Decoders: their errors tell of damage, those of the readers of tags do not."""
_HARMLESS = (
    "JPEG strip size exceeds expected dimensions",  # a last strip as high as the others, which is shown in part
    "Auto-corrected former TIFF subsampling",  # the strip is believed, not the tag, which may be missing
    "have no TIFF equivalent",  # the tag stays as it is; strips that do not fit it are errors
    "Unable to auto-correct subsampling",  # the same
    "JFIF revision",  # of JPEGs' headers
    "Adobe color",
    "Invalid SOS",
)
"""Parts of warnings that say nothing of pixels."""
_LISTENING = threading.RLock()
"""libtiff has one listener for the whole process."""
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_EXTENDER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass
class Messages:
    """What was said of pixels: `errors` and `warnings`, which do not keep libtiff from going on."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@lru_cache(maxsize=1)
def _library() -> Any:
    """Returns the libtiff that Pillow has loaded, or None where it cannot be called."""
    try:
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetErrorHandler.argtypes = [ctypes.c_void_p]
        library.TIFFSetErrorHandler.restype = ctypes.c_void_p
        for name in ("TIFFSetErrorHandlerExt", "TIFFSetWarningHandlerExt", "TIFFSetTagExtender"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
        library.vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


def available() -> bool:
    """Returns whether libtiff can be listened to."""
    return _library() is not None


@contextmanager
def messages() -> Iterator[Messages]:
    """A context that gives what libtiff says of damaged pixels in the meantime. One thread is in it at a time."""
    library = _library()
    if library is None:
        yield Messages()
        return
    with _LISTENING:
        yield from _heard(library)


def _heard(library: Any) -> Iterator[Messages]:
    result = Messages()

    def listener(lines: list[str], decoders: tuple[str, ...]) -> Any:
        def hear(_: Any, module: bytes | None, format: bytes, values: Any) -> None:
            name = (module or b"").decode("utf-8", "replace")
            if name.startswith(decoders):
                buffer = ctypes.create_string_buffer(200)
                library.vsnprintf(buffer, len(buffer), format, values)
                text = buffer.value.decode("utf-8", "replace")
                if not any(part in text for part in _HARMLESS):
                    lines.append(f"{name}: {text}")

        return _HANDLER(hear)

    on_error, on_warning = listener(result.errors, _FAIL), listener(result.warnings, _WARN)
    # Pillow removes handlers of warnings before it opens a file; while that is opened, this hook puts it back
    on_open = _EXTENDER(lambda _: library.TIFFSetWarningHandlerExt(on_warning))
    quiet = library.TIFFSetErrorHandler(None)
    library.TIFFSetErrorHandlerExt(on_error)
    before = library.TIFFSetTagExtender(on_open)
    try:
        yield result
    finally:
        library.TIFFSetTagExtender(before)
        library.TIFFSetErrorHandlerExt(None)
        library.TIFFSetWarningHandlerExt(None)
        library.TIFFSetErrorHandler(quiet)
