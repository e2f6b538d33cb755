"""Dilation, erosion, opening and closing of masks by balls, on 64 voxels at a time.

A mask is packed into one bit per voxel along its last axis; a ball is then a set of shifted rows.
Beyond the volume there is background for a dilation and a closing, and nothing that could eat into
the mask for an erosion and an opening: a sheet that leaves the volume is not worn off at its faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.hardware.compilation import compiled

__all__ = ["Radius", "close", "dilate", "erode", "open_", "radii_of"]

Mask = NDArray[np.bool_]
Radius = float | Sequence[float]


def dilate(mask: Mask, radius: Radius) -> Mask:
    """Return what lies within `radius` of `mask` `(D, H, W)`.

    Args:
        mask: the mask.
        radius: of the ball in voxels, or one per axis of an ellipsoid; 0 keeps an axis as it is.
    """
    radii = radii_of(radius)
    widened = [_pack(mask)]
    for _ in range(floor(radii[2])):
        widened.append(_widen(widened[-1]))
    return _unpack(_union(np.stack(widened), _rows(radii)), mask.shape)


def erode(mask: Mask, radius: Radius) -> Mask:
    """Return what of `mask` `(D, H, W)` is more than `radius` from all background inside."""
    return ~dilate(~mask, radius)


def open_(mask: Mask, radius: Radius) -> Mask:
    """Return the part of `mask` `(D, H, W)` in which a ball of `radius` fits."""
    return dilate(erode(mask, radius), radius)


def close(mask: Mask, radius: Radius) -> Mask:
    """Fill whatever of the background of `mask` `(D, H, W)` no ball of `radius` fits into."""
    pad = [floor(value) for value in radii_of(radius)]
    padded = np.pad(mask, [(width, width) for width in pad])
    closed = erode(dilate(padded, radius), radius)
    depth, height, width = mask.shape
    return closed[pad[0] : pad[0] + depth, pad[1] : pad[1] + height, pad[2] : pad[2] + width]


def radii_of(radius: Radius) -> tuple[float, float, float]:
    """Return one radius per axis.

    Raises:
        ConfigurationError: a radius is negative, or there are neither one nor three.
    """
    values = [radius] * 3 if isinstance(radius, int | float) else list(radius)
    if len(values) != 3 or not all(0 <= value < 64 for value in values):
        raise ConfigurationError(
            f"radius must be one number of voxels or three (z, y, x), 0 or more and below 64, "
            f"got {radius!r}"
        )
    return float(values[0]), float(values[1]), float(values[2])


def _rows(radii: tuple[float, float, float]) -> NDArray[np.int64]:
    """Return the rows of the ball `(rows, 3)`: offsets in z and y, and the half width in x."""
    depth, height, width = radii
    rows = []
    for z in range(-floor(depth), floor(depth) + 1):
        for y in range(-floor(height), floor(height) + 1):
            left = 1 - (z / depth if z else 0) ** 2 - (y / height if y else 0) ** 2
            if left > -1e-9:
                rows.append((z, y, floor(width * sqrt(max(left, 0)) + 1e-9)))
    return np.array(rows, np.int64)


def _pack(mask: Mask) -> NDArray[np.uint64]:
    width = mask.shape[2]
    packed = np.packbits(mask, axis=2, bitorder="little")
    words = np.zeros((*mask.shape[:2], 8 * ((width + 63) // 64)), np.uint8)
    words[:, :, : packed.shape[2]] = packed
    return words.view("<u8").astype(np.uint64, copy=False)


def _unpack(words: NDArray[np.uint64], shape: tuple[int, ...]) -> Mask:
    bits = np.unpackbits(
        words.astype("<u8", copy=False).view(np.uint8), axis=2, count=shape[2], bitorder="little"
    )
    return bits.view(np.bool_)


def _widen(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return every row dilated by one voxel on both sides."""
    one, last = np.uint64(1), np.uint64(63)
    wider: NDArray[np.uint64] = words | words << one | words >> one
    wider[:, :, 1:] |= words[:, :, :-1] >> last
    wider[:, :, :-1] |= words[:, :, 1:] << last
    return wider


@compiled
def _union(widened: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the union of shifted rows of `widened` `(half width + 1, D, H, words)`."""
    depth, height, width = widened.shape[1:]
    result = np.zeros((depth, height, width), np.uint64)
    for z in range(depth):
        for y in range(height):
            for row in range(rows.shape[0]):
                other_z, other_y = z + rows[row, 0], y + rows[row, 1]
                if 0 <= other_z < depth and 0 <= other_y < height:
                    for x in range(width):
                        result[z, y, x] |= widened[rows[row, 2], other_z, other_y, x]
    return result
