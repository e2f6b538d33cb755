"""Fill the cavities of a mask: pieces of background that touch no face of the volume."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.betti_numbers import enclosed, label_components
from pipeline.vesuvius.components import component_sizes

__all__ = ["fill_cavities"]


def fill_cavities(
    mask: NDArray[np.bool_],
    max_hole_size: int | None = None,
    connectivity: Literal[6, 26] = 26,
) -> NDArray[np.bool_]:
    """Fill every cavity of `mask` `(D, H, W)`. Idempotent.

    What floats in a cavity that is filled becomes one with what surrounds it.

    Args:
        mask: the mask.
        max_hole_size: cavities of more voxels stay; None fills all.
        connectivity: of the background. 26 fills exactly the cavities that the competition's metric
            counts; 6 also fills pockets that are open through an edge or a corner only.

    Raises:
        ConfigurationError: `connectivity` is another, or `max_hole_size` is negative.
    """
    if connectivity not in (6, 26):
        raise ConfigurationError(f"connectivity must be 6 or 26, got {connectivity!r}")
    if max_hole_size is not None and max_hole_size < 0:
        raise ConfigurationError(f"max_hole_size must be 0 or more, or null, got {max_hole_size!r}")
    labels, count = label_components(~mask, connectivity)
    fill = enclosed(labels, count)
    if max_hole_size is not None:
        fill &= component_sizes(labels, count) <= max_hole_size
    return _filled(mask, labels, fill) if fill.any() else mask.copy()


@compiled
def _filled(
    mask: NDArray[np.bool_], labels: NDArray[np.int32], fill: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    result = mask.copy()
    flat, chosen = labels.ravel(), result.ravel()
    for place in range(flat.size):
        if fill[flat[place]]:
            chosen[place] = True
    return result
