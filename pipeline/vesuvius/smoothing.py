"""Smoothing a probability: it closes pinholes and wears stubble off, and thickens thin sheets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.local_topology import peel

__all__ = ["restore_thickness", "smooth"]

Mask = NDArray[np.bool_]


def smooth(
    probability: NDArray[np.float32], sigma: float = 1.0, sheet_thickness: int = 2
) -> NDArray[np.float32]:
    """Return `probability` after a Gaussian: sheets lose pinholes and stubble, and become thicker.

    A Gaussian lowers the peak of a thin sheet, and the more so the thinner the sheet is. So that a
    threshold means what it meant, the result is scaled such that the voxels of a flat sheet of
    `sheet_thickness` voxels keep their value; what would then be above 1 is 1.

    Args:
        probability: `(D, H, W)`, 0 to 1.
        sigma: of the Gaussian, in voxels; 0 leaves the probability as it is.
        sheet_thickness: in voxels.

    Raises:
        ConfigurationError: `sigma` is negative or `sheet_thickness` not positive.
    """
    if not sigma >= 0:
        raise ConfigurationError(f"sigma must be 0 or more voxels, got {sigma!r}")
    if not sheet_thickness >= 1:
        raise ConfigurationError(
            f"sheet_thickness must be 1 or more voxels, got {sheet_thickness!r}"
        )
    if not sigma:
        return probability
    around = int(np.ceil(4 * sigma)) + 1  # further than the filter reaches
    sheet = np.pad(np.ones(int(sheet_thickness), np.float32), around)
    peak = np.float32(gaussian_filter(sheet, sigma).max())
    smoothed: NDArray[np.float32] = np.minimum(gaussian_filter(probability, sigma) / peak, 1)
    return smoothed


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
