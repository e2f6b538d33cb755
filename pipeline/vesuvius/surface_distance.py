"""SurfaceDice: the share of two surfaces that lies within a tolerance of the other one.

The surface of a mask is cut into pieces, one per block of 2x2x2 voxels that holds foreground and
background; it has the area that marching cubes gives this block. Beyond the faces of the volume
all is background, so a mask that touches a face has a surface there. Distances are between the
middles of blocks, in voxels.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import ConfigurationError
from pipeline.hardware.compilation import compiled

__all__ = ["area_of_blocks", "surface_dice_of_masks"]

# Area that cuts a 6-connected piece of the corners of a unit cube off from the rest, by its voxels.
_CORNER = sqrt(3) / 8
_EDGE = sqrt(2) / 2
_ANGLE = 1 / 2 + 3 * sqrt(3) / 8
_FACE = 1.0
_TRIPOD = 3 * sqrt(3) / 4
_TWISTED_PATH = sqrt(2) / 2 + sqrt(3) / 2


def surface_dice_of_masks(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], tolerance: float
) -> float:
    """Return the area-weighted SurfaceDice of two masks `(D, H, W)`.

    The cost of a piece of surface grows with the cube of `tolerance`; it is made for a few voxels.

    Args:
        prediction: foreground of the prediction.
        truth: foreground of the truth, of the same shape.
        tolerance: largest distance in voxels at which a piece of surface counts as found.

    Returns:
        0..1; 1 where both masks are empty, 0 where exactly one is.

    Raises:
        ConfigurationError: `tolerance` is negative or not finite.
    """
    if not (isfinite(tolerance) and tolerance >= 0):
        raise ConfigurationError(
            f"tolerance must be a distance in voxels of 0 or more, got {tolerance!r}; "
            "the competition uses 2.0"
        )
    if not prediction.any() or not truth.any():
        return float(not prediction.any() and not truth.any())
    steps, margin = _steps_within(tolerance)
    first, second = _blocks(prediction, margin), _blocks(truth, margin)
    strides = np.array([first.shape[1] * first.shape[2], first.shape[2], 1])
    offsets = steps @ strides
    found = _near(first.ravel(), second.ravel(), offsets) + _near(
        second.ravel(), first.ravel(), offsets
    )
    area = area_of_blocks() @ found
    return float(area[0] / area.sum())


@cache
def area_of_blocks() -> NDArray[np.float64]:
    """Return the surface area in each block of 2x2x2 voxels, by the code of the block.

    The code has a bit for every foreground voxel, the first voxel in raster order the highest. The
    rarer of the two classes (foreground, if as many) is cut off piece by piece.

    Returns:
        `(256,)` areas in squares of a voxel's side; 0 at the codes 0 and 255.
    """
    areas = np.zeros(256)
    for code in range(256):
        corners = np.array([code >> bit & 1 for bit in range(7, -1, -1)], np.bool_).reshape(2, 2, 2)
        if corners.sum() > 4:
            corners = ~corners
        pieces, count = ndimage.label(corners)
        areas[code] = sum(_area_around(pieces == number) for number in range(1, count + 1))
    return areas


def _area_around(piece: NDArray[np.bool_]) -> float:
    """Return the area around up to four connected corners of a cube."""
    voxels = int(piece.sum())
    if voxels < 4:
        return (_CORNER, _EDGE, _ANGLE)[voxels - 1]
    inside = np.argwhere(piece)
    neighbours = (np.abs(inside[:, None] - inside).sum(axis=-1) == 1).sum(axis=-1)
    if neighbours.min() == 2:
        return _FACE
    return _TRIPOD if neighbours.max() == 3 else _TWISTED_PATH


def _steps_within(tolerance: float) -> tuple[NDArray[np.int64], int]:
    """Return the steps `(n, 3)` no longer than `tolerance`, nearest first, and the longest one."""
    margin = int(tolerance)
    steps = np.array(list(product(range(-margin, margin + 1), repeat=3)))
    squares = (steps**2).sum(axis=1)
    steps, squares = steps[squares <= tolerance**2], squares[squares <= tolerance**2]
    return steps[np.argsort(squares, kind="stable")], margin


def _blocks(mask: NDArray[np.bool_], margin: int) -> NDArray[np.uint8]:
    """Return the code of every block that touches `mask`, in a frame of `margin` empty blocks."""
    frame = [side + 1 + 2 * margin for side in mask.shape]
    codes = np.zeros(frame, np.uint8)
    inside = tuple(slice(margin, margin + side + 1) for side in mask.shape)
    _write_codes(np.ascontiguousarray(mask), codes[inside])
    return codes


@compiled
def _write_codes(mask: NDArray[np.bool_], codes: NDArray[Any]) -> None:
    """Write the codes of all blocks into `codes`, which has one more entry per axis than `mask`."""
    depth, height, width = mask.shape
    nothing = np.zeros(width, np.bool_)
    for x in range(depth + 1):
        for y in range(height + 1):
            # The four rows that meet in this row of blocks; outside the volume there is nothing.
            row00 = mask[x - 1, y - 1] if x > 0 and y > 0 else nothing
            row01 = mask[x - 1, y] if x > 0 and y < height else nothing
            row10 = mask[x, y - 1] if x < depth and y > 0 else nothing
            row11 = mask[x, y] if x < depth and y < height else nothing
            target = codes[x, y]
            before = 0
            for z in range(width):
                # Bits 6, 4, 2, 0 of a code; as the earlier slice of the next block they move up.
                here = row00[z] << 6 | row01[z] << 4 | row10[z] << 2 | row11[z]
                target[z] = before << 1 | here
                before = here
            target[width] = before << 1


@compiled
def _near(
    blocks: NDArray[np.uint8], others: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Count the blocks with surface by code `(256, 2)`: another surface is near; none is."""
    counts = np.zeros((256, 2))
    for place in range(blocks.size):
        code = blocks[place]
        if code == 0 or code == 255:
            continue
        far = 1
        for offset in offsets:
            other = others[place + offset]
            if other != 0 and other != 255:
                far = 0
                break
        counts[code, far] += 1
    return counts
