"""Features that a prediction and the truth have in common, as the competition counts them.

A volume is cut into two parts along each axis; in each of the blocks Betti matching tells which
components, tunnels and cavities of the one mask are those of the other. For binary masks the exact
counts follow from the order of the cells alone: components and cavities from a union-find over the
voxels, tunnels from a reduction of the few cells that do not cancel with a neighbour. The order is
that of the array's axes, which must therefore not be turned or padded before.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.vesuvius.betti_numbers import enclosed, euler_characteristic, label_components
from pipeline.vesuvius.merge_sweeps import cycle_squares, matched_merges
from pipeline.vesuvius.relative_cycles import cycles_into_mask
from pipeline.vesuvius.tunnel_cycles import closing_squares, cycles_leaving

__all__ = ["MAX_FLIPS", "FeatureCounts", "blocks_of", "count_features"]

MAX_FLIPS = 100_000_000
"""Effort per block for the tunnels: some seconds. Noise may need more, sheets a hundredth."""

_IN_FIRST, _IN_SECOND, _IN_UNION = 1, 2, 4  # bits of a voxel; `cycles_leaving` expects all 7


class FeatureCounts(NamedTuple):
    """How many features of one dimension there are.

    Args:
        matched: in both masks, the same ones; None where that was not computed.
        predicted: in the prediction.
        truth: in the truth.
    """

    matched: int | None
    predicted: int
    truth: int


def blocks_of(shape: tuple[int, int, int]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the blocks of a volume: two per axis, the first one longer if they differ."""
    sides = []
    for size in shape:
        half = (size + 1) // 2
        sides.append([slice(0, half), slice(half, size)] if size > 1 else [slice(0, size)])
    for depth, height, width in product(*sides):  # noqa: UP028 - `product` has no fixed length
        yield depth, height, width


def count_features(
    prediction: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    matching: bool = True,
    max_flips: int = MAX_FLIPS,
) -> tuple[FeatureCounts, FeatureCounts, FeatureCounts]:
    """Count components, tunnels and cavities in one block; the first component is left out.

    Args:
        prediction: foreground of the prediction `(D, H, W)`.
        truth: foreground of the truth, of the same shape.
        matching: count the matched features too.
        max_flips: effort for the tunnels, in additions of an edge to a column.

    Returns:
        The counts of dimension 0, 1 and 2.
    """
    first, second = _surveyed(prediction), _surveyed(truth)
    counts: list[FeatureCounts] = []
    matchers = (_matched_components, _matched_tunnels, _matched_cavities)
    for predicted, true, matcher in zip(first.features, second.features, matchers, strict=True):
        matched: int | None = None
        if not predicted or not true:
            matched = 0
        elif matching:
            matched = matcher(first, second, max_flips)
        counts.append(FeatureCounts(matched, predicted, true))
    return counts[0], counts[1], counts[2]


class _Survey(NamedTuple):
    """A mask and what is counted in it alone.

    Args:
        mask: foreground `(D, H, W)`, contiguous.
        features: components but the first, tunnels, cavities.
        background: 26-connected components of the background.
        cavity: by background label, whether it is a cavity.
    """

    mask: NDArray[np.bool_]
    features: tuple[int, int, int]
    background: NDArray[np.int32]
    cavity: NDArray[np.bool_]


def _surveyed(mask: NDArray[np.bool_]) -> _Survey:
    mask = np.ascontiguousarray(mask)
    background, pieces = label_components(~mask, 26)
    cavity = enclosed(background, pieces)
    components, cavities = label_components(mask, 6)[1], int(cavity.sum())
    tunnels = components + cavities - euler_characteristic(mask)
    return _Survey(mask, (max(components - 1, 0), tunnels, cavities), background, cavity)


def _matched_components(first: _Survey, second: _Survey, _: int) -> int:
    """Count the merges, in the union of the masks, of components that both masks are in."""
    labels, count = label_components(first.mask | second.mask, 6)
    held = np.zeros(count + 1, np.uint8)
    held[labels[first.mask]] = _IN_FIRST
    held[labels[second.mask]] |= _IN_SECOND
    if not (held == _IN_FIRST).any() or not (held == _IN_SECOND).any():
        # Nothing can become a component of both masks that is not one already.
        return max(int((held == _IN_FIRST | _IN_SECOND).sum()) - 1, 0)
    return int(matched_merges(labels, held))


def _matched_cavities(first: _Survey, second: _Survey, _: int) -> int:
    """Count the voxels that are the last one outside both masks of a cavity of each mask."""
    last = []
    for survey, other in ((first, second), (second, first)):
        labels = survey.background.ravel()
        voxels = np.flatnonzero(survey.cavity[labels] & ~other.mask.ravel())
        last_voxel = np.full(survey.cavity.size, -1)
        last_voxel[labels[voxels]] = voxels  # of several values for a place NumPy keeps the last
        last.append(last_voxel[last_voxel >= 0])
    return int(np.intersect1d(last[0], last[1], assume_unique=True).size)


def _matched_tunnels(first: _Survey, second: _Survey, max_flips: int) -> int | None:
    """Count the tunnels of the union whose squares enlarge the closed cycles of both masks."""
    union = first.mask | second.mask
    cells = np.zeros([side + 2 for side in union.shape], np.uint8)
    if 4 * cells.size >= 2**31:
        return None  # edges are numbered in 32 bits
    squares = cycle_squares(union)
    closing, sums, done = closing_squares(union, squares, max_flips)
    if not done:
        return None
    inner = cells[1:-1, 1:-1, 1:-1]
    inner |= first.mask.view(np.uint8) * np.uint8(_IN_FIRST)
    inner |= second.mask.view(np.uint8) * np.uint8(_IN_SECOND)
    inner |= union.view(np.uint8) * np.uint8(_IN_UNION)
    cycles = cycles_leaving(union, squares, closing, sums, cells)
    matched = np.ones(closing.size, np.bool_)
    for mask in (_IN_FIRST, _IN_SECOND):
        into_mask, done = cycles_into_mask(cells, mask, cycles, max_flips)
        if not done:
            return None
        matched &= into_mask
        if not matched.any():
            break
    return int(matched.sum())
