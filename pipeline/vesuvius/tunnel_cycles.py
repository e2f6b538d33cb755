"""The squares that close the tunnels of a volume, and for each a cycle around its tunnel.

Background squares are added to the foreground in raster order. One that neither joins background
(`cycle_squares` finds those that do not) nor closes a loop of background edges closes a tunnel.
Cells are named as in `merge_sweeps`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled
from pipeline.vesuvius.row_sets import RowSet, flip, highest, row_set, store, with_room

__all__ = ["Columns", "closing_squares", "cycles_leaving"]


class Columns(NamedTuple):
    """Sparse columns: column `i` holds `rows[starts[i]:starts[i + 1]]`."""

    starts: NDArray[np.int64]
    rows: NDArray[np.int32]


def closing_squares(
    union: NDArray[np.bool_], squares: NDArray[np.int64], max_flips: int
) -> tuple[NDArray[np.int64], Columns, bool]:
    """Find the squares that close a tunnel.

    Args:
        union: foreground `(D, H, W)`, contiguous.
        squares: what `cycle_squares` gives for it.
        max_flips: how many rows may be added to columns before the work is given up.

    Returns:
        Places in `squares`, ascending; for every square the places of those added to its column;
        whether the work was done.
    """
    # Edges that can be a pivot: of type 0 one per voxel, and all three of the first plane.
    edges = union.size + 2 * union[0].size
    pivots = np.zeros(edges, np.int32)  # from NumPy: memory is taken as it is touched
    closing, sums, flips = _reduced(union, squares, pivots, row_set(edges), max_flips)
    return closing, sums, flips <= max_flips


def cycles_leaving(
    union: NDArray[np.bool_],
    squares: NDArray[np.int64],
    closing: NDArray[np.int64],
    sums: Columns,
    cells: NDArray[np.uint8],
) -> Columns:
    """Return the parts of the cycles around the tunnels that are not in both masks.

    Args:
        union: foreground `(D, H, W)`, contiguous.
        squares: what `cycle_squares` gives for it.
        closing: what `closing_squares` gives.
        sums: likewise.
        cells: `(D + 2, H + 2, W + 2)`, the volume in a frame of zeros; 7 where both masks are.

    Returns:
        For each closing square edges `4 * voxel + type`, voxels counted in `cells`.
    """
    columns, edges = row_set(squares.size), row_set(3 * union.size)
    return _collected(union, squares, closing, sums, cells, columns, edges)


@compiled
def _reduced(
    union: NDArray[np.bool_],
    squares: NDArray[np.int64],
    pivots: NDArray[np.int32],
    column: RowSet,
    max_flips: int,
) -> tuple[NDArray[np.int64], Columns, int]:
    """Reduce the columns of `squares` one by one; return also the number of flips needed."""
    starts = np.zeros(squares.size + 1, np.int64)
    rows = np.empty(1024, np.int32)
    sum_starts = np.zeros(squares.size + 1, np.int64)
    sums = np.empty(1024, np.int32)
    closing = np.empty(squares.size, np.int64)
    found, flips = 0, 0
    for number in range(squares.size):
        end, sum_end = starts[number], sum_starts[number]
        _flow(union, squares[number], False, column)
        while flips <= max_flips:
            pivot = highest(column)
            if pivot < 0:
                closing[found] = number
                found += 1
                break
            owner = pivots[pivot] - 1
            if owner < 0:
                pivots[pivot] = number + 1
                rows, end = store(column, rows, end)
                break
            for row in rows[starts[owner] : starts[owner + 1]]:
                flip(column, row)
            flips += starts[owner + 1] - starts[owner]
            sums = with_room(sums, sum_end)
            sums[sum_end] = owner
            sum_end += 1
        starts[number + 1], sum_starts[number + 1] = end, sum_end
    return closing[:found], Columns(sum_starts, sums), flips


@compiled
def _collected(
    union: NDArray[np.bool_],
    squares: NDArray[np.int64],
    closing: NDArray[np.int64],
    sums: Columns,
    cells: NDArray[np.uint8],
    pending: RowSet,
    cycle: RowSet,
) -> Columns:
    """Add up the flows of all squares that a closing square was reduced by, and its own."""
    height, width = union.shape[1:]
    strides = (cells.shape[1] * cells.shape[2], cells.shape[2], 1)
    masks = cells.ravel()
    starts = np.zeros(closing.size + 1, np.int64)
    rows = np.empty(1024, np.int32)
    end = 0
    for number in range(closing.size):
        square = closing[number]
        flip(pending, square)
        while square >= 0:  # the columns added to a column come before it
            flip(pending, square)
            _flow(union, squares[square], True, cycle)
            for summand in sums.rows[sums.starts[square] : sums.starts[square + 1]]:
                flip(pending, summand)
            square = highest(pending)
        edge = highest(cycle)
        while edge >= 0:
            flip(cycle, edge)
            voxel, kind = edge // 3, edge % 3
            x, y, z = voxel // (height * width), voxel // width % height, voxel % width
            framed = (x + 1) * strides[0] + (y + 1) * strides[1] + z + 1
            if masks[framed] & masks[framed + strides[kind]] != 7:
                rows = with_room(rows, end)
                rows[end] = 4 * framed + kind
                end += 1
            edge = highest(cycle)
        starts[number + 1] = end
    return Columns(starts, rows)


@compiled
def _flow(union: NDArray[np.bool_], square: int, cycle: bool, rows: RowSet) -> None:
    """Flip the edges that the boundary of a square flows down to.

    Along axis 0, and in the first plane along axis 1, a background edge is the upper side of a
    square that cancels it, so the other three sides take its place.

    Args:
        union: foreground `(D, H, W)`.
        square: `3 * voxel + type`.
        cycle: flip the foreground edges on the way, `3 * voxel + type`; else the background edges
            that nothing cancels, in a numbering that leaves no gaps and keeps their order.
        rows: where they are flipped.
    """
    height, width = union.shape[1:]
    voxel, kind = square // 3, square % 3
    x, y, z = voxel // (height * width), voxel // width % height, voxel % width
    if kind == 0:  # only in the first plane
        y += 1
        if cycle:
            flip(rows, 3 * (y * width + z) + 2)
    else:
        if cycle:
            flip(rows, 3 * (((x + 1) * height + y) * width + z) + 3 - kind)
        if _flow_along_first_axis(union, x, y, z, kind, cycle, rows):
            return
        if kind == 2:
            if not cycle and union[0, y + 1, z]:
                flip(rows, 3 * (y * width + z) + 1)
            return
    while y > 0:
        y -= 1
        for side in (z, z + 1):
            if union[0, y + 1, side] and union[0, y, side] == cycle:
                flip(rows, 3 * (y * width + side) + 1)
        if union[0, y, z] and union[0, y, z + 1]:
            if cycle:
                flip(rows, 3 * (y * width + z) + 2)
            return
    if not cycle and union[0, 0, z + 1]:
        flip(rows, 3 * z + 2)


@compiled
def _flow_along_first_axis(
    union: NDArray[np.bool_], x: int, y: int, z: int, kind: int, cycle: bool, rows: RowSet
) -> bool:
    """Flow down from the upper side of a square of type 1 or 2; False if it reached the end."""
    height, width = union.shape[1:]
    dy, dz = (1, 0) if kind == 2 else (0, 1)
    while x >= 0:
        for side_y, side_z in ((y, z), (y + dy, z + dz)):
            if union[x + 1, side_y, side_z] and union[x, side_y, side_z] == cycle:
                edge = (x * height + side_y) * width + side_z
                gap = 2 * height * width  # all three types in the first plane, one in the others
                flip(rows, 3 * edge if cycle or x == 0 else edge + gap)
        if union[x, y, z] and union[x, y + dy, z + dz]:
            if cycle:
                flip(rows, 3 * ((x * height + y) * width + z) + 3 - kind)
            return True
        x -= 1
    return False
