"""Close wide holes of sheets by interpolating the sheet as a height map.

In a small block a sheet is a surface over the plane that shows most of it: each column has a height
(the middle of the sheet) and a thickness. Where a hole shows as a gap in the projection, both are
interpolated along rows and columns, by the inverse of the distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.betti_numbers import label_components
from pipeline.vesuvius.patches import PatchLimits, fill_tunnels_with

__all__ = ["interpolate_gaps"]


def interpolate_gaps(
    mask: NDArray[np.bool_],
    probability: NDArray[np.float32] | None = None,
    max_patch: int = 64,
    block: int = 32,
    max_bend: float = 0.9,
    min_probability: float = 0.0,
) -> NDArray[np.bool_]:
    """Close holes of the 26-connected sheets of `mask` `(D, H, W)` by height maps.

    A patch is taken if it lowers the number of tunnels, joins no two 26-connected components,
    encloses no background and lies in the sheet. Columns in which a sheet folds over itself are not
    interpolated from. Not exactly idempotent: a filled hole may show the next.

    Args:
        mask: the mask.
        probability: `(D, H, W)`; a hint where within the interpolated thickness the sheet runs.
        max_patch: the most pixels of a gap.
        block: side of the blocks in voxels; they overlap by half, so that a gap up to half of it is
            seen whole.
        max_bend: see `patches.PatchLimits`.
        min_probability: of every voxel that is filled; a gap with less in it is a tear.

    Raises:
        ConfigurationError: `block` is below 8.
    """
    if block < 8:
        raise ConfigurationError(f"block must be 8 or more voxels, got {block!r}")
    labels = label_components(mask, 26)[0]
    owner, body = _interpolated(labels, block, max_patch)
    padded = np.pad(labels, 1)
    candidates = (owner != 0) & ~mask
    if probability is not None:
        candidates &= probability >= min_probability
    group_of = np.arange(int(labels.max(initial=0)) + 1, dtype=np.int32)
    limits = PatchLimits(2 * max_patch, max_bend)  # a slanted gap has more voxels than pixels
    fill_tunnels_with(padded, candidates, owner[candidates], group_of, probability, limits, body)
    return np.asarray(padded[1:-1, 1:-1, 1:-1] != 0)


@compiled
def _interpolated(
    labels: NDArray[np.int32], block: int, max_patch: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return where sheets would go on across gaps of their projections, and a voxel beyond.

    Returns:
        The label of the sheet one voxel thicker on both sides, or 0; whether it is in the sheet
        itself.
    """
    shape = labels.shape
    result = np.zeros(shape, np.int32)
    body = np.zeros(shape, np.bool_)
    step = max(block // 2, 1)
    for z in range(0, max(shape[0] - step, 1), step):
        for y in range(0, max(shape[1] - step, 1), step):
            for x in range(0, max(shape[2] - step, 1), step):
                at = slice(z, z + block), slice(y, y + block), slice(x, x + block)
                window, into, inner = labels[at], result[at], body[at]
                found, boxes = _labels_in(window)
                for entry in range(found.size):
                    low, high = boxes[entry, 0], boxes[entry, 1]
                    box = slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])
                    _interpolate_sheet(window[box], into[box], inner[box], found[entry], max_patch)
    return result, body


