"""How thick sheets are: smoothing a probability closes its holes, and thickens thin sheets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.vesuvius.local_topology import peel

__all__ = ["restore_thickness"]

Mask = NDArray[np.bool_]


def restore_thickness(mask: Mask, unsmoothed: NDArray[np.float32], threshold: float = 0.5) -> Mask:
    """Take off what smoothing added to sheets, and keep what it mended.

    The voxels that are below the threshold in the probability before smoothing go, the least
    probable first, each only while no component, tunnel or cavity changes by it. So the outside of
    a thickened sheet goes, and of a hole that was closed one layer stays. A strip that joins two
    pieces side by side can be worn down to a thread: it was the least certain part.

    Args:
        mask: `(D, H, W)`, of the smoothed probability.
        unsmoothed: the probability before smoothing, `(D, H, W)`.
        threshold: from which a voxel of `unsmoothed` stays.
    """
    thickened = mask & (unsmoothed < threshold)
    state = np.pad(mask, 1).astype(np.uint8)
    places = np.flatnonzero(np.pad(thickened, 1))
    left = places[np.argsort(unsmoothed[thickened], kind="stable")]
    before = -1
    while left.size != before:
        before = left.size
        peel(state, left)
        left = left[state.ravel()[left] != 0]
    return np.asarray(state[1:-1, 1:-1, 1:-1] != 0)
