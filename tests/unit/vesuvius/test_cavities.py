from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.betti_numbers import betti_numbers
from pipeline.vesuvius.cavities import fill_cavities


@pytest.mark.parametrize(("connectivity", "order"), [(6, 1), (26, 3)])
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]))
def test_cavities_are_filled_as_by_scipy(
    connectivity: Literal[6, 26], order: int, seed: int, density: float
) -> None:
    mask = np.random.default_rng(seed).random((9, 10, 11)) < density
    structure = ndimage.generate_binary_structure(3, order)
    expected = ndimage.binary_fill_holes(mask, structure)
    result = fill_cavities(mask, connectivity=connectivity)
    np.testing.assert_array_equal(result, expected)
    assert betti_numbers(result).cavities == 0


def test_a_cavity_over_the_limit_stays() -> None:
    mask = np.ones((9, 9, 9), np.bool_)
    mask[2, 2, 2] = mask[5:7, 5:7, 5:7] = False
    result = fill_cavities(mask, max_hole_size=7)
    assert result[2, 2, 2]
    assert not result[5:7, 5:7, 5:7].any()
    assert fill_cavities(mask, max_hole_size=8).all()


def test_a_pocket_open_through_a_corner_is_filled_on_request_only() -> None:
    mask = np.ones((5, 5, 5), np.bool_)
    mask[2, 2, 2] = mask[1, 1, 1] = mask[0, 0, 0] = False
    assert not fill_cavities(mask)[2, 2, 2]
    assert fill_cavities(mask, connectivity=6)[2, 2, 2]


def test_settings_of_no_use_are_refused() -> None:
    mask = np.ones((4, 4, 4), np.bool_)
    with pytest.raises(ConfigurationError, match="connectivity must be 6 or 26, got 18"):
        fill_cavities(mask, connectivity=18)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_hole_size"):
        fill_cavities(mask, -1)
