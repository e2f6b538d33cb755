"""Volumes read piece by piece: OME-Zarr, Zarr, HDF5, TIFF, folders of slices, npy, NIfTI.

A volume is `(D, H, W)`, with channels `(C, D, H, W)`. Nothing is decoded before it is asked for,
and each piece is compared with the budget of `pipeline.data.budget`. The kind of a file is told by
its first bytes, NIfTI by its suffix. A chunk that is absent from a Zarr store reads as the fill
value: that is how Zarr stores emptiness, and a lost file cannot be told from it.
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.volume_source import Region, Source, Spacing, VolumeHeader, named_errors
from pipeline.errors import InputError

__all__ = ["Volume", "open_volume"]

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_NPY = b"\x93NUMPY"
_PACKED = {b"PK": "a zip file", b"\x1f\x8b": "a gzipped file"}
_ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")

Index = slice | EllipsisType


def open_volume(path: Path | str, key: str | None = None) -> Volume:
    """Open a volume without reading its voxels.

    Args:
        path: an OME-Zarr or Zarr folder, an HDF5 file, a TIFF stack, a folder of TIFF slices, a
            `.npy`, `.nii` or `.nii.gz` file. The last one is unpacked from its start at each read.
        key: which array of a Zarr group or HDF5 file; in OME-Zarr the level, by default `0`.

    Raises:
        InputError: nothing is there, it is no volume, or it holds several and `key` is not given.
    """
    return Volume(path, key)


class Volume:
    """A volume on disk; `volume[z0:z1, y0:y1, x0:x1]` reads that part.

    It may be pickled and used after a fork: each process opens the file for itself.

    Args:
        path: the file or folder.
        key: which array in it, as in `open_volume`.

    Raises:
        InputError: as `open_volume`.
    """

    _source: Source | None
    _closing: weakref.finalize[..., Volume] | None

    def __init__(self, path: Path | str, key: str | None = None) -> None:
        self.path = Path(path)
        self.key = key
        source = _open(self.path, key, check=True)
        self.header: VolumeHeader = source.header
        self._keep(source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return `(D, H, W)`."""
        return self.header.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the voxels that reading gives."""
        return self.header.dtype

    @property
    def channels(self) -> int | None:
        """Return `C` where reading gives `(C, D, H, W)`, else None."""
        return self.header.channels

    @property
    def chunks(self) -> tuple[int, int, int] | None:
        """Return the piece that is decoded as a whole; None where any piece is as good."""
        return self.header.chunks

    @property
    def spacing(self) -> Spacing | None:
        """Return the distance between voxels along `(D, H, W)` in `unit`, None if unknown."""
        return self.header.spacing

    @property
    def unit(self) -> str | None:
        """Return the unit of the spacing, such as `micrometer`; None if unknown."""
        return self.header.unit

    def __getitem__(self, index: Index | tuple[Index, ...]) -> NDArray[Any]:
        """Return a part as a new array `(D, H, W)` or, where there are channels, `(C, D, H, W)`.

        Args:
            index: slices of step 1 along depth, height and width; axes left out are read whole.

        Raises:
            IndexError: an index that is no such slice.
            InputError: the part is over the budget, or the file is damaged.
        """
        region = _region(index, self.shape)
        lead = () if self.channels is None else (self.channels,)
        shape = (*lead, *(part.stop - part.start for part in region))
        check_decoded_bytes(f"{self.path}: the part asked for", shape, self.dtype.itemsize)
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        with named_errors(self.path):
            # A view of a mapped file is not writable, hence copied: the result is the caller's.
            array = np.require(self._opened().read(region), self.dtype, ("C", "W"))
        if array.shape != shape:
            raise InputError(f"{self.path}: gave {array.shape}, its header promises {shape}")
        return array

    def close(self) -> None:
        """Let go of the file; reading again opens it again."""
        if self._closing is not None:
            self._closing()
        self._source = self._closing = None

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_closing": None}

    def __repr__(self) -> str:
        return f"Volume({str(self.path)!r}, key={self.key!r}, {self.shape}, {self.dtype})"

    def _opened(self) -> Source:
        if self._process != os.getpid():
            # A fork shares the file's position with its parent: close this side, open anew.
            self.close()
        source = self._source
        if source is None:
            source = _open(self.path, self.key, check=False)
            if source.header != self.header:
                source.close()
                raise InputError(
                    f"{self.path}: changed since it was opened: {source.header.shape} of "
                    f"{source.header.dtype} found, {self.shape} of {self.dtype} expected"
                )
            self._keep(source)
        return source

    def _keep(self, source: Source) -> None:
        self._process = os.getpid()
        self._source = source
        # Also closed where nobody does, once nothing refers to the volume.
        self._closing = weakref.finalize(self, source.close)
        self._closing.atexit = False


def _region(index: Index | tuple[Index, ...], shape: tuple[int, int, int]) -> Region:
    """Return `index` as three slices inside `shape`, as numpy would understand it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    missing = [slice(None)] * (3 - sum(part is not ... for part in parts))
    at = next((place for place, part in enumerate(parts) if part is ...), len(parts))
    parts[at : at + 1] = missing
    regular = [part for part in parts if isinstance(part, slice) and part.step in (None, 1)]
    if len(parts) != 3 or len(regular) != 3:
        raise IndexError(f"index {index!r}: expected up to three slices of step 1, z, y and x")
    bounds = [part.indices(length)[:2] for part, length in zip(regular, shape, strict=True)]
    z, y, x = (slice(start, max(start, stop)) for start, stop in bounds)
    return z, y, x


def _open(path: Path, key: str | None, *, check: bool) -> Source:
    """Open `path`; `check` compares every page and slice, which need be done only once."""
    with named_errors(path):
        source = _open_folder(path, key, check) if path.is_dir() else _open_file(path, key, check)
        header = source.header
        if header.chunks is not None:
            try:
                check_decoded_bytes(f"{path}: a chunk", header.chunks, header.dtype.itemsize)
            except InputError:
                source.close()
                raise
        return source


def _open_folder(path: Path, key: str | None, check: bool) -> Source:
    if any((path / mark).is_file() for mark in _ZARR_MARKS):
        from pipeline.data import volume_stores

        return volume_stores.open_zarr(path, key)
    from pipeline.data import volume_slices

    return volume_slices.open_slices(path, key, check=check)


def _open_file(path: Path, key: str | None, check: bool) -> Source:
    from pipeline.data import volume_files, volume_stores

    if path.name.lower().endswith((".nii", ".nii.gz")):
        return volume_files.open_nifti(path, key)
    with path.open("rb") as stream:
        head = stream.read(16)
    if head.startswith(_TIFF):
        return volume_files.open_tiff(path, key, check=check)
    if head.startswith(_NPY):
        return volume_files.open_npy(path, key)
    if head.startswith(_HDF5):
        return volume_stores.open_hdf5(path, key)
    packed = next((name for mark, name in _PACKED.items() if head.startswith(mark)), None)
    if packed is not None:
        raise InputError(f"{path}: {packed} cannot be read in pieces; unpack it")
    raise InputError(
        f"{path}: no volume: it begins with {head[:8]!r}; expected a TIFF stack, HDF5, .npy, "
        ".nii, .nii.gz, a Zarr folder or a folder of TIFF slices"
    )
