"""Image files to arrays in `(H, W)`, `(H, W, C)` or `(D, H, W)`, never silently less than stored.

The kind of a file is told by its first bytes. Whatever its header announces is compared with a
budget before anything is decoded, and a file that ends early is refused. Pixels are as stored: a
rotation noted in EXIF is not applied.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tifffile import TiffFileError

from pipeline.data import rasters, tiffs
from pipeline.data.budget import check_decoded_bytes, decoded_limit_bytes
from pipeline.data.rasters import ImageHeader
from pipeline.errors import InputError

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageHeader",
    "image_stem",
    "read_header",
    "read_image",
    "read_image_and_header",
]

_PLAIN = (
    ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".bmp",
)  # fmt: skip
IMAGE_SUFFIXES: tuple[str, ...] = _PLAIN + tuple(f"{suffix}.gz" for suffix in _PLAIN)

_GZIP = b"\x1f\x8b"
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
    **{b"P%d" % digit: "pnm" for digit in range(1, 7)},
}
_HEAD_BYTES = (1 << 16, 1 << 20, 1 << 24)  # enough for a header, then for one behind much metadata
# What the decoders in use are known to raise on damaged files; imagecodecs raises RuntimeErrors.
_DECODER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    RuntimeError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    TiffFileError,
    Image.DecompressionBombError,
)


def image_stem(path: Path | str) -> str:
    """Return the file name without its suffix and without `.gz` behind it.

    Example:
        >>> image_stem("STARE/im0001.ah.pgm.gz"), image_stem("eye_1.5.png")
        ('im0001.ah', 'eye_1.5')
    """
    name = PurePath(path)
    return PurePath(name.stem if name.suffix.lower() == ".gz" else name.name).stem


def read_header(path: Path | str) -> ImageHeader:
    """Return what the header of `path` announces; nothing is decoded.

    Raises:
        InputError: the file is missing, no image, or cut short where that shows.
    """
    path = Path(path)
    with _named_errors(path), path.open("rb") as stream:
        if stream.read(2) == _GZIP:
            return _gzip_header(path, stream, decoded_limit_bytes())[0]
        return _header(path, stream)


def read_image(path: Path | str, *, limit: int | None = None) -> NDArray[Any]:
    """Return the pixels of `path` with the type they are stored in.

    One bit becomes 0 and 255, a gray palette its gray values, a coloured one RGB, CMYK RGB. An
    alpha channel is kept for the caller to decide about.

    Args:
        path: PNG, JPEG, TIFF, PPM, PGM, PBM, GIF or BMP, each also gzipped.
        limit: decoded bytes allowed; by default `decoded_limit_bytes()`.

    Returns:
        `(H, W)`, `(H, W, C)`, or for several TIFF pages `(D, H, W)` or `(D, H, W, C)`.

    Raises:
        InputError: the file is missing, no image, cut short, larger than the limit, or holds
            something that this function would have to drop.
    """
    return read_image_and_header(path, limit=limit)[0]


def read_image_and_header(
    path: Path | str, *, limit: int | None = None
) -> tuple[NDArray[Any], ImageHeader]:
    """Return what `read_image` returns and the header, which tells channels from pages."""
    path = Path(path)
    allowed = decoded_limit_bytes() if limit is None else limit
    with _named_errors(path), path.open("rb") as file:
        stream: BinaryIO = file
        if file.read(2) == _GZIP:
            stream = _unpack(path, file, allowed)
        header = _header(path, stream)
        check_decoded_bytes(path, header.shape, header.dtype.itemsize, allowed)
        stream.seek(0)
        read = tiffs.read_tiff if header.format == "tiff" else rasters.read_raster
        array = read(path, stream, header.format)
    return np.ascontiguousarray(array), header


def _header(path: Path, stream: BinaryIO) -> ImageHeader:
    kind = _kind(path, stream)
    if kind == "tiff":
        return tiffs.tiff_header(path, stream)
    return rasters.raster_header(path, stream, kind)


def _kind(path: Path, stream: BinaryIO) -> str:
    """Return the format that the first bytes announce and rewind."""
    stream.seek(0)
    head = stream.read(16)
    stream.seek(0)
    if not head:
        raise InputError(f"{path}: the file is empty; copy it again")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    raise InputError(
        f"{path}: no image: it begins with {head[:8]!r}; "
        "expected PNG, JPEG, TIFF, PPM, PGM, GIF or BMP, gzipped or not"
    )


def _gzip_header(path: Path, file: BinaryIO, limit: int) -> tuple[ImageHeader, int]:
    """Return the header and how many bytes the file may unpack to."""
    for count in _HEAD_BYTES:
        head = _gunzip(path, file, count)
        if head[:4] in _MAGIC and _MAGIC[head[:4]] == "tiff":
            # The directory of a TIFF may stand at its end.
            whole = _gunzip(path, file, limit + 1)
            if len(whole) > limit:
                raise InputError(f"{path}: unpacks to more than {limit / 1e6:,.0f} MB")
            return _header(path, io.BytesIO(whole)), limit
        try:
            header = _header(path, io.BytesIO(head))
        except _DECODER_ERRORS:
            if len(head) < count or count == _HEAD_BYTES[-1]:
                raise
        else:
            # Text formats take up to four bytes a value; metadata are rarely megabytes.
            return header, 4 * header.decoded_bytes + _HEAD_BYTES[-1]
    raise AssertionError("unreachable: the last round returns or raises")


def _unpack(path: Path, file: BinaryIO, limit: int) -> BinaryIO:
    """Return the unpacked content of a gzipped image whose header fits the limit."""
    header, most = _gzip_header(path, file, limit)
    check_decoded_bytes(path, header.shape, header.dtype.itemsize, limit)
    content = _gunzip(path, file, most + 1)
    if len(content) > most:
        raise InputError(
            f"{path}: unpacks to more than {most / 1e6:,.0f} MB, "
            f"its header announces {header.decoded_bytes / 1e6:,.1f} MB"
        )
    return io.BytesIO(content)


def _gunzip(path: Path, file: BinaryIO, count: int) -> bytes:
    file.seek(0)
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            return unpacked.read(count)
    except EOFError as error:
        raise InputError(
            f"{path}: cut short: the gzip data end before their end mark; copy it again"
        ) from error


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what opening and decoding raise into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, expected an image file") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: damaged, cut short or not supported: {reason}; expected a whole image file"
        ) from error
