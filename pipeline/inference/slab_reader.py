"""Planes of a volume on disk, as many as a window is deep, read once each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.volumes import Volume
from pipeline.errors import ConfigurationError
from pipeline.inference.windows import Grid

__all__ = ["SlabReader"]

# numpy's names for the padding of torch
_PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class SlabReader:
    """Planes `[z, z + depth)` of a box of a volume, for ascending z.

    Args:
        volume: the source.
        grid: windows in the frame of the box.
        shift: index in the box of the volume's first voxel, per axis; positive where the volume is
            padded before, negative where the box begins inside it.
        padding_mode: of a volume that is smaller than a window, as in torch.
    """

    def __init__(self, volume: Volume, grid: Grid, shift: Sequence[int], padding_mode: str) -> None:
        if padding_mode not in _PADDING:
            known = ", ".join(_PADDING)
            raise ConfigurationError(f"padding_mode must be one of {known}, got {padding_mode!r}")
        self._volume = volume
        self._depth = grid.roi[0]
        self._mode: Any = _PADDING[padding_mode]
        box = [
            (max(0, -s), min(n, size - s))
            for s, n, size in zip(shift, volume.shape, grid.size, strict=True)
        ]
        self._low, self._high = box[0]
        self._across = tuple(slice(a, b) for a, b in box[1:])
        # Where an axis is padded, one window covers all of it.
        self._pads = [
            (max(0, s), size - max(0, s) - (b - a))
            for s, size, (a, b) in zip(shift, grid.size, box, strict=True)
        ]
        self._held: NDArray[Any] | None = None
        self._first = 0

    def planes(self, first: int) -> Tensor:
        """Return the planes `(C, depth, h, w)` from `first` on, in the volume's type.

        The tensor is used again by the next call, whose `first` must not be lower.
        """
        if self._held is None:
            self._held = self._read(first, first + self._depth)
        elif first > self._first:
            step = min(first - self._first, self._depth)
            kept = self._depth - step
            # Plane by plane, ascending: source and target overlap.
            for plane in range(kept):
                self._held[:, plane] = self._held[:, plane + step]
            begin = first + kept
            self._held[:, kept:] = self._read(begin, begin + step)
        self._first = first
        return torch.from_numpy(self._held)

    def _read(self, begin: int, end: int) -> NDArray[Any]:
        before, after = self._pads[0]
        along = slice(self._low, self._high)
        if not (before or after):
            along = slice(self._low + begin, self._low + end)
        read = np.asarray(self._volume[(along, *self._across)])
        if read.ndim == len(self._pads):
            read = read[None]
        if any(side for pad in self._pads for side in pad):
            read = np.pad(read, [(0, 0), *self._pads], mode=self._mode)
        return np.ascontiguousarray(read)
