"""Sparse columns over GF(2) for the reduction of boundary matrices.

A column under reduction is a set of row numbers. It is held as one bit per possible row with an
index over the bits, so that adding a row twice cancels it at once and the highest row is found in a
few steps, however long the column has grown. A set is emptied by reading it, and can be used again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled

__all__ = ["RowSet", "flip", "highest", "row_set", "store", "with_room"]

_ONE = np.uint64(1)


class RowSet(NamedTuple):
    """A set of numbers.

    Args:
        words: 64 bits each; first those of the numbers themselves, then one bit for each word
            before that is not empty, and so on up to a single word.
        starts: the first word of each level.
    """

    words: NDArray[np.uint64]
    starts: NDArray[np.int64]


def row_set(capacity: int) -> RowSet:
    """Return an empty set for numbers below `capacity`."""
    starts: list[int] = []
    words, size = 0, max(capacity, 1)
    while size > 1 or not starts:
        size = (size + 63) // 64
        starts.append(words)
        words += size
    return RowSet(np.zeros(words, np.uint64), np.array(starts, np.int64))


@compiled
def flip(rows: RowSet, row: int) -> None:
    """Add `row`, or take it out if it is there."""
    for start in rows.starts:
        place = start + (row >> 6)
        before = rows.words[place]
        after = before ^ (_ONE << np.uint64(row & 63))
        rows.words[place] = after
        if before != 0 and after != 0:  # the word was not empty and is not: no level above changes
            return
        row >>= 6


@compiled
def highest(rows: RowSet) -> int:
    """Return the largest number in the set, or -1 if it is empty."""
    place = 0
    for level in range(rows.starts.size - 1, -1, -1):
        word = rows.words[rows.starts[level] + place]
        if word == 0:
            return -1
        bit = 0
        for shift in (32, 16, 8, 4, 2, 1):
            if word >> np.uint64(shift):
                word >>= np.uint64(shift)
                bit += shift
        place = place << 6 | bit
    return place


@compiled
def store(rows: RowSet, stored: NDArray[np.int32], end: int) -> tuple[NDArray[np.int32], int]:
    """Empty the set into `stored` from `end` on; return it, longer if need be, and its new end."""
    row = highest(rows)
    while row >= 0:
        flip(rows, row)
        stored = with_room(stored, end)
        stored[end] = row
        end += 1
        row = highest(rows)
    return stored, end


@compiled
def with_room(stored: NDArray[np.int32], place: int) -> NDArray[np.int32]:
    """Return `stored`, or a copy twice as long if it has no entry `place`."""
    if place < stored.size:
        return stored
    longer = np.empty(2 * stored.size, np.int32)
    for entry in range(stored.size):  # compiles in a tenth of the time of a slice
        longer[entry] = stored[entry]
    return longer
