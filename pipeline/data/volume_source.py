"""What any file of a volume is opened to: a header, and a function that reads a part."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, LaminaError

__all__ = [
    "Region",
    "Source",
    "Spacing",
    "VolumeHeader",
    "array_source",
    "check_key_unused",
    "header_of",
    "is_volume",
    "named_errors",
]

Region = tuple[slice, slice, slice]
Spacing = tuple[float, float, float]

# What numpy, tifffile, imagecodecs, nibabel, h5py and zarr raise on damaged files. The named
# errors of these packages (TiffFileError, ImageFileError, ArrayNotFoundError) are kinds of these.
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class VolumeHeader:
    """What is known of a volume before any voxel is read.

    Args:
        shape: `(D, H, W)`.
        dtype: of the voxels, in the byte order of the machine.
        channels: `C` where reading gives `(C, D, H, W)`; None where there is no such axis.
        chunks: the piece `(D, H, W)` that is decoded as a whole; None where any piece is as good.
        spacing: distance between voxels along `(D, H, W)` in `unit`; None where it is not stored.
        unit: of the spacing, such as `micrometer`; None where it is not stored.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    channels: int | None = None
    chunks: tuple[int, int, int] | None = None
    spacing: Spacing | None = None
    unit: str | None = None


def _nothing() -> None:
    """Close what needs no closing: a mapped file ends with its array."""


@dataclass(frozen=True)
class Source:
    """An open file.

    Args:
        header: of the volume.
        read: gives the voxels of a region with start < stop inside the volume, perhaps as a view.
        close: lets go of the file.
    """

    header: VolumeHeader
    read: Callable[[Region], NDArray[Any]]
    close: Callable[[], None] = _nothing


def is_volume(shape: Sequence[int], dtype: Any) -> bool:
    """Return whether an array is a volume of numbers, with channels or without."""
    extra = list(shape)[:-4]
    kind = getattr(dtype, "kind", "O")
    return len(shape) >= 3 and set(extra) <= {1} and 0 not in shape and kind in "buif"


def header_of(
    path: Path | str,
    shape: Sequence[int],
    dtype: Any,
    *,
    chunks: Sequence[int] | None = None,
    spacing: Spacing | None = None,
    unit: str | None = None,
) -> VolumeHeader:
    """Return the header of an array `(D, H, W)`, `(C, D, H, W)` or one with axes of 1 before it.

    Raises:
        InputError: the array is no volume.
    """
    if not is_volume(shape, dtype):
        raise InputError(
            f"{path}: no volume: shape {tuple(shape)} of {dtype}, "
            "expected numbers in (D, H, W) or (C, D, H, W)"
        )
    depth, height, width = (int(length) for length in shape[-3:])
    piece = None if chunks is None else (int(chunks[-3]), int(chunks[-2]), int(chunks[-1]))
    return VolumeHeader(
        (depth, height, width),
        np.dtype(dtype).newbyteorder("="),
        int(shape[-4]) if len(shape) > 3 else None,
        piece,
        spacing,
        unit,
    )


def array_source(array: Any, header: VolumeHeader, close: Callable[[], None] = _nothing) -> Source:
    """Return the source of anything that is sliced as a numpy array is."""
    before = (0,) * (array.ndim - 4)

    def read(region: Region) -> NDArray[Any]:
        return np.asarray(array[(*before, ..., *region)])

    return Source(header, read, close)


def check_key_unused(path: Path, key: str | None) -> None:
    """Refuse a key for a file that holds one volume."""
    if key is not None:
        raise InputError(f"{path}: key {key!r} given, but such a file holds one volume; leave it")


@contextmanager
def named_errors(path: Path | str) -> Iterator[None]:
    """Turn what opening and decoding raise into an InputError that names the file."""
    try:
        yield
    except LaminaError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: permission denied") from error
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: damaged, cut short or not supported: {reason}; expected a whole "
            "volume: copy it again, or leave it out"
        ) from error
