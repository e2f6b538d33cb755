"""Close each sheet of a mask on its own, so that neighbours stay apart."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from pipeline.vesuvius.betti_numbers import label_components
from pipeline.vesuvius.binary_morphology import Radius, close, radii_of
from pipeline.vesuvius.patches import add_patches
from pipeline.vesuvius.sheet_colours import colour_components, of_colour

__all__ = ["close_sheets"]


def close_sheets(mask: NDArray[np.bool_], radius: Radius = 3) -> NDArray[np.bool_]:
    """Close every 26-connected component of `mask` `(D, H, W)` by a ball.

    Each connected patch of additions is taken whole, or not at all if it touches a second
    component. Components of the mask never merge.

    Args:
        mask: the mask.
        radius: of the ball in voxels, or one per axis (z, y, x) of an ellipsoid.
    """
    labels, count = label_components(mask, 26)
    colours = colour_components(labels, count, ceil(2 * max(radii_of(radius))))
    for colour in range(1, int(colours.max(initial=0)) + 1):
        closed = close(of_colour(labels, colours, colour), radius) & (labels == 0)
        patches = add_patches(labels, closed)
        # An addition keeps no label of its own: it belongs to whatever component it touches.
        labels = _with_owners(labels, patches)
    return np.asarray(labels != 0)


def _with_owners(labels: NDArray[np.int32], added: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return `labels` with the patches of `added`, each under the component that it touches."""
    if not added.any():
        return labels
    numbers, count = label_components(added | (labels != 0), 26)
    owner = np.zeros(count + 1, np.int32)
    owner[numbers[labels != 0]] = labels[labels != 0]
    return np.asarray(owner[numbers])
