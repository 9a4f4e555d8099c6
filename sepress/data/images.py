"""A file -> pixels: decoded, upright, 8 bits a channel, grey or RGB; or a stated reason why not.

Alpha is dropped as Pillow's `convert` does (the hidden colours show), which is what training
pipelines have always done; of an animation the first frame counts.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

Mode = Literal["L", "RGB"]
Reader = Callable[[Any, Mode], Image.Image]  # (key of an image, mode) -> the image in that mode

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

# What Pillow's decoders raise on damaged files, beside OSError, depending on the format.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_ORIENTATION = 0x0112  # EXIF tag


class UnreadableImage(Exception):
    """The image can't be decoded; the text says why."""


@contextmanager
def decoding() -> Iterator[None]:
    """Make decompression bombs errors, and keep Pillow's remarks on damaged metadata to itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        yield


def decode(read: Reader, key: object, mode: Mode) -> Image.Image:
    """Read one image in the given mode; UnreadableImage where it is damaged. Call it inside `decoding`."""
    try:
        return read(key, mode)
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(reason) from error


def load_file(path: Path, mode: Mode) -> Image.Image:
    """Open an image file, turn it upright and convert it."""
    with Image.open(path) as image:
        image.load()
        return to_mode(_upright(image), mode)


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Convert to 8-bit grey or RGB; 16-bit greys are scaled, where Pillow itself would clip them."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I, as older Pillows open 16-bit PNGs
        levels = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point pixels have no known range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except _DAMAGE:  # damaged metadata leaves the pixels whole
        return image
    return ImageOps.exif_transpose(image) if turned else image
