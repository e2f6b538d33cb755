"""Fill the through-holes of sheets, and never the gap between two sheets."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from pipeline.vesuvius.betti_numbers import label_components
from pipeline.vesuvius.binary_morphology import close, radii_of
from pipeline.vesuvius.patches import PatchLimits, fill_tunnels_with
from pipeline.vesuvius.sheet_colours import colour_components, of_colour

__all__ = ["fill_tunnels"]


def fill_tunnels(
    mask: NDArray[np.bool_],
    probability: NDArray[np.float32] | None = None,
    radii: Sequence[float] = (2.5, 4.5),
    max_patch: int = 64,
    max_bend: float = 0.9,
    min_probability: float = 0.0,
) -> NDArray[np.bool_]:
    """Close tunnels of each 26-connected sheet of `mask` `(D, H, W)`.

    Where a ball does not fit through a sheet, the sheet gets a membrane and its thickness. What is
    filled lowers the number of tunnels, joins no two 26-connected components, encloses no
    background and lies in the sheet; everything else stays as it is. Not exactly idempotent: a
    filled hole may make room for the next.

    Args:
        mask: the mask.
        probability: `(D, H, W)`; membranes run where it is highest. None goes by the neighbourhood.
        radii: of the balls in voxels, one pass each. Without effect where a ball of that radius
            passes the hole. Halves make balls with blunt tips, which do not dip into small holes.
        max_patch: the most voxels of a membrane.
        max_bend: 0 fills holes of perfect planes alone, 1 any; see `patches.PatchLimits`.
        min_probability: of every voxel that is filled; a hole with less in it is a tear.
    """
    labels, count = label_components(mask, 26)
    padded = np.pad(labels, 1)
    limits = PatchLimits(max_patch, max_bend)
    for radius in radii:
        distance = ceil(2 * max(radii_of(radius)))
        colours = colour_components(labels, count, distance)
        for colour in range(1, int(colours.max(initial=0)) + 1):
            sheets = of_colour(labels, colours, colour)
            candidates = close(sheets, radius) & (padded[1:-1, 1:-1, 1:-1] == 0)
            if probability is not None:
                candidates &= probability >= min_probability
            groups = np.full(np.count_nonzero(candidates), colour, np.int32)
            fill_tunnels_with(
                padded, candidates, groups, colours.astype(np.int32), probability, limits
            )
        labels = np.ascontiguousarray(padded[1:-1, 1:-1, 1:-1])
    return np.asarray(labels != 0)
