from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import dense_patch_slices
from monai.inferers.utils import _get_scan_interval

from pipeline.errors import ConfigurationError
from pipeline.inference.windows import make_grid

axes = st.integers(1, 3)
fractions = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.625, 0.8, 0.9])


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An image and a window that fits into it."""
    dimensions = draw(axes)
    roi = tuple(draw(st.integers(1, 24)) for _ in range(dimensions))
    return tuple(r + draw(st.integers(0, 40)) for r in roi), roi


@given(grids(), fractions)
def test_windows_stand_where_monai_puts_them(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], overlap: float
) -> None:
    size, roi = shapes
    interval = _get_scan_interval(size, roi, len(roi), [overlap] * len(roi))
    expected = [tuple(s.start for s in box) for box in dense_patch_slices(size, roi, interval)]
    grid = make_grid(size, roi, overlap)
    assert [start for z in grid.starts[0] for start in grid.row(z)] == expected


@given(grids(), fractions, st.booleans())
def test_every_voxel_is_covered_and_no_window_leaves_the_image(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], overlap: float, even: bool
) -> None:
    size, roi = shapes
    grid = make_grid(size, roi, overlap, even=even)
    for n, p, starts in zip(size, roi, grid.starts, strict=True):
        assert starts[0] == 0
        assert starts[-1] == n - p
        assert all(b - a <= p for a, b in itertools.pairwise(starts))


@given(grids(), fractions)
def test_even_spacing_takes_as_many_windows(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], overlap: float
) -> None:
    size, roi = shapes
    assert make_grid(size, roi, overlap, even=True).count == make_grid(size, roi, overlap).count


@given(st.integers(64, 400), st.integers(0, 63))
def test_even_spacing_never_overlaps_less_than_asked(size: int, overlap: int) -> None:
    (starts,) = make_grid((size,), (64,), overlap, even=True).starts
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert max(steps, default=0) <= max(64 - overlap, 1)
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_overlap_in_voxels_is_the_stride_that_it_leaves() -> None:
    assert make_grid((100, 100), (32, 40), (8, 0.5)).starts == ((0, 24, 48, 68), (0, 20, 40, 60))


@given(grids(), fractions, st.data())
def test_windows_touching_a_box_are_those_that_share_a_voxel_with_it(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], overlap: float, data: st.DataObject
) -> None:
    size, roi = shapes
    low = [data.draw(st.integers(0, n - 1)) for n in size]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, size, strict=True)]
    grid = make_grid(size, roi, overlap)
    expected = [
        start
        for z in grid.starts[0]
        for start in grid.row(z)
        if all(s < b and s + p > a for s, p, a, b in zip(start, roi, low, high, strict=True))
    ]
    found = grid.touching(low, high)
    assert [start for z in found.starts[0] for start in found.row(z)] == expected


@pytest.mark.parametrize("overlap", [1.0, -0.1, 64, -1, (0.5, 0.5), 1.5])
def test_impossible_overlap_is_refused_with_what_to_write(overlap: Any) -> None:
    with pytest.raises(ConfigurationError, match="overlap"):
        make_grid((100,), (64,), overlap)
