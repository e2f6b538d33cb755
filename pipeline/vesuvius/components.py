"""Which components of a mask stay: by size, by a confident voxel, off the frame.

Components are 26-connected, as the sheets of the competition's metric are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.betti_numbers import label_components

__all__ = ["component_sizes", "hysteresis", "remove_small_components", "zero_frame"]

Mask = NDArray[np.bool_]


def remove_small_components(
    mask: Mask, min_component_size: float = 100, reference_voxels: int | None = None
) -> Mask:
    """Remove the 26-connected components of fewer than `min_component_size` voxels. Idempotent.

    Args:
        mask: `(D, H, W)`.
        min_component_size: voxels of the smallest component that stays.
        reference_voxels: the size holds for a volume of so many voxels and is scaled to others;
            None takes it as it is.

    Raises:
        ConfigurationError: a size is negative or the reference not positive.
    """
    if not min_component_size >= 0:
        raise ConfigurationError(
            f"min_component_size must be 0 or more voxels, got {min_component_size!r}"
        )
    if reference_voxels is not None:
        if not reference_voxels > 0:
            raise ConfigurationError(f"reference_voxels must be positive, got {reference_voxels!r}")
        min_component_size *= mask.size / reference_voxels
    labels, count = label_components(mask, 26)
    keep = component_sizes(labels, count) >= min_component_size
    keep[0] = False
    return mask.copy() if keep[1:].all() else _chosen(labels, keep)


def component_sizes(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Return the voxels of each of `count` components of `labels` `(D, H, W)`, and of 0."""
    return _voxels_by_label(labels, count)


def hysteresis(
    probability: NDArray[np.float32], low: float = 0.3, high: float = 0.85, z_only: bool = False
) -> Mask:
    """Keep what reaches `low` and is connected to something that reaches `high`.

    Args:
        probability: `(D, H, W)`, 0 to 1.
        low: the threshold of the surface.
        high: what a component has to reach somewhere.
        z_only: connect along the first axis alone, instead of through all 26 neighbours.

    Raises:
        ConfigurationError: not `0 <= low <= high <= 1`.
    """
    if not 0 <= low <= high <= 1:
        raise ConfigurationError(
            f"hysteresis needs 0 <= low <= high <= 1, got low {low!r} and high {high!r}"
        )
    candidate = probability >= low
    if low == high:
        return candidate
    if z_only:
        return _reached_along_z(candidate, probability >= high)
    labels, count = label_components(candidate, 26)
    keep = _labels_above(labels, np.ascontiguousarray(probability), count, high)
    keep[0] = False
    return candidate if keep[1:].all() else _chosen(labels, keep)


def zero_frame(mask: Mask, frame: int = 3) -> Mask:
    """Clear the outer `frame` voxels of every face of `mask` `(D, H, W)`. Idempotent.

    Raises:
        ConfigurationError: `frame` is negative.
    """
    if frame < 0:
        raise ConfigurationError(f"frame must be 0 or more voxels, got {frame!r}")
    inside = tuple(slice(frame, max(side - frame, frame)) for side in mask.shape)
    result = np.zeros_like(mask)
    result[inside] = mask[inside]
    return result


def _reached_along_z(candidate: Mask, seed: Mask) -> Mask:
    reached = seed.copy()
    for plane in range(1, len(seed)):
        reached[plane] |= reached[plane - 1] & candidate[plane]
    for plane in range(len(seed) - 2, -1, -1):
        reached[plane] |= reached[plane + 1] & candidate[plane]
    return reached


@compiled
def _voxels_by_label(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    sizes = np.zeros(count + 1, np.int64)
    flat = labels.ravel()
    start = 0
    for place in range(1, flat.size + 1):  # by runs: a voxel rarely differs from the one before
        if place == flat.size or flat[place] != flat[start]:
            sizes[flat[start]] += place - start
            start = place
    return sizes


@compiled
def _labels_above(
    labels: NDArray[np.int32], probability: NDArray[Any], count: int, high: float
) -> NDArray[np.bool_]:
    above = np.zeros(count + 1, np.bool_)
    flat, values = labels.ravel(), probability.ravel()
    for place in range(flat.size):
        if flat[place] != 0 and values[place] >= high:
            above[flat[place]] = True
    return above


@compiled
def _chosen(labels: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    result = np.zeros(labels.shape, np.bool_)
    flat, chosen = labels.ravel(), result.ravel()
    for place in range(flat.size):
        chosen[place] = keep[flat[place]]
    return result
