"""B-scans that stay in their HDF5 file until they are asked for, and what stands beside them.

Nothing is taken from outside the file: no soft or external link is followed, no external or virtual
storage read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.volume_source import named_errors
from pipeline.errors import InputError

__all__ = [
    "EXPECTED",
    "OVERSHOOT",
    "Hdf5BScans",
    "array_at",
    "dataset_at",
    "group_at",
    "texts_at",
]

EXPECTED = "/images (N, H, W) with /layers/<NAME> (N, W) or /layer_maps (N, W, K)"
OVERSHOOT = {1.0: 1.5, 255.0: 300.0, 65535.0: 70000.0}  # resampling leaves more than white

_CACHE_BYTES = 64 << 20  # for chunks of several B-scans, each of which is wanted in its turn
_SHOWN = 8


class Hdf5BScans:
    """A dataset `(N, H, W)` of an HDF5 file, read when asked for.

    Each process keeps the file open for itself; what is pickled is where the dataset is.

    Args:
        path: the file.
        name: the dataset.
        white: grey value that is shown as white; what goes well beyond it is refused on reading.
            None for what is no image.

    Raises:
        InputError: no such dataset, or one that does not hold B-scans.
    """

    def __init__(self, path: Path | str, name: str, white: float | None = None) -> None:
        self.path = Path(path)
        self.name = name
        self.white = white
        self._open: tuple[int, Any] | None = None
        self._cache_bytes = 0
        with named_errors(path), h5py.File(path, "r") as file:
            dataset = dataset_at(path, file, name)
            if dataset.ndim != 3 or 0 in dataset.shape or dataset.dtype.kind not in "uif":
                raise InputError(
                    f"{path}: /{name} has shape {dataset.shape} of {dataset.dtype}, expected "
                    "B-scans (N, H, W) of numbers"
                )
            self.shape: tuple[int, int, int] = dataset.shape
            self.dtype: np.dtype[np.generic] = dataset.dtype
            check_decoded_bytes(f"{path}: a B-scan", self.shape[1:], self.dtype.itemsize)
            if dataset.chunks is not None:
                self._cache_bytes = self._slab_bytes(dataset.chunks)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> NDArray[np.generic]:
        """Return B-scan `(H, W)`, or B-scans `(n, H, W)`, as stored.

        Raises:
            IndexError: no such B-scan.
            InputError: the file is damaged, or holds grey values that cannot be.
        """
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            one: NDArray[np.generic] = self._read(slice(wanted, wanted + 1))[0]
            return one
        if not wanted:
            return np.empty((0, *self.shape[1:]), self.dtype)
        if wanted.step > 0:
            return self._read(slice(wanted.start, wanted.stop, wanted.step))
        rising = wanted[::-1]  # HDF5 counts upwards only
        return self._read(slice(rising.start, rising.stop, rising.step))[::-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def _read(self, part: slice) -> NDArray[np.generic]:
        with named_errors(self.path):
            block: NDArray[np.generic] = np.asarray(self._dataset()[part])
        if self.white is not None and block.dtype.kind != "u":
            limit = OVERSHOOT[self.white]
            low, high = float(block.min()), float(block.max())
            if not (low >= -limit and high <= limit):  # NaN fails as well
                raise InputError(
                    f"{self.path}: grey values from {low:g} to {high:g} in B-scans {part.start} to "
                    f"{part.stop - 1}, where {self.white:g} is white; store one scale, without NaN"
                )
        return block

    def _dataset(self) -> Any:
        """Return the dataset in a file that this process opened: handles do not survive a fork."""
        if self._open is not None and self._open[0] == os.getpid():
            return self._open[1]
        self._open = None
        file = h5py.File(self.path, "r", rdcc_nbytes=max(self._cache_bytes, 1 << 20))
        dataset = dataset_at(self.path, file, self.name)
        if dataset.shape != self.shape or dataset.dtype != self.dtype:
            raise InputError(
                f"{self.path}: /{self.name} is now {dataset.shape} of {dataset.dtype}, it was "
                f"{self.shape} of {self.dtype}; the file was changed while in use, start again"
            )
        self._open = (os.getpid(), dataset)
        return dataset

    def _slab_bytes(self, chunks: Sequence[int]) -> int:
        """Return the size of all chunks that one B-scan touches, to keep for its neighbours."""
        rows, columns = (
            -(-length // chunk) * chunk
            for length, chunk in zip(self.shape[1:], chunks[1:], strict=True)
        )
        check_decoded_bytes(f"{self.path}: a chunk", chunks, self.dtype.itemsize)
        return min(chunks[0] * rows * columns * self.dtype.itemsize, _CACHE_BYTES)


def dataset_at(path: Path | str, file: Any, name: str) -> Any:
    """Return the dataset `name` of an open file, reached by hard links alone.

    Raises:
        InputError: there is none, or its data would come from elsewhere.
    """
    node = _node_at(path, file, name)
    if not isinstance(node, h5py.Dataset) or node.shape is None:
        raise InputError(f"{path}: /{name} is no dataset with values; expected {EXPECTED}")
    if node.external or node.is_virtual:
        raise InputError(f"{path}: /{name} has its data in other files; copy them into this one")
    return node


def group_at(path: Path | str, file: Any, name: str) -> Any:
    """Return the group `name` of an open file, reached by hard links alone.

    Raises:
        InputError: there is none.
    """
    node = _node_at(path, file, name)
    if not isinstance(node, h5py.Group):
        raise InputError(f"{path}: /{name} is a dataset, expected a group")
    return node


def array_at(
    path: Path | str, file: Any, name: str, shape: tuple[int, ...], kinds: str = "uif"
) -> NDArray[Any]:
    """Return the whole dataset `name`, if it is numbers of `shape`, the B-scans on its first axis.

    Raises:
        InputError: it is not, or there is none.
    """
    dataset = dataset_at(path, file, name)
    if dataset.shape != shape or dataset.dtype.kind not in kinds:
        raise InputError(
            f"{path}: /{name} has shape {dataset.shape} of {dataset.dtype}, expected {shape} of "
            f"numbers beside {shape[0]} B-scans; what belongs to which cannot be told, so store "
            "NaN where nobody annotated"
        )
    check_decoded_bytes(f"{path}: /{name}", dataset.shape, dataset.dtype.itemsize)
    return np.asarray(dataset[...])


def texts_at(path: Path | str, file: Any, name: str, count: int) -> tuple[str, ...]:
    """Return the `count` texts of dataset `name`.

    Raises:
        InputError: it holds another number, or no text; or there is none.
    """
    dataset = dataset_at(path, file, name)
    if dataset.shape != (count,) or h5py.check_string_dtype(dataset.dtype) is None:
        raise InputError(
            f"{path}: /{name} has shape {dataset.shape} of {dataset.dtype}, expected ({count},) of "
            "text"
        )
    check_decoded_bytes(f"{path}: /{name}", dataset.shape, dataset.dtype.itemsize)
    # What a name in a file system may hold is not always UTF-8.
    return tuple(dataset.asstr("utf-8", "surrogateescape")[...].tolist())


def _node_at(path: Path | str, file: Any, name: str) -> Any:
    node = file
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise InputError(f"{path}: no /{name}; {_listing(file)}, expected {EXPECTED}")
        if not isinstance(link, h5py.HardLink):
            raise InputError(
                f"{path}: {part!r} in /{name} is a link to elsewhere; copy the data into the file"
            )
        node = node[part]
    return node


def _listing(file: Any) -> str:
    names = list(file)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"found {', '.join(names[:_SHOWN]) or 'nothing'}{more}"
