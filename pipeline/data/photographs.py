"""Any image file as an upright RGB photograph."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.data.images import read_image_and_header
from pipeline.errors import InputError

__all__ = ["read_photograph", "rgb_photograph", "upright"]

_ORIENTATION = 0x0112
# The classes themselves: Image.open has a pixel limit of its own.
_WITH_EXIF: dict[str, type[Any]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "tiff": TiffImageFile,
}


def read_photograph(path: Path | str) -> NDArray[np.float32]:
    """Return a photograph `(H, W, 3)` between 0 and 1, turned as its EXIF data say.

    Args:
        path: PNG, JPEG, TIFF, PPM, PGM, PBM, GIF or BMP; grey or colour, 8 or 16 bits, or floats
            between 0 and 1. Transparency does not count.

    Raises:
        InputError: it is missing, damaged, holds several pages, or values of another kind.
    """
    pixels, header = read_image_and_header(path)
    if header.pages > 1:
        raise InputError(f"{path}: {header.pages} pages, expected one image; split the file")
    return upright(rgb_photograph(pixels, path), _orientation(Path(path), header.format))


def rgb_photograph(pixels: NDArray[Any], source: Path | str = "image") -> NDArray[np.float32]:
    """Return pixels as RGB `(H, W, 3)` between 0 and 1.

    Args:
        pixels: `(H, W)` or `(H, W, 1)` grey, `(H, W, 2)` grey with alpha, `(H, W, 3)` RGB or
            `(H, W, 4)` RGB with alpha; 8- or 16-bit integers over their full range, or floats
            between 0 and 1.
        source: named in errors.

    Raises:
        InputError: another shape or type, or floats outside that range.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not 1 <= pixels.shape[-1] <= 4 or 0 in pixels.shape:
        raise InputError(
            f"{source}: found shape {pixels.shape}, expected a photograph (H, W, 1 to 4 channels)"
        )
    coloured = pixels.shape[-1] >= 3
    pixels = pixels[..., :3] if coloured else np.repeat(pixels[..., :1], 3, axis=-1)
    if pixels.dtype in (np.uint8, np.uint16):
        return (pixels / np.float32(np.iinfo(pixels.dtype).max)).astype(np.float32)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InputError(
            f"{source}: found {pixels.dtype}, expected uint8, uint16 or floats in [0, 1]"
        )
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError(f"{source}: found floats outside [0, 1] or not finite; scale them")
    return pixels.astype(np.float32)


def upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return `image` `(H, W, C)` as it was seen.

    Args:
        image: as it is stored.
        orientation: 1 to 8, as in EXIF; anything else counts as 1, upright already.
    """
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _orientation(path: Path, kind: str) -> int:
    """Return the orientation that a file notes; 1 where it notes none that can be read."""
    if kind not in _WITH_EXIF or path.suffix.lower() == ".gz":
        return 1
    try:
        with path.open("rb") as stream:
            return int(_WITH_EXIF[kind](stream).getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # the pixels are whole; a broken note beside them is no reason to drop the image
