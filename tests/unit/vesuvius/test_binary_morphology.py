from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.binary_morphology import close, dilate, erode, open_, radii_of

masks = st.builds(
    lambda seed, shape, density: np.random.default_rng(seed).random(shape) < density,
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 7, 63, 64, 65, 130])),
    st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
)


def ball(radius: int) -> NDArray[np.bool_]:
    z, y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1, -radius : radius + 1]
    return np.asarray(z**2 + y**2 + x**2 <= radius**2)


@given(masks, st.integers(0, 3))
def test_dilation_and_erosion_equal_those_of_scipy(mask: NDArray[np.bool_], radius: int) -> None:
    grown = ndimage.binary_dilation(mask, ball(radius))
    worn = ndimage.binary_erosion(mask, ball(radius), border_value=1)
    np.testing.assert_array_equal(dilate(mask, radius), grown)
    np.testing.assert_array_equal(erode(mask, radius), worn)


@given(masks, st.integers(1, 3))
def test_closing_is_that_of_an_infinite_volume(mask: NDArray[np.bool_], radius: int) -> None:
    inside = tuple(slice(radius, radius + side) for side in mask.shape)
    expected = ndimage.binary_closing(np.pad(mask, radius), ball(radius))[inside]
    np.testing.assert_array_equal(close(mask, radius), expected)


@given(masks)
def test_opening_and_closing_are_idempotent_and_bound_the_mask(mask: NDArray[np.bool_]) -> None:
    opened, closed = open_(mask, 2), close(mask, 2)
    assert not (opened & ~mask).any()
    assert not (mask & ~closed).any()
    np.testing.assert_array_equal(open_(opened, 2), opened)
    np.testing.assert_array_equal(close(closed, 2), closed)


def test_a_radius_of_each_axis_makes_an_ellipsoid() -> None:
    mask = np.zeros((9, 9, 9), np.bool_)
    mask[4, 4, 4] = True
    grown = dilate(mask, (2, 1, 0))
    assert grown.sum() == 5 + 2
    assert grown[2, 4, 4]
    assert grown[4, 5, 4]
    assert not grown[4, 4, 5]


def test_a_radius_of_no_use_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="radius must be one number"):
        radii_of((1, 2))
    with pytest.raises(ConfigurationError, match="got -1"):
        radii_of(-1)
