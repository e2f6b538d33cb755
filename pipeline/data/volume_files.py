"""Volumes in one plain file: TIFF stacks, npy, NIfTI."""

from __future__ import annotations

import math
import threading
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.volume_source import (
    Region,
    Source,
    Spacing,
    array_source,
    check_key_unused,
    header_of,
)
from pipeline.errors import InputError

__all__ = ["check_plain", "open_nifti", "open_npy", "open_tiff", "page_region"]

_MINISBLACK, _MASK = 1, 4
_NIFTI_UNITS = {"meter": "meter", "mm": "millimeter", "micron": "micrometer"}


def open_npy(path: Path, key: str | None = None) -> Source:
    """Map a `.npy` file; arrays of objects are refused."""
    check_key_unused(path, key)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array_source(array, header_of(path, array.shape, array.dtype))


def open_tiff(path: Path, key: str | None = None, *, check: bool = True) -> Source:
    """Open a TIFF stack: mapped where its pixels are stored as they are, else page by page.

    Args:
        path: the file.
        key: to be left out.
        check: look whether every page is there and whole.

    Raises:
        InputError: it is cut short, one picture, in colour, or one compressed block.
    """
    from pipeline.data import tiffs

    check_key_unused(path, key)
    stream = path.open("rb")
    try:
        if check:
            tiffs.tiff_header(path, stream)
        return _tiff_source(path, stream)
    except BaseException:
        stream.close()
        raise


def _tiff_source(path: Path, stream: BinaryIO) -> Source:
    """Return the source of the open file, which it closes in the end."""
    from pipeline.data import tiffs
    from pipeline.data.tiff_spacing import tiff_spacing

    stream.seek(0)
    tiff = tiffs.open_tiff(path, stream)
    series = next(one for one in tiff.series if not one.keyframe.is_reduced)
    check_plain(path, series.keyframe)
    if series.axes[-2:] != "YX" or len(series.shape) != 3:
        raise InputError(
            f"{path}: no volume: axes {series.axes} with shape {series.shape}, "
            "expected a stack of gray pages (D, H, W)"
        )
    spacing, unit = tiff_spacing(tiff)
    described = partial(header_of, path, series.shape, series.dtype, spacing=spacing, unit=unit)
    if series.dataoffset is not None:
        stored = series.dtype.newbyteorder(tiff.byteorder)
        array = np.memmap(path, stored, "r", offset=series.dataoffset, shape=series.shape)
        stream.close()
        return array_source(array, described())
    if len(series.pages) != series.shape[0]:
        raise InputError(
            f"{path}: {series.shape[0]} planes compressed as one block, expected a page for each; "
            "convert it to OME-Zarr"
        )
    pages: list[Any] = list(series.pages)
    chunks = None if pages[0].is_final else (1, *series.shape[1:])
    lock = threading.Lock()  # all pages share the position in the file

    def read(region: Region) -> NDArray[Any]:
        planes, rows, columns = region
        with lock:
            parts = [page_region(path, tiff, page, rows, columns) for page in pages[planes]]
        return np.stack(parts)

    return Source(described(chunks=chunks), read, stream.close)


def check_plain(path: Path, keyframe: Any) -> None:
    """Refuse TIFF pages whose stored numbers are not the values: palettes, colours, single bits."""
    photometric = int(keyframe.photometric)
    if photometric not in (_MINISBLACK, _MASK) or keyframe.bitspersample == 1:
        raise InputError(
            f"{path}: pixels of kind {keyframe.photometric!s} with {keyframe.bitspersample} bits, "
            "expected gray ones (MINISBLACK) of 8 bits or more; save the volume again as such"
        )


def page_region(path: Path, tiff: Any, page: Any, rows: slice, columns: slice) -> NDArray[Any]:
    """Return `(H, W)` of a part of one page; only a compressed page is decoded as a whole."""
    if not page.is_final:
        # One worker: threads would outnumber the cores where many processes read.
        return np.asarray(page.asarray(maxworkers=1)[rows, columns])
    stored = page.dtype.newbyteorder(tiff.byteorder)
    array = np.memmap(path, stored, "r", offset=page.dataoffsets[0], shape=page.shape)
    return np.asarray(array[rows, columns])


def open_nifti(path: Path, key: str | None = None) -> Source:
    """Open a NIfTI file; its axes X, Y, Z are given as Z, Y, X, its orientation as stored.

    Stored values are scaled as the header says, where it says so.

    Raises:
        InputError: it has a time axis, colours, or fewer bytes than its header promises.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.imageglobals import LoggingOutputSuppressor
    from nibabel.spatialimages import HeaderDataError

    check_key_unused(path, key)
    try:
        with LoggingOutputSuppressor():  # it writes to the standard error what it mends in a header
            image: Any = nibabel.load(path)
    except (ImageFileError, HeaderDataError) as error:
        raise InputError(f"{path}: not a NIfTI file: {error}") from error
    shape, proxy = image.shape, image.dataobj
    stored = image.header.get_data_dtype()
    if len(shape) < 3 or set(shape[3:]) - {1}:
        raise InputError(f"{path}: no volume: shape {shape}, expected (X, Y, Z)")
    header_of(path, shape[2::-1], stored)  # before the first voxel is touched
    needed = int(proxy.offset) + math.prod(shape) * stored.itemsize
    if path.suffix.lower() == ".nii" and path.stat().st_size < needed:
        found = path.stat().st_size
        raise InputError(
            f"{path}: cut short: {found} bytes found, {needed} expected; copy it again"
        )
    beyond = (0,) * (len(shape) - 3)

    def read(region: Region) -> NDArray[Any]:
        return np.asarray(proxy[(*region[::-1], *beyond)]).transpose()

    one = slice(0, 1)
    spacing, unit = _nifti_spacing(image.header)
    dtype = read((one, one, one)).dtype  # scaled values are of another type than the stored ones
    return Source(header_of(path, shape[2::-1], dtype, spacing=spacing, unit=unit), read)


def _nifti_spacing(header: Any) -> tuple[Spacing | None, str | None]:
    x, y, z = (float(zoom) for zoom in header.get_zooms()[:3])
    if not all(math.isfinite(zoom) and zoom > 0 for zoom in (x, y, z)):
        return None, None
    try:
        unit = _NIFTI_UNITS.get(header.get_xyzt_units()[0])
    except KeyError:  # a code that NIfTI does not define
        unit = None
    return (z, y, x), unit
