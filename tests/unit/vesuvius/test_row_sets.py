from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.vesuvius.row_sets import flip, highest, row_set, store


@pytest.mark.parametrize("capacity", [1, 64, 65, 4096, 300_000])
@given(data=st.data())
def test_a_row_added_twice_is_gone_and_the_highest_is_found(
    capacity: int, data: st.DataObject
) -> None:
    rows = row_set(capacity)
    expected: set[int] = set()
    for row in data.draw(st.lists(st.integers(0, capacity - 1), max_size=40)):
        flip(rows, row)
        expected ^= {row}
        assert highest(rows) == max(expected, default=-1)


@given(st.sets(st.integers(0, 999)))
def test_storing_empties_the_set_from_the_highest_row_down(values: set[int]) -> None:
    rows = row_set(1000)
    for value in values:
        flip(rows, value)
    stored, end = store(rows, np.full(4, -1, np.int32), 2)
    assert list(stored[2:end]) == sorted(values, reverse=True)
    assert list(stored[:2]) == [-1, -1]
    assert not rows.words.any()
