"""How far each voxel is from the boundary of a labelled surface."""

from __future__ import annotations

import edt
import numpy as np
from numpy.typing import NDArray

__all__ = ["signed_distance"]


def signed_distance(
    foreground: NDArray[np.bool_], background: NDArray[np.bool_], limit_voxels: float
) -> NDArray[np.float32]:
    """Return the distance of each voxel from the boundary, negative in the foreground.

    The boundary lies half a voxel from the voxels on both of its sides, so that the two voxels of a
    thin sheet are inside it by a half. A voxel of neither class is no boundary to either.

    Args:
        foreground: `(D, H, W)`.
        background: same shape, disjoint.
        limit_voxels: distances beyond it are cut to it; without the other class, all are.

    Returns:
        Distances in voxels, same shape; 0 where a voxel is of neither class.
    """
    distance = np.zeros(foreground.shape, np.float32)
    for own, other, sign in ((background, foreground, 1), (foreground, background, -1)):
        if own.any():
            to_other = edt.edt(np.ascontiguousarray(~other), black_border=False) - 0.5
            distance[own] = sign * np.minimum(to_other[own], limit_voxels)
    return distance
