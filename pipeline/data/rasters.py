"""PNG, JPEG, GIF, BMP and the PNM family: header and pixels of an open file."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile

from pipeline.errors import InputError

__all__ = ["ImageHeader", "raster_header", "read_raster"]

# The classes themselves and not Image.open: its fixed pixel limit would stand beside our budget.
_CLASSES: dict[str, type[ImageFile]] = {
    "png": PngImageFile,
    "jpeg": JpegImageFile,
    "gif": GifImageFile,
    "bmp": BmpImageFile,
    "pnm": PpmImageFile,
}
_CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 3, "I": 1, "I;16": 1, "I;16B": 1}
_GAP = rb"(?:\s|#[^\n]*\n)+"
_PNM = re.compile(
    rb"P([56])" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,5})\s"
)
_PNG_SIGNATURE_BYTES = 8
_PNG_COLOUR_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image announces.

    Args:
        shape: of the array that reading gives.
        dtype: of that array.
        channels: 1 where the array has no channel axis.
        pages: 1, or the number of TIFF pages `D`.
        format: `png`, `jpeg`, `gif`, `bmp`, `pnm` or `tiff`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    channels: int
    pages: int = 1
    format: str = ""

    @property
    def decoded_bytes(self) -> int:
        """Return the size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def size(self) -> tuple[int, int]:
        """Return `(H, W)`."""
        end = -1 if self.channels > 1 else len(self.shape)
        height, width = self.shape[:end][-2:]
        return height, width


def raster_header(path: Path, stream: BinaryIO, kind: str) -> ImageHeader:
    """Return the header of the image in `stream`, which stands at its beginning."""
    if kind == "pnm":
        header = _binary_pnm(stream)
        if header is not None:
            return header[0]
    if kind == "png":
        header16 = _deep_png(stream)
        if header16 is not None:
            return header16
    image = _CLASSES[kind](stream)
    channels = _channel_count(path, image)
    dtype = np.dtype(np.uint16 if image.mode.startswith("I") else np.uint8)
    return _header((image.height, image.width), channels, dtype, kind)


def read_raster(path: Path, stream: BinaryIO, kind: str) -> NDArray[Any]:
    """Return the pixels of the image in `stream`, which stands at its beginning.

    Raises:
        InputError: it is cut short or holds several pictures.
    """
    if kind == "pnm":
        header = _binary_pnm(stream)
        if header is not None:
            return _read_binary_pnm(path, stream, *header)
    if kind == "png":
        _check_png_chunks(path, stream)
        if _deep_png(stream) is not None:
            return np.asarray(imagecodecs.png_decode(stream.read()))
    image = _CLASSES[kind](stream)
    if kind in ("gif", "png") and getattr(image, "n_frames", 1) > 1:
        frames = getattr(image, "n_frames", 1)
        raise InputError(f"{path}: {frames} frames, expected one picture; export the one you mean")
    return _pixels(path, image)


def _header(size: tuple[int, int], channels: int, dtype: np.dtype[Any], kind: str) -> ImageHeader:
    shape = size if channels == 1 else (*size, channels)
    return ImageHeader(shape, dtype, channels, format=kind)


def _pixels(path: Path, image: ImageFile) -> NDArray[Any]:
    channels = _channel_count(path, image)
    if image.mode == "I":  # a text PGM of 16 bits
        return np.asarray(image).astype(np.uint16)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)  # also to the byte order of the machine
    wanted = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    return np.asarray(image if image.mode == wanted else image.convert(wanted))


def _channel_count(path: Path, image: ImageFile) -> int:
    if image.mode == "P":
        return _palette_channels(image)
    if image.mode not in _CHANNELS:
        raise InputError(f"{path}: colour mode {image.mode} is not supported; save as gray or RGB")
    return _CHANNELS[image.mode]


def _palette_channels(image: ImageFile) -> int:
    """Return 1 for a gray palette, 3 for colours, 4 for colours with transparency."""
    palette = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    if (palette == palette[:, :1]).all():
        return 1
    # In a GIF the transparent index is a way to store an animation, not an alpha channel.
    return 4 if "transparency" in image.info and image.format == "PNG" else 3


def _binary_pnm(stream: BinaryIO) -> tuple[ImageHeader, int] | None:
    """Return header and offset of a binary PGM or PPM; Pillow would rescale other depths to 8."""
    stream.seek(0)
    match = _PNM.match(stream.read(1 << 14))
    stream.seek(0)
    if match is None:
        return None
    kind, width, height, largest = (int(group) for group in match.groups())
    dtype = np.dtype(np.uint8 if largest < 256 else np.uint16)
    header = _header((height, width), 1 if kind == 5 else 3, dtype, "pnm")
    return header, match.end()


def _read_binary_pnm(path: Path, stream: BinaryIO, header: ImageHeader, start: int) -> NDArray[Any]:
    stream.seek(start)
    data = stream.read(header.decoded_bytes)
    if len(data) < header.decoded_bytes:
        raise InputError(
            f"{path}: cut short: {len(data)} bytes of pixels found, "
            f"{header.decoded_bytes} expected for {header.shape}; copy it again"
        )
    if re.match(rb"\s*P[1-6]\s", stream.read(16)):
        raise InputError(f"{path}: several pictures in one file, expected one; split it")
    stored = header.dtype.newbyteorder(">")  # the format is big-endian
    return np.frombuffer(data, dtype=stored).astype(header.dtype).reshape(header.shape)


def _deep_png(stream: BinaryIO) -> ImageHeader | None:
    """Return the header of a PNG of 16 bits with several channels: Pillow would give 8 bits."""
    stream.seek(_PNG_SIGNATURE_BYTES)
    head = stream.read(18)
    stream.seek(0)
    if len(head) < 18 or head[4:8] != b"IHDR":
        return None
    width, height = int.from_bytes(head[8:12], "big"), int.from_bytes(head[12:16], "big")
    depth, channels = head[16], _PNG_COLOUR_CHANNELS.get(head[17], 1)
    if depth != 16 or channels == 1:
        return None
    return _header((height, width), channels, np.dtype(np.uint16), "png")


def _check_png_chunks(path: Path, stream: BinaryIO) -> None:
    """Refuse a PNG with a broken checksum or without its end; decoders let both pass."""
    stream.seek(_PNG_SIGNATURE_BYTES)
    kind = b""
    while kind != b"IEND":
        head = stream.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        body = stream.read(length + 4)
        if len(head) < 8 or len(body) < length + 4:
            raise InputError(
                f"{path}: cut short: the PNG ends before its end chunk (IEND); copy it again"
            )
        if zlib.crc32(kind + body[:-4]) != int.from_bytes(body[-4:], "big"):
            raise InputError(
                f"{path}: damaged: wrong checksum in PNG chunk {kind!r}; copy it again"
            )
    stream.seek(0)
