"""TIFF: header and pixels of an open file, every page or an error."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray

from pipeline.data.rasters import ImageHeader
from pipeline.errors import InputError

__all__ = ["open_tiff", "read_tiff", "tiff_header"]

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _MASK, _YCBCR = 0, 1, 2, 3, 4, 6
_READABLE = {_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _MASK}
_UNCOMPRESSED = 1
_JPEG = {6, 7, 33007, 34892}  # these decoders give RGB


def tiff_header(path: Path, stream: BinaryIO) -> ImageHeader:
    """Return the header of the TIFF in `stream` after checking that all its data are there.

    Raises:
        InputError: pages are missing, cut short or differ, or the pixels are of a kind that
            would have to be guessed.
    """
    with _strict(path), open_tiff(path, stream) as tiff:
        pages = _equal_pages(path, tiff)
        series = _only_series(path, tiff)
        for page in pages:
            _check_page(path, page, tiff.filehandle.size)
        if series.dataoffset is not None:
            end = series.dataoffset + math.prod(series.shape) * series.dtype.itemsize
            _check_end(path, end if series.keyframe.bitspersample >= 8 else 0, tiff.filehandle.size)
        return _header(path, series)


def read_tiff(path: Path, stream: BinaryIO, kind: str = "tiff") -> NDArray[Any]:
    """Return the pixels of the TIFF in `stream`: `(H, W)`, `(D, H, W)`, channels last.

    Args:
        path: the file, for messages.
        stream: its content.
        kind: always `tiff`.

    Raises:
        InputError: the decoder found fault with it.
    """
    with _strict(path), open_tiff(path, stream) as tiff:
        series = _only_series(path, tiff)
        # One worker: the decoder then reports in this thread, where it is heard.
        array = series.asarray(maxworkers=1)
        header = _header(path, series)
        array = _channels_last(array, series.axes)
        array = _as_shown(array, series.keyframe, header.channels)
    if array.shape != header.shape:
        raise InputError(f"{path}: decoded to {array.shape}, its header says {header.shape}")
    return array


def open_tiff(path: Path, stream: BinaryIO) -> tifffile.TiffFile:
    """Open a TIFF so that a stack written page by page is one stack.

    tifffile's own writer describes each page of it as an array by itself.
    """
    tiff = tifffile.TiffFile(stream, name=str(path))
    if not tiff.is_shaped:
        return tiff
    alone = [len(series.pages) == 1 for series in tiff.series]
    stream.seek(0)  # opened again: its pages are now loaded as tifffile likes, not as we do
    flags: dict[str, Any] = {"is_shaped": False} if len(alone) > 1 and all(alone) else {}
    return tifffile.TiffFile(stream, name=str(path), **flags)


@contextmanager
def _strict(path: Path) -> Iterator[None]:
    """Turn what tifffile only logs as errors in this thread into an InputError."""
    me = threading.get_ident()
    heard: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        if record.thread == me and record.levelno >= logging.ERROR:
            heard.append(" ".join(record.getMessage().split()))
            return False
        return True

    tifffile_logger = logging.getLogger("tifffile")
    tifffile_logger.addFilter(listen)
    try:
        yield
    finally:
        tifffile_logger.removeFilter(listen)
    if heard:
        raise InputError(f"{path}: damaged or cut short TIFF: {heard[0]}; copy it again")


def _equal_pages(path: Path, tiff: tifffile.TiffFile) -> list[Any]:
    """Return the pages of the file without reduced copies, after comparing every one."""
    tiff.pages.useframes = False
    loaded: list[Any] = list(tiff.pages)
    pages = [page for page in loaded if not page.is_reduced]
    found = dict.fromkeys((page.shape, str(page.dtype), int(page.photometric)) for page in pages)
    if len(found) > 1:
        listed = ", ".join(f"{shape} {dtype}" for shape, dtype, _ in list(found)[:4])
        raise InputError(
            f"{path}: pages that differ ({listed}), expected one size and type; split the file"
        )
    return pages


def _only_series(path: Path, tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """Return the one stack of equal pages that the file holds; reduced copies do not count."""
    series = [one for one in tiff.series if not one.keyframe.is_reduced]
    if not series:
        raise InputError(f"{path}: a TIFF without a page; copy it again")
    if len(series) > 1:
        found = ", ".join(f"{one.shape} {one.dtype}" for one in series[:4])
        raise InputError(
            f"{path}: pages that differ ({found}), expected one size and type; split the file"
        )
    missing = sum(page is None for page in series[0].pages)
    if missing:
        raise InputError(
            f"{path}: its metadata announce {len(series[0].pages)} pages, "
            f"{missing} of them are not in the file"
        )
    return series[0]


def _check_page(path: Path, page: Any, size_bytes: int) -> None:
    """Refuse a page with strips or tiles that are absent, empty or beyond the end of the file."""
    offsets, counts = page.dataoffsets, page.databytecounts
    expected = math.prod(page.chunked)
    if len(offsets) != expected or len(counts) != expected or not all(counts):
        found = sum(1 for count in counts if count)
        raise InputError(
            f"{path}: page {page.index} has {found} pieces with data, {expected} expected; "
            "copy it again"
        )
    ends = (offset + count for offset, count in zip(offsets, counts, strict=True))
    _check_end(path, max(ends), size_bytes)
    if page.compression == _UNCOMPRESSED and sum(counts) * 8 < page.size * page.bitspersample:
        raise InputError(
            f"{path}: page {page.index} announces shape {page.shape} of {page.dtype} "
            f"but {sum(counts)} bytes of data; copy it again"
        )


def _check_end(path: Path, end: int, size_bytes: int) -> None:
    if end > size_bytes:
        raise InputError(
            f"{path}: cut short: {size_bytes} bytes found, at least {end} expected; copy it again"
        )


def _header(path: Path, series: tifffile.TiffPageSeries) -> ImageHeader:
    keyframe = series.keyframe
    photometric = int(keyframe.photometric)
    readable = photometric in _READABLE or (
        photometric == _YCBCR and int(keyframe.compression) in _JPEG
    )
    if not readable:
        raise InputError(
            f"{path}: colour model {keyframe.photometric!s} is not supported; save as gray or RGB"
        )
    if series.dtype is None:
        raise InputError(f"{path}: a type of pixel that is not supported; save it as 8 or 16 bits")
    axes = _axes(path, series)
    lengths = dict(zip(series.axes, series.shape, strict=True))
    shape = tuple(lengths[axis] for axis in axes)
    dtype = np.dtype(np.uint8) if series.dtype == bool else np.dtype(series.dtype)
    channels = lengths.get("S", 1)
    if photometric == _PALETTE:
        channels, dtype = _palette(keyframe).shape[1], np.dtype(np.uint8)
        shape = shape if channels == 1 else (*shape, channels)
    pages = math.prod(shape[: -3 if channels > 1 else -2])
    return ImageHeader(shape, dtype.newbyteorder("="), channels, pages, "tiff")


def _axes(path: Path, series: tifffile.TiffPageSeries) -> str:
    """Return the axes of the result: at most one of pages, then rows, columns, samples."""
    outer = [axis for axis in series.axes if axis not in "YXS"]
    plain = [axis for axis in series.axes if axis != "S"]
    if plain[-2:] != ["Y", "X"] or len(outer) > 1:
        raise InputError(
            f"{path}: axes {series.axes} with shape {series.shape}, "
            "expected one image or one stack of pages; split the file"
        )
    return "".join(plain) + ("S" if "S" in series.axes else "")


def _channels_last(array: NDArray[Any], axes: str) -> NDArray[Any]:
    return np.moveaxis(array, axes.index("S"), -1) if "S" in axes else array


def _as_shown(array: NDArray[Any], keyframe: Any, channels: int) -> NDArray[Any]:
    """Apply what the file says its numbers mean: palettes, white as zero, one bit."""
    photometric = int(keyframe.photometric)
    if photometric == _PALETTE:
        shown = _palette(keyframe)[array]
        return np.asarray(shown[..., 0] if channels == 1 else shown)
    if photometric == _MINISWHITE and array.dtype.kind in "bu":
        largest = (1 << int(keyframe.bitspersample)) - 1
        array = ~array if array.dtype == bool else np.asarray(largest - array, dtype=array.dtype)
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _palette(keyframe: Any) -> NDArray[np.uint8]:
    """Return the palette `(N, 1)` where it is gray, else `(N, 3)`."""
    colours = (np.asarray(keyframe.colormap).T >> 8).astype(np.uint8)
    return colours[:, :1] if (colours == colours[:, :1]).all() else colours
