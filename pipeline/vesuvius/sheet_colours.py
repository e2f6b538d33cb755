"""Colour the components of a mask so that close neighbours differ.

A sheet has to be closed alone, or it would merge with the next. Sheets of one colour lie far apart
and can be closed together, which turns dozens of passes over the volume into two to four.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled

__all__ = ["colour_components", "of_colour"]

_REMEMBERED = 1 << 16
_MAX_COLOURS = 250


def colour_components(labels: NDArray[np.int32], count: int, distance: int) -> NDArray[np.uint8]:
    """Give every component a colour, so that components face none of their own.

    Two components face each other where a line along an axis leads from one to the other over at
    most `distance` voxels of background. That is a matter of speed and reach: whoever adds voxels
    still has to see that they touch one component only.

    Args:
        labels: `(D, H, W)`, 0 outside.
        count: number of components.
        distance: in voxels.

    Returns:
        Colours `(count + 1,)` from 1 on, the most voxels first; 0 for label 0.
    """
    pairs = np.unique(_facing(labels, distance), axis=0)
    order = np.argsort(-np.bincount(pairs.ravel(), minlength=count + 1)[1:], kind="stable") + 1
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    ends = ends[np.argsort(ends[:, 0], kind="stable")]
    starts = np.searchsorted(ends[:, 0], np.arange(count + 2))
    return _greedy(order, np.ascontiguousarray(ends[:, 1]), starts, _MAX_COLOURS)


@compiled
def of_colour(
    labels: NDArray[np.int32], colours: NDArray[np.uint8], colour: int
) -> NDArray[np.bool_]:
    """Return where `labels` `(D, H, W)` have a component of `colour`."""
    result = np.zeros(labels.shape, np.bool_)
    flat, chosen = labels.ravel(), result.ravel()
    for place in range(flat.size):
        chosen[place] = flat[place] != 0 and colours[flat[place]] == colour
    return result


@compiled
def _facing(labels: NDArray[np.int32], distance: int) -> NDArray[np.int64]:
    """Return pairs of labels that face each other `(pairs, 2)`, many of them more than once."""
    depth, height, width = labels.shape
    seen = np.zeros((_REMEMBERED, 2), np.int64)
    pairs = np.zeros((1024, 2), np.int64)
    found = 0
    # The label last met along each axis, and where.
    deep, deep_at = np.zeros((height, width), np.int32), np.zeros((height, width), np.int32)
    for z in range(depth):
        high, high_at = np.zeros(width, np.int32), np.zeros(width, np.int32)
        for y in range(height):
            last, last_at = 0, 0
            for x in range(width):
                label = labels[z, y, x]
                if label == 0:
                    continue
                for axis in range(3):
                    if axis == 0:
                        other, gap = deep[y, x], z - deep_at[y, x]
                    elif axis == 1:
                        other, gap = high[x], y - high_at[x]
                    else:
                        other, gap = last, x - last_at
                    if other == 0 or other == label or gap > distance + 1:
                        continue
                    small, large = min(label, other), max(label, other)
                    slot = (small * 31 + large) % _REMEMBERED
                    if seen[slot, 0] == small and seen[slot, 1] == large:
                        continue
                    seen[slot, 0], seen[slot, 1] = small, large
                    if found == pairs.shape[0]:
                        longer = np.zeros((2 * found, 2), np.int64)
                        longer[:found] = pairs
                        pairs = longer
                    pairs[found, 0], pairs[found, 1] = small, large
                    found += 1
                deep[y, x], deep_at[y, x] = label, z
                high[x], high_at[x] = label, y
                last, last_at = label, x
    return pairs[:found]


@compiled
def _greedy(
    order: NDArray[np.int64], ends: NDArray[np.int64], starts: NDArray[np.int64], most: int
) -> NDArray[np.uint8]:
    colours = np.zeros(order.size + 1, np.uint8)
    taken = np.zeros(most + 2, np.int64)
    for label in order:
        for other in ends[starts[label] : starts[label + 1]]:
            taken[colours[other]] = label
        colour = 1
        while colour < most and taken[colour] == label:
            colour += 1
        colours[label] = colour
    return colours
