from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes, mesh_surface_area

from pipeline.vesuvius.surface_distance import area_of_blocks, surface_dice_of_masks

Mask = NDArray[np.bool_]


def corners(code: int) -> Mask:
    return np.array([code >> bit & 1 for bit in range(7, -1, -1)], np.bool_).reshape(2, 2, 2)


@pytest.mark.parametrize("code", [code for code in range(1, 256) if code.bit_count() <= 4])
def test_the_area_of_a_block_is_that_of_marching_cubes(code: int) -> None:
    vertices, faces, *_ = marching_cubes(corners(code).astype(np.float32), 0.5, method="lorensen")
    area = mesh_surface_area(vertices, faces)
    assert area_of_blocks()[code] == pytest.approx(area, abs=1e-6)


def test_foreground_and_background_have_the_same_surface() -> None:
    areas = area_of_blocks()
    np.testing.assert_array_equal(areas, areas[::-1])
    assert areas[0] == 0
    assert (areas[1:255] > 0).all()


def test_the_area_of_a_ball_is_near_that_of_a_sphere() -> None:
    grid = np.indices((45, 45, 45)) - 22
    ball = (grid**2).sum(axis=0) <= 20**2
    kernel = 1 << np.arange(8).reshape(2, 2, 2)
    codes = ndimage.convolve(ball.astype(np.int64), kernel, mode="constant")
    assert area_of_blocks()[codes].sum() == pytest.approx(4 * np.pi * 20**2, rel=0.1)


def by_distance_transform(prediction: Mask, truth: Mask, tolerance: float) -> float:
    """SurfaceDice from distances to the blocks with surface, all of them computed."""
    kernel = (1 << np.arange(8)[::-1]).reshape(2, 2, 2)
    codes = [
        ndimage.correlate(np.pad(mask, 1).astype(np.int64), kernel, mode="constant")
        for mask in (prediction, truth)
    ]
    surfaces = [(code > 0) & (code < 255) for code in codes]
    areas = [area_of_blocks()[code] for code in codes]
    within = [ndimage.distance_transform_edt(~surface) <= tolerance for surface in surfaces]
    found = areas[0][within[1]].sum() + areas[1][within[0]].sum()
    return float(found / (areas[0].sum() + areas[1].sum()))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Mask, Mask]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = tuple(draw(st.integers(1, 14)) for _ in range(3))
    density = draw(st.sampled_from([0.01, 0.1, 0.5, 0.9, 1.0]))
    masks = rng.random((2, *shape)) < density
    masks[:, 0, 0, 0] = True  # neither is empty
    return masks[0], masks[1]


@given(pairs(), st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 2.3, 3.0, 5.0]))
def test_surface_dice_equals_that_of_all_distances(
    masks: tuple[Mask, Mask], tolerance: float
) -> None:
    expected = by_distance_transform(*masks, tolerance)
    assert surface_dice_of_masks(*masks, tolerance) == pytest.approx(expected, abs=1e-12)


@given(pairs())
def test_the_order_of_the_masks_is_no_matter(masks: tuple[Mask, Mask]) -> None:
    first, second = masks
    assert surface_dice_of_masks(first, second, 2.0) == surface_dice_of_masks(second, first, 2.0)
    assert surface_dice_of_masks(first, first, 0.0) == 1.0


def test_voxels_two_apart_are_within_two_and_not_within_less() -> None:
    first, second = np.zeros((2, 3, 3, 5), np.bool_)
    first[1, 1, 1] = second[1, 1, 3] = True
    assert surface_dice_of_masks(first, second, 2.0) == 1.0
    # The half of a voxel's surface that faces the other one is one apart.
    assert surface_dice_of_masks(first, second, 1.9) == pytest.approx(0.5)


@pytest.mark.parametrize(("filled", "expected"), [((), 1.0), ((0,), 0.0), ((1,), 0.0)])
def test_an_empty_mask_agrees_with_an_empty_one_only(
    filled: tuple[int, ...], expected: float
) -> None:
    masks = np.zeros((2, 4, 4, 4), np.bool_)
    masks[list(filled), 1, 1, 1] = True
    assert surface_dice_of_masks(masks[0], masks[1], 2.0) == expected
