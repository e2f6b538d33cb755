"""Volumes as a folder of TIFF slices, named alike but for one number."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.volume_files import check_plain, page_region
from pipeline.data.volume_source import (
    Region,
    Source,
    check_key_unused,
    header_of,
    named_errors,
)
from pipeline.errors import InputError

__all__ = ["open_slices"]

logger = logging.getLogger(__name__)

_SUFFIXES = (".tif", ".tiff")


def open_slices(path: Path, key: str | None = None, *, check: bool = True) -> Source:
    """Open the folder `path` of 2-D TIFF files as a volume, in the order of their numbers.

    Args:
        path: the folder; files of other kinds in it are left alone.
        key: to be left out.
        check: read the header of every slice instead of the first one alone.

    Raises:
        InputError: no slices, names that are not one series, a gap in their numbers, or slices
            that are cut short, of several pages or of another size or type than the first.
    """
    from pipeline.data import tiffs

    check_key_unused(path, key)
    files = _slices(path)
    first: tuple[tuple[int, ...], np.dtype[Any]] | None = None
    for file in files if check else files[:1]:
        with named_errors(file), file.open("rb") as stream:
            header = tiffs.tiff_header(file, stream)
        found = (header.shape, header.dtype)
        if first is None:
            first = found
        if len(header.shape) != 2:
            raise InputError(f"{file}: shape {header.shape}, expected a 2-D gray slice")
        if found != first:
            raise InputError(
                f"{file}: {header.shape} of {header.dtype}, but {files[0].name} has "
                f"{first[0]} of {first[1]}; expected slices of one size and type"
            )
    if first is None:
        raise InputError(f"{path}: no slices")
    if check:
        logger.info("%s: %d slices of %s", path, len(files), first[0])
        _slice_region(files[0], first[0], slice(0, 1), slice(0, 1))

    def read(region: Region) -> NDArray[Any]:
        planes, rows, columns = region
        return np.stack([_slice_region(file, first[0], rows, columns) for file in files[planes]])

    chunks = (1, *first[0])
    return Source(header_of(path, (len(files), *first[0]), first[1], chunks=chunks), read)


def _slice_region(path: Path, shape: tuple[int, ...], rows: slice, columns: slice) -> NDArray[Any]:
    from tifffile import TiffFile

    with named_errors(path), path.open("rb") as stream, TiffFile(stream, name=str(path)) as tiff:
        page = tiff.pages.first
        check_plain(path, page)
        if page.shape != shape:
            raise InputError(f"{path}: {page.shape} found, {shape} expected")
        return page_region(path, tiff, page, rows, columns)


def _slices(path: Path) -> list[Path]:
    """Return the slices in the order of the one number in which their names differ."""
    files = [
        file
        for file in path.iterdir()
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise InputError(f"{path}: a folder with neither Zarr nor TIFF slices directly in it")
    # Text and digits take turns, so every second part is a number.
    parts = {file: re.split(r"(\d+)", file.name) for file in files}
    patterns = {tuple(split[::2]) for split in parts.values()}
    numbers = {file: [int(digits) for digits in split[1::2]] for file, split in parts.items()}
    if len(patterns) == 1:
        columns = list(zip(*numbers.values(), strict=True))
        varying = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if len(patterns) > 1 or len(varying) > 1:
        names = ", ".join(sorted(file.name for file in files)[:4])
        raise InputError(
            f"{path}: TIFF files that are not one series ({names}, ...), "
            "expected names that differ in one number"
        )
    files.sort(key=lambda file: numbers[file])
    _check_gaps(path, [numbers[file][varying[0]] if varying else 0 for file in files])
    return files


def _check_gaps(path: Path, numbers: list[int]) -> None:
    """Refuse a number that is absent or there twice: all slices behind it would be displaced."""
    expected = numbers[0]
    for number in numbers:
        if number != expected:
            kind = "is missing" if number > expected else "is there twice"
            which = expected if number > expected else number
            raise InputError(
                f"{path}: slice {which} {kind} among {numbers[0]} to {numbers[-1]}; "
                "expected every number once"
            )
        expected += 1
