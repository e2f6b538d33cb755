"""Planes of a result on their way to the disk, whole rows of chunks at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import resource_errors
from pipeline.data.ome_zarr import write_unit
from pipeline.inference.stream_plan import Block

__all__ = ["PlaneWriter", "sync_file"]


class PlaneWriter:
    """Collects the planes of a block and writes those of a chunk, or shard, together.

    Args:
        array: of the result, `([C,] D, H, W)`, in a folder.
        block: what is to be written of it.
        note: called with the number of planes that have reached the disk.
    """

    def __init__(self, array: Any, block: Block, note: Callable[[int], None]) -> None:
        self._array = array
        self._block = block
        self._depth = write_unit(array)[-3]
        self._note = note
        self._next = block.low[0]  # first plane that is not written
        self._buffer: NDArray[Any] | None = None
        self._filled = 0

    def add(self, planes: NDArray[Any]) -> None:
        """Take the next planes `(C, k, h, w)`.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        if self._buffer is None:
            depth = min(self._depth, self._block.shape[0])
            self._buffer = np.empty((len(planes), depth, *planes.shape[2:]), planes.dtype)
        while planes.shape[1]:
            # up to the next chunk's begin: a run that goes on after a kill begins on one too
            wanted = min(self._depth - self._next % self._depth, self._block.high[0] - self._next)
            count = min(wanted - self._filled, planes.shape[1])
            self._buffer[:, self._filled : self._filled + count] = planes[:, :count]
            self._filled += count
            planes = planes[:, count:]
            if self._filled == wanted:
                self._write(self._buffer[:, :wanted])

    def _write(self, planes: NDArray[Any]) -> None:
        end = self._next + planes.shape[1]
        box = (
            slice(self._next, end),
            *map(slice, self._block.low[1:], self._block.high[1:]),
        )
        with resource_errors(self._array.store_path.store.root):
            self._array[(..., *box)] = planes if self._array.ndim > len(box) else planes[0]
            for path in _files(self._array, box):
                with contextlib.suppress(FileNotFoundError):  # a chunk of zeros has no file
                    sync_file(path)
        self._next, self._filled = end, 0
        self._note(end - self._block.low[0])


def _files(array: Any, box: tuple[slice, ...]) -> list[Path]:
    """Return the files that hold `box` of all channels."""
    unit = write_unit(array)
    lead = [slice(0, length) for length in array.shape[: array.ndim - len(box)]]
    places = itertools.product(
        *(
            range(part.start // length, -(-part.stop // length))
            for part, length in zip([*lead, *box], unit, strict=True)
        )
    )
    folder = array.store_path.store.root / array.store_path.path
    return [folder / array.metadata.encode_chunk_key(place) for place in places]


def sync_file(path: Path) -> None:
    """Have a file reach the disk before it is noted as written."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