@compiled
def _labels_in(window: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return up to 64 labels of `window`, and their boxes `(labels, 2, 3)` with a voxel around."""
    found = np.zeros(64, np.int32)
    boxes = np.zeros((64, 2, 3), np.int64)
    count, entry = 0, 0
    for z in range(window.shape[0]):
        for y in range(window.shape[1]):
            for x in range(window.shape[2]):
                label = window[z, y, x]
                if label == 0:
                    continue
                if count == 0 or found[entry] != label:
                    entry = 0
                    while entry < count and found[entry] != label:
                        entry += 1
                    if entry == found.size:
                        entry = 0
                        continue
                    if entry == count:
                        count += 1
                        found[entry] = label
                        boxes[entry, 0] = window.shape
                at = (z, y, x)
                for axis in range(3):
                    boxes[entry, 0, axis] = min(boxes[entry, 0, axis], max(at[axis] - 1, 0))
                    boxes[entry, 1, axis] = max(boxes[entry, 1, axis], at[axis] + 2)
    return found[:count], boxes[:count]


@compiled
def _interpolate_sheet(
    window: NDArray[np.int32],
    into: NDArray[np.int32],
    inner: NDArray[np.bool_],
    label: int,
    max_patch: int,
) -> None:
    """Write `label` into the gaps of one sheet, seen along the axis that shows most of it."""
    depth, height_, width = window.shape
    shadows = (
        np.zeros((height_, width), np.uint8),
        np.zeros((depth, width), np.uint8),
        np.zeros((depth, height_), np.uint8),
    )
    for z in range(depth):
        for y in range(height_):
            for x in range(width):
                if window[z, y, x] == label:
                    shadows[0][y, x] = shadows[1][z, x] = shadows[2][z, y] = 1
    best_axis, most = 0, -1
    for axis in range(3):
        seen = shadows[axis].sum()
        if seen > most:
            best_axis, most = axis, seen
    if not _mark_gaps(shadows[best_axis], max_patch):
        return
    view, target = _turned(window, best_axis), _turned(into, best_axis)
    body = _turned(inner, best_axis)
    height, thickness, kind = _height_map(view, label)
    _mark_gaps(kind, max_patch)
    rows, columns = kind.shape
    for row in range(rows):
        for column in range(columns):
            if kind[row, column] != 3:
                continue
            middle, extent, weight = 0.0, 0.0, 0.0
            for d_row, d_column in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                distance = 1
                at_row, at_column = row + d_row, column + d_column
                while 0 <= at_row < rows and 0 <= at_column < columns:
                    if kind[at_row, at_column] == 1:
                        middle += height[at_row, at_column] / distance
                        extent += thickness[at_row, at_column] / distance
                        weight += 1.0 / distance
                        break
                    at_row += d_row
                    at_column += d_column
                    distance += 1
            if weight == 0:
                continue
            middle /= weight
            half = (extent / weight - 1) / 2
            low, high = int(np.floor(middle - half + 0.5)), int(np.floor(middle + half + 0.5))
            for depth in range(max(low - 1, 0), min(high + 2, view.shape[0])):
                if view[depth, row, column] == 0:
                    target[depth, row, column] = label
                    body[depth, row, column] |= low <= depth <= high


@compiled
def _turned(volume: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a view of `volume` with `axis` first."""
    if axis == 0:
        return volume.transpose((0, 1, 2))
    if axis == 1:
        return volume.transpose((1, 0, 2))
    return volume.transpose((2, 0, 1))


@compiled
def _height_map(
    view: NDArray[np.int32], label: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint8]]:
    """Return height, thickness and kind of each column: 0 empty, 1 one run, 2 several runs."""
    depth, rows, columns = view.shape
    height = np.zeros((rows, columns))
    thickness = np.zeros((rows, columns))
    kind = np.zeros((rows, columns), np.uint8)
    last = np.full((rows, columns), -2, np.int64)
    for z in range(depth):
        for row in range(rows):
            for column in range(columns):
                if view[z, row, column] != label:
                    continue
                height[row, column] += z
                thickness[row, column] += 1
                if kind[row, column] == 0:
                    kind[row, column] = 1
                elif last[row, column] != z - 1:
                    kind[row, column] = 2
                last[row, column] = z
    for row in range(rows):
        for column in range(columns):
            if thickness[row, column] > 0:
                height[row, column] /= thickness[row, column]
    return height, thickness, kind


@compiled
def _mark_gaps(kind: NDArray[np.uint8], max_patch: int) -> bool:
    """Turn empty columns, in small gaps that do not reach the border, from 0 to 3; any?"""
    any_gap = False
    rows, columns = kind.shape
    seen = np.zeros((rows, columns), np.bool_)
    stack = np.zeros((rows * columns, 2), np.int64)
    for row in range(rows):
        for column in range(columns):
            if seen[row, column] or kind[row, column] != 0:
                continue
            stack[0, 0], stack[0, 1] = row, column
            seen[row, column] = True
            done, end, open_ = 0, 1, False
            while done < end:
                at_row, at_column = stack[done, 0], stack[done, 1]
                done += 1
                if at_row in (0, rows - 1) or at_column in (0, columns - 1):
                    open_ = True
                for d_row, d_column in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                    to_row, to_column = at_row + d_row, at_column + d_column
                    if not (0 <= to_row < rows and 0 <= to_column < columns):
                        continue
                    if seen[to_row, to_column] or kind[to_row, to_column] != 0:
                        continue
                    seen[to_row, to_column] = True
                    stack[end, 0], stack[end, 1] = to_row, to_column
                    end += 1
            if not open_ and end <= max_patch:
                any_gap = True
                for entry in range(end):
                    kind[stack[entry, 0], stack[entry, 1]] = 3
    return any_gap
