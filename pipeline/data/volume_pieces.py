"""Volumes one slab after another, in the order of their voxels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["SlicedVolume", "flat_pieces"]

_PIECE = 1 << 20  # values counted at once: what fits a processor's cache


class SlicedVolume(Protocol):
    """A `(D, H, W)` volume read by slices: what `open_volume` returns, or an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `(D, H, W)`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the voxels."""

    def __getitem__(self, region: tuple[slice, slice, slice], /) -> NDArray[Any]:
        """Return a part of it."""


def flat_pieces(volume: SlicedVolume, slab_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield all values in C order as flat pieces, each with its first one's flat index.

    Args:
        volume: `(D, H, W)`.
        slab_bytes: about how much is read at once, in whole planes.
    """
    whole = slice(None)
    plane = math.prod(volume.shape[1:]) * volume.dtype.itemsize
    depth = max(1, slab_bytes // max(1, plane))
    chunks = getattr(volume, "chunks", None)
    if chunks and depth > chunks[0]:  # no chunk is decoded twice
        depth -= depth % chunks[0]
    start = 0
    for z in range(0, volume.shape[0], depth):
        slab = volume[z : min(z + depth, volume.shape[0]), whole, whole].reshape(-1)
        for first in range(0, slab.size, _PIECE):
            yield start + first, slab[first : first + _PIECE]
        start += slab.size
