"""Two sweeps of a union-find over a binary volume in raster order: components and cavities merge.

The filtration is that of the competition's metric: cells of the foreground first, then all others,
ties in raster order of (x, y, z, type) with x, y, z the smallest voxel of the cell. An edge of type
0, 1, 2 runs along that axis, a square of type 0, 1, 2 is normal to it. Most background cells cancel
in pairs of neighbours (the smallest coface of a cell whose largest face it is); the sweeps visit
the few that are left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled

__all__ = ["cycle_squares", "matched_merges"]


@compiled
def matched_merges(labels: NDArray[np.int32], held: NDArray[np.uint8]) -> int:
    """Count the merges of two components that both hold voxels of both masks.

    Components of the union of two masks are merged by background edges in raster order; a merged
    component holds what its parts hold.

    Args:
        labels: 6-connected components of the union `(D, H, W)`, 0 outside.
        held: by label, 1 where the first mask has a voxel in it, 2 where the second has, 3 both;
            0 for label 0. Overwritten.

    Returns:
        The number of merges: matched features of dimension 0.
    """
    depth, height, width = labels.shape
    parent = np.arange(held.size)
    # The component below each background voxel: down axis 0, in the first plane down axis 1, in its
    # first row down axis 2; 0 where there is none.
    below = np.zeros((height, width), np.int64)
    for y in range(height):
        for z in range(width):
            if labels[0, y, z] != 0:
                below[y, z] = labels[0, y, z]
            elif y > 0:
                below[y, z] = below[y - 1, z]
            elif z > 0:
                below[0, z] = below[0, z - 1]
    matched = 0
    for y in range(height):
        for z in range(width):
            if labels[0, y, z] != 0:
                continue
            if depth > 1 and labels[1, y, z] != 0:
                matched += _merge(parent, held, below[y, z], labels[1, y, z])
            if y + 1 < height and labels[0, y + 1, z] != 0:
                matched += _merge(parent, held, below[y, z], labels[0, y + 1, z])
            if y == 0 and z + 1 < width and labels[0, 0, z + 1] != 0:
                matched += _merge(parent, held, below[y, z], labels[0, 0, z + 1])
    for x in range(1, depth - 1):
        for y in range(height):
            for z in range(width):
                label = labels[x, y, z]
                if label != 0:
                    below[y, z] = label
                elif labels[x + 1, y, z] != 0:
                    matched += _merge(parent, held, below[y, z], labels[x + 1, y, z])
    return matched


@compiled
def _merge(parent: NDArray[np.int64], held: NDArray[np.uint8], first: int, second: int) -> int:
    """Unite two components and return 1 if both held voxels of both masks."""
    first, second = _root(parent, first), _root(parent, second)
    if first == second:
        return 0
    matched = int(held[first] == 3 and held[second] == 3)
    parent[first] = second
    held[second] |= held[first]
    return matched


@compiled
def cycle_squares(union: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the unpaired background squares that close no cavity, in raster order.

    Seen from the last voxel to the first, squares join cubes of the background and the space
    outside the volume. One that joins two pieces belongs to a cavity; the others end cycles.

    Args:
        union: foreground `(D, H, W)`, contiguous.

    Returns:
        Ids `3 * voxel + type`, ascending.
    """
    depth, height, width = union.shape
    foreground = np.count_nonzero(union)
    parent = np.zeros(foreground + 1, np.int32)  # 0 is outside; one cube per voxel at the most
    cubes = 0
    kept = np.empty(2 * foreground + height * width, np.int64)  # filled from its end
    first = kept.size
    # The piece that the uppermost cube visited so far belongs to, with a frame that is outside.
    top = np.zeros((height + 1, width + 1), np.int32)
    for x in range(depth - 1, -1, -1):
        upper = min(x + 1, depth - 1)  # the last plane has no squares but those of a volume of one
        for y in range(height - 1 if upper > x else 0):
            for z in range(width - 1):
                if _lowers_face(union, upper, y, z):
                    cubes += 1
                    parent[cubes] = cubes
                    top[y + 1, z + 1] = cubes
        for y in range(height - 1, -1, -1):
            for z in range(width - 1, -1, -1):
                square = 3 * ((x * height + y) * width + z)
                here = top[y + 1, z + 1]
                if upper > x and union[upper, y, z]:
                    if _is_step(union, x, y, z, 1, 0) and not _join(parent, top[y + 1, z], here):
                        first -= 1
                        kept[first] = square + 2
                    if _is_step(union, x, y, z, 0, 1) and not _join(parent, top[y, z + 1], here):
                        first -= 1
                        kept[first] = square + 1
                if x == 0 and _is_first_step(union, y, z) and not _join(parent, 0, here):
                    first -= 1
                    kept[first] = square
    return kept[first:]


@compiled
def _lowers_face(union: NDArray[np.bool_], x: int, y: int, z: int) -> bool:
    """Tell whether a square of the foreground normal to axis 0 ends it: below it is background."""
    face = union[x, y, z] and union[x, y, z + 1] and union[x, y + 1, z] and union[x, y + 1, z + 1]
    return face and not (
        union[x - 1, y, z]
        and union[x - 1, y, z + 1]
        and union[x - 1, y + 1, z]
        and union[x - 1, y + 1, z + 1]
    )


@compiled
def _is_step(union: NDArray[np.bool_], x: int, y: int, z: int, dy: int, dz: int) -> bool:
    """Tell whether the edge above (x, y, z) along (dy, dz) is foreground and the edge there not."""
    if y + dy >= union.shape[1] or z + dz >= union.shape[2]:
        return False
    above = union[x + 1, y, z] and union[x + 1, y + dy, z + dz]
    return above and not (union[x, y, z] and union[x, y + dy, z + dz])


@compiled
def _is_first_step(union: NDArray[np.bool_], y: int, z: int) -> bool:
    """Do the same in the first plane, where squares step along axis 1."""
    if y + 1 >= union.shape[1] or z + 1 >= union.shape[2]:
        return False
    above = union[0, y + 1, z] and union[0, y + 1, z + 1]
    return above and not (union[0, y, z] and union[0, y, z + 1])


@compiled
def _join(parent: NDArray[np.int32], first: int, second: int) -> bool:
    """Unite two pieces; False if they were one."""
    first, second = _root(parent, first), _root(parent, second)
    parent[first] = second
    return first != second


@compiled
def _root(parent: NDArray[Any], node: int) -> int:
    """Return the representative of `node`, halving the path to it."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node
