"""Components, tunnels and cavities of a mask, as the competition counts them.

Foreground is 6-connected and background therefore 26-connected. A cavity is a piece of background
that touches no face of the volume. Tunnels follow from the Euler characteristic.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.hardware.compilation import compiled

__all__ = ["BettiNumbers", "betti_numbers", "enclosed", "euler_characteristic", "label_components"]

_CC3D_SIDE = 4  # cc3d 4.1.1 runs out of labels in some flat volumes, and fails


class BettiNumbers(NamedTuple):
    """How many 6-connected components, tunnels (or handles) and cavities a mask has."""

    components: int
    tunnels: int
    cavities: int


def betti_numbers(mask: NDArray[np.bool_]) -> BettiNumbers:
    """Count the components, tunnels and cavities of `mask` `(D, H, W)`."""
    components = label_components(mask, 6)[1]
    cavities = int(enclosed(*label_components(~mask, 26)).sum())
    tunnels = components + cavities - euler_characteristic(mask)
    return BettiNumbers(components, tunnels, cavities)


def label_components(
    mask: NDArray[np.bool_], connectivity: Literal[6, 26]
) -> tuple[NDArray[np.int32], int]:
    """Number the connected components of `mask` `(D, H, W)`.

    Args:
        mask: what to label.
        connectivity: 6 (through faces) or 26 (through corners as well).

    Returns:
        Labels `(D, H, W)`, 0 outside the mask, and the number of components.
    """
    mask = np.ascontiguousarray(mask)
    if min(mask.shape) < _CC3D_SIDE:
        structure = ndimage.generate_binary_structure(3, 1 if connectivity == 6 else 3)
        labels, count = ndimage.label(mask, structure, output=np.uint32)
    else:
        labels, count = cc3d.connected_components(
            mask, connectivity=connectivity, return_N=True, out_dtype=np.uint32
        )
    return np.ascontiguousarray(labels).view(np.int32), int(count)


def enclosed(labels: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """Return for each of `count` labels, and for 0, whether it touches no face of the volume.

    Args:
        labels: labels `(D, H, W)`, 0 outside all components.
        count: the largest label.

    Returns:
        `(count + 1,)`; False for 0.
    """
    inner = np.ones(count + 1, np.bool_)
    inner[0] = False
    for axis in range(3):
        for side in (0, -1):
            inner[np.take(labels, side, axis=axis)] = False
    return inner


def euler_characteristic(mask: NDArray[np.bool_]) -> int:
    """Return voxels - edges + squares - cubes of the 6-connected `mask` `(D, H, W)`."""
    return int(_alternating_count(np.ascontiguousarray(mask)))


@compiled
def _alternating_count(mask: NDArray[Any]) -> int:
    depth, height, width = mask.shape
    nothing = np.zeros(width, np.bool_)
    total = 0
    for x in range(depth):
        for y in range(height):
            row = mask[x, y]
            below = mask[x + 1, y] if x + 1 < depth else nothing
            beside = mask[x, y + 1] if y + 1 < height else nothing
            across = mask[x + 1, y + 1] if x + 1 < depth and y + 1 < height else nothing
            for z in range(width):
                if not row[z]:
                    continue
                square = below[z] & beside[z] & across[z]
                total += 1 - below[z] - beside[z] + square
                if z + 1 < width and row[z + 1]:
                    ahead = below[z] & below[z + 1], beside[z] & beside[z + 1]
                    cube = square & ahead[0] & ahead[1] & across[z + 1]
                    total += ahead[0] + ahead[1] - 1 - cube
    return total
