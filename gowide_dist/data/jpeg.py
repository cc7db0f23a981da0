"""JPEG streams, by libturbojpeg, which FFCV's C library brings along.

Pillow passes over what libjpeg only warns of, and fills what is missing with grey. Here every warning is an error.
Markers by ITU T.81, annex B.
"""

import ctypes
import importlib.util
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_RGB, _CMYK = 0, 11  # turbojpeg.h: enum TJPF
_SOI, _SOS, _EOI = 0xD8, 0xDA, 0xD9
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xCA}
_HARMLESS = b"unknown JFIF revision"  # a version number in the header

_package = importlib.util.find_spec("ffcv")
assert _package is not None and _package.origin is not None, "ffcv is a dependency"
LIBRARY = ctypes.CDLL(str(next(Path(_package.origin).parent.glob("_libffcv*.so"))))  # and the symbols of libturbojpeg
LIBRARY.tjInitDecompress.restype = ctypes.c_void_p
LIBRARY.tjGetErrorStr2.argtypes, LIBRARY.tjGetErrorStr2.restype = [ctypes.c_void_p], ctypes.c_char_p
LIBRARY.tjDecompress2.argtypes = [
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5,
]  # fmt: skip
_thread = threading.local()  # a decompressor is one thread's


class Frame(NamedTuple):
    """A JPEG's frame header. plain: baseline or progressive, 8 bits, and no fill bytes before its markers.

    has_exif: whether EXIF comes before it.
    """

    height: int
    width: int
    components: int
    plain: bool
    has_exif: bool


def is_jpeg(content: bytes) -> bool:
    """Whether an image file is a JPEG, by its first bytes."""
    return content.startswith(b"\xff\xd8\xff")


def decode(content: bytes, frame: Frame, scale: int = 1) -> NDArray[np.uint8]:
    """Decode a whole JPEG, its sides divided by `scale` (1, 2, 4 or 8) and rounded up.

    Returns RGB [H, W, 3] of one or three components, CMYK [H, W, 4] of four. Raises ValueError for any damage, also
    such as libjpeg only warns of.
    """
    if not hasattr(_thread, "handle"):
        _thread.handle = LIBRARY.tjInitDecompress()
    height, width = -(-frame.height // scale), -(-frame.width // scale)
    pixels = np.empty((height, width, 4 if frame.components == 4 else 3), np.uint8)
    colours = _CMYK if frame.components == 4 else _RGB
    size = width, 0, height, colours, 0
    if LIBRARY.tjDecompress2(_thread.handle, content, len(content), pixels.ctypes.data, *size):
        message = LIBRARY.tjGetErrorStr2(_thread.handle)
        revised = re.sub(rb"(JFIF\0).", b"\\1\1", content, count=1, flags=re.DOTALL)
        if _HARMLESS in message and revised != content:  # it is said instead of what comes after it
            return decode(revised, frame, scale)
        raise ValueError(message.decode(errors="replace").removeprefix("Corrupt JPEG data: "))
    return pixels


def read_frame(content: bytes) -> Frame:
    """The frame header of a JPEG. Raises ValueError if there is none, or if scans of a progressive one are missing."""
    position, filled = 2, False
    while position + 10 <= len(content) and content[position] == 0xFF:
        code = content[position + 1]
        if code == 0xFF:
            position, filled = position + 1, True
            continue
        if code in _START_OF_FRAME:
            bits, height, width, components = (
                content[position + 4], int.from_bytes(content[position + 5 : position + 7]),
                int.from_bytes(content[position + 7 : position + 9]), content[position + 9],
            )  # fmt: skip
            if code in _PROGRESSIVE and not _has_all_scans(content, position, components):
                raise ValueError("scans of a progressive JPEG are missing")
            plain = code <= 0xC2 and bits == 8 and not filled
            return Frame(height, width, components, plain, has_exif=b"Exif\0" in content[:position])
        if code in (_SOS, _EOI, _SOI):
            break
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    raise ValueError("a JPEG without a frame header")


def _has_all_scans(content: bytes, frame: int, num_components: int) -> bool:
    """Whether the scans give every coefficient of every component to its last bit: libjpeg is content with fewer."""
    identifiers = content[frame + 10 : frame + 10 + 3 * num_components : 3]
    missing = {identifier: set(range(64)) for identifier in identifiers}
    start = frame
    while (start := content.find(bytes([0xFF, _SOS]), start + 1)) >= 0:  # in coded data 0xFF is followed by 0
        count = content[start + 4] if start + 4 < len(content) else 0
        header = content[start + 5 : start + 8 + 2 * count]
        if len(header) < 2 * count + 3:
            break
        first, last, approximation = header[2 * count :]
        if not approximation & 0x0F:
            for identifier in header[: 2 * count : 2]:
                missing.get(identifier, set()).difference_update(range(first, last + 1))
    return not any(missing.values())
