from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigurationError
from pipeline.inference.accumulation import Slab
from pipeline.inference.blending import WEIGHTS, Blending, Weights
from pipeline.inference.windows import Grid, make_grid


def boxes(grid: Grid) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    starts = [start for z in grid.starts[0] for start in grid.row(z)]
    return [(s, tuple(slice(a, a + p) for a, p in zip(s, grid.roi, strict=True))) for s in starts]


@pytest.mark.parametrize("weights", WEIGHTS)
@given(
    shape=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 12)), min_size=1, max_size=3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    even=st.booleans(),
)
def test_the_normaliser_is_the_sum_of_the_windows(
    weights: Weights, shape: list[tuple[int, int]], overlap: float, even: bool
) -> None:
    roi = [p for p, _ in shape]
    grid = make_grid([p + more for p, more in shape], roi, overlap, even=even)
    blending = Blending(grid, weights, dtype=torch.float64)
    total = torch.zeros(grid.size, dtype=torch.float64)
    for _, box in boxes(grid):
        total[box] += blending.window
    ones = total.clone()[None]
    blending.normalise(ones)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_weight_is_zero(weights: Weights) -> None:
    window = Blending(make_grid((128,) * 3, (128,) * 3), weights).window
    assert float(window.min()) >= 0.9e-6
    assert float(window.max()) <= 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_planes_are_normalised_alike_in_any_portions(weights: Weights) -> None:
    grid = make_grid((40, 20, 18), (12, 8, 8), 0.5)
    blending = Blending(grid, weights)
    whole = torch.rand((2, *grid.size), generator=torch.Generator().manual_seed(0))
    parts = [part.clone() for part in whole.split(7, dim=1)]
    blending.normalise(whole)
    for index, part in enumerate(parts):
        blending.normalise(part, 7 * index)
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=20)
@given(
    depth=st.integers(9, 40), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]), seed=st.integers(0, 9)
)
def test_a_moving_slab_gives_the_bits_of_the_whole(
    weights: Weights, depth: int, overlap: float, seed: int
) -> None:
    grid = make_grid((depth, 14, 10), (9, 8, 8), overlap)
    generator = torch.Generator().manual_seed(seed)
    predictions = {
        start: torch.randn((2, *grid.roi), generator=generator) for start, _ in boxes(grid)
    }
    whole = Slab(grid, weights)
    moving = Slab(grid, weights, depth=grid.roi[0])
    for start, prediction in predictions.items():
        whole.add(start, [prediction])
    parts = []
    for z, following in zip(grid.starts[0], [*grid.starts[0][1:], depth], strict=True):
        for start in grid.row(z):
            moving.add(start, [predictions[start]])
        parts += moving.take(following - z)
    assert torch.equal(torch.cat(parts, 1), whole.take(depth)[0])


def test_empty_windows_before_the_first_run_count_as_the_ones_behind_it() -> None:
    grid = make_grid((24, 8), (8, 8), 0.5)
    starts = [start for start, _ in boxes(grid)]
    first, last = Slab(grid, "gaussian", empty_value=-3.0), Slab(grid, "gaussian", empty_value=-3.0)
    prediction = torch.ones((1, 8, 8))
    for start in starts:
        first.add(start, None if start == starts[0] else [prediction])
        last.add(start, None if start == starts[-1] else [prediction])
    (a,), (b,) = first.take(24), last.take(24)
    torch.testing.assert_close(a.flip(1), b, rtol=0, atol=1e-6)
    assert float(a[0, 0, 0]) == pytest.approx(-3.0)


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="gaussian, separable, constant"):
        Blending(make_grid((8,), (8,)), "hann")  # type: ignore[arg-type]
