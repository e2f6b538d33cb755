from __future__ import annotations

from itertools import combinations, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.vesuvius.betti_numbers import betti_numbers, label_components
from pipeline.vesuvius.plug import plug_diagonals, smallest_additions

Mask = NDArray[np.bool_]
CORNERS = list(product((0, 1), repeat=3))


def one_piece(window: NDArray[np.generic]) -> bool:
    return int(ndimage.label(window)[1]) <= 1


def plugged_slowly(mask: Mask, probability: NDArray[np.float32]) -> Mask:
    """The twin: every window in raster order, every addition tried, labels looked up anew."""
    labels = np.pad(label_components(mask, 26)[0], 1)
    weight = np.pad(probability, 1)
    changed = True
    while changed:
        changed = False
        for z, y, x in np.ndindex(*[side - 1 for side in mask.shape]):
            at = np.array((z + 1, y + 1, x + 1))
            window = labels[tuple(slice(i, i + 2) for i in at)]
            if one_piece(window):
                continue
            best = best_addition(labels, weight, at, window)
            for corner in best:
                labels[tuple(at + corner)] = window.max()
            changed |= bool(best)
    return np.asarray(labels[1:-1, 1:-1, 1:-1] != 0)


def best_addition(
    labels: NDArray[np.int32],
    weight: NDArray[np.float32],
    at: NDArray[np.int64],
    window: NDArray[np.int32],
) -> tuple[tuple[int, int, int], ...]:
    free = [corner for corner in CORNERS if not window[corner]]
    for size in range(1, 9):
        found = []
        for added in combinations(free, size):
            filled = window.copy()
            filled[tuple(np.transpose(added))] = 1
            if one_piece(filled):
                found.append(added)
        if found:
            break
    allowed = [
        added
        for added in found
        if all(
            set(labels[tuple(slice(i - 1, i + 2) for i in at + np.array(corner))].ravel())
            <= {0, window.max()}
            for corner in added
        )
    ]
    sums = [sum(np.float64(weight[tuple(at + np.array(c))]) for c in added) for added in allowed]
    return allowed[int(np.argmax(sums))] if allowed else ()


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.15, 0.3, 0.6]))
def test_plugging_equals_its_slow_twin(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 7, 8)) < density
    probability = rng.integers(0, 64, mask.shape).astype(np.float32) / 64  # sums are exact
    np.testing.assert_array_equal(
        plug_diagonals(mask, probability), plugged_slowly(mask, probability)
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.05, 0.2, 1.0]))
def test_plugging_is_idempotent_and_merges_no_sheets(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((10, 11, 12)) < density
    result = plug_diagonals(mask)
    assert not (mask & ~result).any()
    assert label_components(result, 26)[1] == label_components(mask, 26)[1]
    np.testing.assert_array_equal(plug_diagonals(result), result)


def test_88_windows_need_one_voxel_or_two() -> None:
    additions = [smallest_additions(window) for window in range(256)]
    assert sum(map(bool, additions)) == 88
    assert {some[0].bit_count() for some in additions if some} == {1, 2}
    for corner in range(4):  # a body diagonal takes two voxels, by one of six ways
        ways = additions[1 << corner | 1 << 7 - corner]
        assert len(ways) == 6
        assert all(way.bit_count() == 2 for way in ways)


def test_a_staircase_becomes_one_piece_on_its_more_probable_side() -> None:
    steps = np.arange(64)
    stairs = np.zeros((64, 64, 64), np.bool_)
    stairs[steps, :, steps] = True
    probability = np.zeros(stairs.shape, np.float32)
    probability[steps[1:], :, steps[:-1]] = 0.5
    assert betti_numbers(stairs).components == 64
    result = plug_diagonals(stairs, probability)
    assert betti_numbers(result) == (1, 0, 0)
    expected = stairs | (probability > 0)
    expected[:, -1] = stairs[:, -1]  # in the last window the row before joins all
    np.testing.assert_array_equal(result, expected)
