from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage.metrics import variation_of_information

from pipeline.vesuvius.variation_of_information import voi_of_masks


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 14)] * 3),
    st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
)
def test_split_and_merge_equal_those_of_skimage(
    seed: int, shape: tuple[int, int, int], density: float
) -> None:
    prediction, truth = np.random.default_rng(seed).random((2, *shape)) < density
    either = prediction | truth
    labels = [ndimage.label(mask, np.ones((3, 3, 3)))[0][either] for mask in (truth, prediction)]
    expected = variation_of_information(*labels) if either.any() else (0, 0)
    assert voi_of_masks(prediction, truth) == pytest.approx(tuple(expected), abs=1e-9)


def test_a_bridge_merges_two_equal_sheets_at_the_price_of_one_bit() -> None:
    truth = np.zeros((9, 8, 8), np.bool_)
    truth[[1, 7]] = True
    bridged = truth.copy()
    bridged[2:7, 4, 4] = True
    split, merge = voi_of_masks(bridged, truth)
    assert merge == pytest.approx(1.0, abs=0.25)
    assert split == pytest.approx(0.0, abs=1e-12)
    assert voi_of_masks(truth, bridged) == pytest.approx((merge, split))


def test_all_misses_are_one_sheet() -> None:
    truth = np.zeros((9, 8, 8), np.bool_)
    truth[[1, 4]] = True
    found = truth.copy()
    found[4] = False
    assert voi_of_masks(found, truth) == pytest.approx((0.0, 0.0))
