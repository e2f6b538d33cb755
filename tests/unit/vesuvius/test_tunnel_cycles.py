from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.vesuvius.betti_numbers import betti_numbers
from pipeline.vesuvius.merge_sweeps import cycle_squares
from pipeline.vesuvius.relative_cycles import cycles_into_mask
from pipeline.vesuvius.tunnel_cycles import Columns, closing_squares, cycles_leaving

Mask = NDArray[np.bool_]
ENOUGH = 10**9


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    shape = tuple(draw(st.integers(1, 12)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]))


def framed_cycles(mask: Mask) -> tuple[NDArray[np.uint8], Columns]:
    """Return the volume with bit 4 set in `mask`, framed, and all edges of its cycles."""
    cells = np.pad(np.where(mask, np.uint8(4), np.uint8(0)), 1)
    squares = cycle_squares(mask)
    closing, sums, done = closing_squares(mask, squares, ENOUGH)
    assert done
    return cells, cycles_leaving(mask, squares, closing, sums, cells)


@given(masks())
def test_one_square_closes_each_tunnel(mask: Mask) -> None:
    squares = cycle_squares(mask)
    assert (np.diff(squares) > 0).all()
    closing, _, done = closing_squares(mask, squares, ENOUGH)
    assert done
    assert closing.size == betti_numbers(mask).tunnels


@given(masks())
def test_a_cycle_lies_in_the_mask_and_has_no_end(mask: Mask) -> None:
    cells, cycles = framed_cycles(mask)
    strides = np.array([cells.shape[1] * cells.shape[2], cells.shape[2], 1])
    for first, last in zip(cycles.starts, cycles.starts[1:], strict=False):
        edges = cycles.rows[first:last]
        ends = np.concatenate([edges >> 2, (edges >> 2) + strides[edges & 3]])
        assert cells.ravel()[ends].all()
        assert len(edges) >= 4
        assert (np.unique(ends, return_counts=True)[1] % 2 == 0).all()


@given(masks())
def test_the_whole_volume_holds_every_cycle_and_an_empty_mask_none(mask: Mask) -> None:
    cells, cycles = framed_cycles(mask)
    for bit, expected in ((4, True), (1, False)):
        into_mask, done = cycles_into_mask(cells, bit, cycles, ENOUGH)
        assert done
        assert (into_mask == expected).all()


def test_the_work_stops_where_it_was_told_to() -> None:
    mask = np.random.default_rng(0).random((16, 16, 16)) < 0.5
    squares = cycle_squares(mask)
    assert not closing_squares(mask, squares, 100)[2]
    cells, cycles = framed_cycles(mask)
    assert not cycles_into_mask(cells, 1, cycles, 100)[1]
