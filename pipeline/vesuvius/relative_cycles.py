"""Which cycles of a volume are, together with earlier ones, cycles of a mask inside it.

A cycle of the volume can be moved into the mask, by earlier cycles and squares of the volume, if
its part outside the mask depends on theirs modulo the squares outside. That is a reduction over the
cells of the volume that are not in the mask, a small set where the two are alike.

Most columns are never built: the square that an edge cancels with is the smallest one above it, if
the edge is the largest one of that square outside the mask; both are read off the volume. Cells are
named as in `merge_sweeps`, but voxels are counted in a frame of zeros, so that every neighbour of a
foreground voxel exists.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.row_sets import RowSet, flip, highest, row_set, store
from pipeline.vesuvius.tunnel_cycles import Columns

__all__ = ["cycles_into_mask"]


class _Outside(NamedTuple):
    """The volume and the mask in it.

    Args:
        masks: framed volume, flat; bits of the masks that hold a voxel, 0 in the background.
        strides: distance of neighbours along each axis.
        mask: the bit of the mask.
    """

    masks: NDArray[np.uint8]
    strides: NDArray[np.int64]
    mask: int


class _Reduction(NamedTuple):
    """State of a reduction.

    Args:
        column: the column under reduction.
        pivots: by row, 1 + the stored column that has it as its highest.
        counts: stored columns, and rows flipped so far.
    """

    column: RowSet
    pivots: NDArray[np.int32]
    counts: NDArray[np.int64]


def cycles_into_mask(
    cells: NDArray[np.uint8], mask: int, cycles: Columns, max_flips: int
) -> tuple[NDArray[np.bool_], bool]:
    """Tell which cycles can be moved into a mask by earlier cycles and squares.

    Args:
        cells: `(D + 2, H + 2, W + 2)`, the volume in a frame of zeros; bits of the masks that hold
            a voxel, among them one of the volume itself.
        mask: the bit of the mask.
        cycles: edges `4 * voxel + type` of the cycles where they may leave the mask.
        max_flips: how many rows may be added to columns before the work is given up.

    Returns:
        A flag for each cycle, and whether the work was done.
    """
    strides = np.array([cells.shape[1] * cells.shape[2], cells.shape[2], 1])
    outside = _Outside(cells.ravel(), strides, mask)
    edges = cycles.rows[: cycles.starts[-1]]
    both = outside.masks[edges >> 2] & outside.masks[edges >> 2 + strides[edges & 3]]
    if (both & mask).all():
        return np.ones(cycles.starts.size - 1, np.bool_), True
    rows = 4 * cells.size
    reduction = _Reduction(row_set(rows), np.zeros(rows, np.int32), np.zeros(2, np.int64))
    into_mask = _dependent(outside, cycles, reduction, max_flips)
    return into_mask, bool(reduction.counts[1] <= max_flips)


@compiled
def _dependent(
    outside: _Outside, cycles: Columns, reduction: _Reduction, max_flips: int
) -> NDArray[np.bool_]:
    """Reduce the squares outside the mask, then the cycles; True for those that vanish."""
    masks, column = outside.masks, reduction.column
    dependent = np.zeros(cycles.starts.size - 1, np.bool_)
    stored = Columns(np.zeros(1024, np.int64), np.empty(1024, np.int32))
    for voxel in range(masks.size):
        if masks[voxel] == 0 or _is_deep_inside(outside, voxel):
            continue
        for kind in range(3):
            if _is_column(outside, voxel, kind):
                _flip_sides(outside, 4 * voxel + kind, column)
                stored = _reduce(outside, reduction, stored, max_flips)
    for number in range(dependent.size):
        for edge in cycles.rows[cycles.starts[number] : cycles.starts[number + 1]]:
            _flip_edge(outside, edge, column)
        before = reduction.counts[0]
        stored = _reduce(outside, reduction, stored, max_flips)
        dependent[number] = reduction.counts[0] == before
    return dependent


@compiled
def _reduce(outside: _Outside, reduction: _Reduction, stored: Columns, max_flips: int) -> Columns:
    """Reduce the column by all before it and store what remains."""
    column, pivots, counts = reduction
    pivot = highest(column)
    while pivot >= 0 and counts[1] <= max_flips:
        square = _smallest_square(outside, pivot)
        owner = pivots[pivot] - 1
        if square >= 0 and _largest_edge(outside, square) == pivot:
            _flip_sides(outside, square, column)
            counts[1] += 4
        elif owner >= 0:
            for row in stored.rows[stored.starts[owner] : stored.starts[owner + 1]]:
                flip(column, row)
            counts[1] += stored.starts[owner + 1] - stored.starts[owner]
        else:
            number = counts[0]
            counts[0] += 1
            pivots[pivot] = number + 1
            starts = stored.starts
            if number + 1 == starts.size:
                starts = np.empty(2 * number + 2, np.int64)
                for entry in range(number + 1):
                    starts[entry] = stored.starts[entry]
            rows, end = store(column, stored.rows, starts[number])
            starts[number + 1] = end
            return Columns(starts, rows)
        pivot = highest(column)
    return stored


@compiled
def _is_deep_inside(outside: _Outside, voxel: int) -> bool:
    """Tell whether all squares that start at a voxel lie in the mask: there no column begins."""
    masks, strides, mask = outside
    first, second = voxel + strides[0], voxel + strides[1]
    shared = masks[voxel] & masks[voxel + 1] & masks[second] & masks[second + 1]
    shared &= masks[first] & masks[first + 1] & masks[first + strides[1]]
    return bool(shared & mask)


@compiled
def _is_column(outside: _Outside, voxel: int, kind: int) -> bool:
    """Tell whether a square lies outside the mask and cancels with neither an edge nor a cube."""
    masks, strides, mask = outside
    lower, upper = _across(kind)
    one, two = strides[lower], strides[upper]
    near, far = masks[voxel + one], masks[voxel + two]
    if near == 0 or far == 0:
        return False
    across = masks[voxel + one + two]
    if across == 0 or masks[voxel] & near & far & across & mask:
        return False
    square = 4 * voxel + kind
    if _smallest_square(outside, _largest_edge(outside, square)) == square:
        return False
    return not _is_largest_of_its_cube(outside, voxel, kind)


@compiled
def _across(kind: int) -> tuple[int, int]:
    """Return the two axes other than `kind`, the lower one first."""
    return 1 if kind == 0 else 0, 1 if kind == 2 else 2


@compiled
def _has_face(masks: NDArray[np.uint8], voxel: int, one: int, two: int) -> int:
    """Return the bits that the four voxels of a square share: 0 if it is not in the volume."""
    return int(masks[voxel] & masks[voxel + one] & masks[voxel + two] & masks[voxel + one + two])


@compiled
def _is_largest_of_its_cube(outside: _Outside, voxel: int, kind: int) -> bool:
    """Tell whether a square is the largest one outside the mask of the smallest cube above it."""
    masks, strides, mask = outside
    lower, upper = _across(kind)
    one, two = strides[lower], strides[upper]
    if _has_face(masks, voxel - strides[kind], one, two):
        corner = voxel - strides[kind]
    elif _has_face(masks, voxel + strides[kind], one, two):
        corner = voxel
    else:
        return False
    # Descending: the far squares of type 0, 1, 2, then the near ones of type 2, 1, 0.
    for far in (1, 0):
        for step in range(3):
            normal = step if far else 2 - step
            lower, upper = _across(normal)
            place = corner + far * strides[normal]
            if not _has_face(masks, place, strides[lower], strides[upper]) & mask:
                return bool(place == voxel and normal == kind)
    return False


@compiled
def _smallest_square(outside: _Outside, edge: int) -> int:
    """Return the smallest square of the volume above an edge, or -1."""
    masks, strides, _ = outside
    voxel, kind = edge >> 2, edge & 3
    along = strides[kind]
    lower, upper = _across(kind)
    one, two = int(strides[lower]), int(strides[upper])
    if masks[voxel - one] and masks[voxel - one + along]:
        return 4 * (voxel - one) + upper
    if masks[voxel - two] and masks[voxel - two + along]:
        return 4 * (voxel - two) + lower
    if masks[voxel + two] and masks[voxel + two + along]:
        return 4 * voxel + lower
    if masks[voxel + one] and masks[voxel + one + along]:
        return 4 * voxel + upper
    return -1


@compiled
def _largest_edge(outside: _Outside, square: int) -> int:
    """Return the largest side outside the mask of a square that is not in the mask itself."""
    masks, strides, mask = outside
    voxel, kind = square >> 2, square & 3
    lower, upper = _across(kind)
    one, two = voxel + int(strides[lower]), voxel + int(strides[upper])
    across = masks[one + strides[upper]]
    if not masks[one] & across & mask:
        return 4 * one + upper
    if not masks[two] & across & mask:
        return 4 * two + lower
    if not masks[voxel] & masks[two] & mask:
        return 4 * voxel + upper
    return 4 * voxel + lower


@compiled
def _flip_sides(outside: _Outside, square: int, column: RowSet) -> None:
    """Flip the sides of a square."""
    voxel, kind = square >> 2, square & 3
    lower, upper = _across(kind)
    _flip_edge(outside, 4 * voxel + lower, column)
    _flip_edge(outside, 4 * voxel + upper, column)
    _flip_edge(outside, 4 * (voxel + outside.strides[upper]) + lower, column)
    _flip_edge(outside, 4 * (voxel + outside.strides[lower]) + upper, column)


@compiled
def _flip_edge(outside: _Outside, edge: int, column: RowSet) -> None:
    """Flip an edge unless it lies in the mask or cancels with a voxel: then it is no pivot."""
    masks, strides, mask = outside
    voxel, kind = edge >> 2, edge & 3
    far = voxel + strides[kind]
    if masks[voxel] & masks[far] & mask:
        return
    end = voxel if masks[far] & mask else far
    for axis in range(3):  # the smallest edge at that end decides
        if masks[end - strides[axis]]:
            if edge != 4 * (end - strides[axis]) + axis:
                flip(column, edge)
            return
    for axis in range(3):
        if masks[end + strides[axis]]:
            if edge != 4 * end + axis:
                flip(column, edge)
            return
