"""Make a mask 6-connected wherever it is 26-connected, by the fewest voxels.

The competition counts 6-connected components, tunnels and cavities: a sheet that goes on through
edges and corners alone is many pieces to it, and full of holes. Of the 256 ways to fill a window of
2x2x2 voxels, 88 hold foreground that is not 6-connected inside the window; a table says for each
what to add.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.betti_numbers import label_components

__all__ = ["plug_diagonals", "smallest_additions"]

_CORNERS = list(product((0, 1), repeat=3))  # corner c of a window is bit c


def plug_diagonals(
    mask: NDArray[np.bool_], probability: NDArray[np.float32] | None = None
) -> NDArray[np.bool_]:
    """Join voxels of `mask` that meet through an edge or a corner only, until all are joined.

    Windows are taken in raster order, and again until nothing changes, so that the result is
    idempotent. Among the smallest additions to a window the most probable is taken, the first in
    raster order among equals. An addition that would touch a second 26-connected component is never
    taken; a window that has no other stays as it is.

    Args:
        mask: `(D, H, W)`.
        probability: `(D, H, W)`; None takes all voxels as equally probable.
    """
    labels = label_components(mask, 26)[0]
    padded = np.pad(labels, 1)
    weight = np.zeros((0, 0, 0), np.float32)
    if probability is not None:
        weight = np.ascontiguousarray(probability, np.float32)
    while _plug_once(padded, weight, _TABLE, _STARTS):
        pass
    return np.asarray(padded[1:-1, 1:-1, 1:-1] != 0)


def smallest_additions(window: int) -> list[int]:
    """Return the smallest sets of voxels that make `window` 6-connected, as bits; none if it is."""
    if _joined(window):
        return []
    free = [corner for corner in range(8) if not window >> corner & 1]
    for size in range(1, 9):
        found = [sum(1 << corner for corner in chosen) for chosen in combinations(free, size)]
        found = [added for added in found if _joined(window | added)]
        if found:
            return found
    return []


def _joined(window: int) -> bool:
    """Return whether the foreground of `window` is 6-connected inside it."""
    inside = {corner for index, corner in enumerate(_CORNERS) if window >> index & 1}
    front = {min(inside)} if inside else set()
    while front:
        inside -= front
        front = {
            other
            for other in inside
            if any(sum(abs(a - b) for a, b in zip(other, c, strict=True)) == 1 for c in front)
        }
    return not inside


def _table() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all additions one after the other, and where those of each window start."""
    additions = [smallest_additions(window) for window in range(256)]
    starts = np.cumsum([0, *map(len, additions)])
    return np.array([a for some in additions for a in some], np.uint8), starts.astype(np.int64)


_TABLE, _STARTS = _table()


@compiled
def _plug_once(
    labels: NDArray[np.int32],
    weight: NDArray[np.float32],
    table: NDArray[np.uint8],
    starts: NDArray[np.int64],
) -> bool:
    """Plug all windows once, in raster order; return whether anything was added."""
    depth, height, width = labels.shape
    changed = False
    for z in range(1, depth - 2):
        for y in range(1, height - 2):
            # A window is two columns of four voxels; the right one becomes the next left one.
            window = 0
            for x in range(0, width - 2):
                window = window >> 1 & 0b01010101
                right = x + 1
                if labels[z, y, right] != 0:
                    window |= 2
                if labels[z, y + 1, right] != 0:
                    window |= 8
                if labels[z + 1, y, right] != 0:
                    window |= 32
                if labels[z + 1, y + 1, right] != 0:
                    window |= 128
                if x == 0 or starts[window] == starts[window + 1]:
                    continue
                best, most = 0, 0.0
                for entry in range(starts[window], starts[window + 1]):
                    added = table[entry]
                    if not _alone(labels, z, y, x, window, added):
                        continue
                    total = 0.0
                    if weight.size:
                        for corner in range(8):
                            if added >> corner & 1:
                                at_z, at_y = z + (corner >> 2) - 1, y + (corner >> 1 & 1) - 1
                                total += weight[at_z, at_y, x + (corner & 1) - 1]
                    if best == 0 or total > most:
                        best, most = added, total
                if best:
                    owner = _owner(labels, z, y, x, window)
                    for corner in range(8):
                        if best >> corner & 1:
                            labels[z + (corner >> 2), y + (corner >> 1 & 1), x + (corner & 1)] = (
                                owner
                            )
                    window |= best
                    changed = True
    return changed


@compiled
def _owner(labels: NDArray[np.int32], z: int, y: int, x: int, window: int) -> int:
    """Return the component that the window at `(z, y, x)` shows."""
    for corner in range(8):
        if window >> corner & 1:
            return int(labels[z + (corner >> 2), y + (corner >> 1 & 1), x + (corner & 1)])
    return 0


@compiled
def _alone(labels: NDArray[np.int32], z: int, y: int, x: int, window: int, added: int) -> bool:
    """Return whether no voxel of `added` touches a component other than that of the window."""
    owner = _owner(labels, z, y, x, window)
    for corner in range(8):
        if not added >> corner & 1:
            continue
        at_z, at_y, at_x = z + (corner >> 2), y + (corner >> 1 & 1), x + (corner & 1)
        for other_z in range(at_z - 1, at_z + 2):
            for other_y in range(at_y - 1, at_y + 2):
                for other_x in range(at_x - 1, at_x + 2):
                    label = labels[other_z, other_y, other_x]
                    if label != 0 and label != owner:
                        return False
    return True
