from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.vesuvius.betti_numbers import label_components
from pipeline.vesuvius.binary_morphology import close
from pipeline.vesuvius.sheet_closing import close_sheets

SHEETS = np.zeros((32, 32, 32), np.bool_)
SHEETS[:, 10:12] = SHEETS[:, 15:17] = True  # three voxels apart


def test_sheets_three_voxels_apart_are_closed_and_stay_two() -> None:
    torn = SHEETS.copy()
    torn[10:12, 10:12, 10:12] = torn[20:22, 15:17, 20:22] = False
    np.testing.assert_array_equal(close_sheets(torn, 3.5), SHEETS)
    assert label_components(close(torn, 3), 26)[1] == 1


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.1, 1.0]))
def test_closing_merges_no_sheets_and_takes_nothing_away(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((12, 13, 14)) < density
    result = close_sheets(mask, 2)
    assert not (mask & ~result).any()
    assert label_components(result, 26)[1] == label_components(mask, 26)[1]


@given(st.integers(0, 2**32 - 1))
def test_a_single_sheet_is_closed_as_ever(seed: int) -> None:
    mask = np.random.default_rng(seed).random((10, 10, 10)) < 0.3
    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    alone = labels == 1
    np.testing.assert_array_equal(close_sheets(alone, 2), close(alone, 2))
