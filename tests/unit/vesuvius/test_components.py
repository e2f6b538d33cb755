from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.components import (
    component_sizes,
    hysteresis,
    remove_small_components,
    zero_frame,
)

seeds = st.integers(0, 2**32 - 1)
densities = st.sampled_from([0.0, 0.05, 0.15, 0.5, 1.0])
ALL = np.ones((3, 3, 3))


@given(seeds, densities, st.integers(0, 9))
def test_small_components_go_as_by_scipy(seed: int, density: float, size: int) -> None:
    mask = np.random.default_rng(seed).random((9, 10, 11)) < density
    labels, _ = ndimage.label(mask, ALL)
    expected = mask & (np.bincount(labels.ravel()) >= size)[labels]
    result = remove_small_components(mask, size)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(remove_small_components(result, size), result)


def test_the_least_size_scales_with_the_volume() -> None:
    mask = np.zeros((20, 20, 20), np.bool_)
    mask[5, 5, 5:10] = True
    assert remove_small_components(mask, 40, reference_voxels=40**3).any()  # 40 / 8 = 5 voxels
    assert not remove_small_components(mask, 41, reference_voxels=40**3).any()


def test_sizes_count_every_voxel() -> None:
    labels = np.array([[[0, 0, 1, 1, 2, 0, 2]]], np.int32)
    np.testing.assert_array_equal(component_sizes(labels, 3), [3, 2, 2, 0])


@given(seeds)
def test_hysteresis_keeps_what_holds_a_high_voxel(seed: int) -> None:
    probability = np.random.default_rng(seed).random((8, 9, 10)).astype(np.float32)
    labels, _ = ndimage.label(probability >= 0.8, ALL)
    high = np.unique(labels[probability >= 0.95])
    expected = (labels > 0) & np.isin(labels, high)
    np.testing.assert_array_equal(hysteresis(probability, 0.8, 0.95), expected)


@given(seeds)
def test_hysteresis_along_z_equals_growth_along_z(seed: int) -> None:
    probability = np.random.default_rng(seed).random((12, 5, 6)).astype(np.float32)
    column = np.zeros((3, 3, 3), np.bool_)
    column[:, 1, 1] = True
    expected = ndimage.binary_propagation(
        probability >= 0.8, structure=column, mask=probability >= 0.4
    )
    np.testing.assert_array_equal(hysteresis(probability, 0.4, 0.8, z_only=True), expected)


@pytest.mark.parametrize("frame", [0, 3, 4, 9])
def test_the_frame_is_cleared_and_nothing_else(frame: int) -> None:
    result = zero_frame(np.ones((8, 9, 10), np.bool_), frame)
    inside = [max(side - 2 * frame, 0) for side in result.shape]
    assert result.sum() == np.prod(inside)
    np.testing.assert_array_equal(zero_frame(result, frame), result)


def test_settings_of_no_use_are_refused() -> None:
    mask = np.ones((4, 4, 4), np.bool_)
    with pytest.raises(ConfigurationError, match="min_component_size"):
        remove_small_components(mask, -1)
    with pytest.raises(ConfigurationError, match="reference_voxels"):
        remove_small_components(mask, 1, 0)
    with pytest.raises(ConfigurationError, match=r"low 0\.8 and high 0\.3"):
        hysteresis(mask.astype(np.float32), 0.8, 0.3)
    with pytest.raises(ConfigurationError, match="frame"):
        zero_frame(mask, -1)
