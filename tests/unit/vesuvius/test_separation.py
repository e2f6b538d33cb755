from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.betti_numbers import betti_numbers, label_components
from pipeline.vesuvius.separation import keep_apart, label_sheets, separate_sheets


def two_sheets() -> NDArray[np.float32]:
    probability = np.full((48, 48, 48), 0.05, np.float32)
    probability[:, 20:23] = probability[:, 28:31] = 0.95
    return probability


def test_sheets_joined_by_weak_bridges_are_parted() -> None:
    probability = two_sheets()
    probability[10:12, 23:28, 10:13] = probability[30:33, 23:28, 30:32] = 0.55
    mask = probability >= 0.5
    assert label_sheets(mask)[1] == 1
    result = separate_sheets(mask, probability)
    assert label_sheets(result)[1] == 2
    assert not (result & ~mask).any()
    assert np.count_nonzero(mask & ~result) <= 2 * 18  # a cut one voxel wide
    assert result[probability > 0.9].all()
    np.testing.assert_array_equal(separate_sheets(result, probability), result)


def test_a_torn_sheet_stays_one() -> None:
    probability = two_sheets()
    probability[:, 20:23, 22:24] = 0.55
    mask = probability >= 0.5
    np.testing.assert_array_equal(separate_sheets(mask, probability), mask)


def test_sheets_that_touch_over_a_wide_area_stay_one() -> None:
    probability = two_sheets()
    probability[:30, 23:28, :30] = 0.55
    mask = probability >= 0.5
    np.testing.assert_array_equal(separate_sheets(mask, probability), mask)


def test_sheets_are_parted_by_erosion_where_there_is_no_probability() -> None:
    mask = np.zeros((48, 48, 48), np.bool_)
    mask[:, 20:25] = mask[:, 29:34] = mask[10:12, 25:29, 10:12] = True
    result = separate_sheets(mask, erosion=1)
    assert label_sheets(result)[1] == 2
    with pytest.raises(ConfigurationError, match="needs a probability or an erosion"):
        separate_sheets(mask)


@pytest.mark.parametrize("full", [False, True])
def test_nothing_and_everything_stay_as_they_are(full: bool) -> None:
    mask = np.full((16, 16, 16), full)
    probability = mask.astype(np.float32)
    np.testing.assert_array_equal(separate_sheets(mask, probability, min_part=10), mask)
    np.testing.assert_array_equal(keep_apart(mask), mask)


@given(st.integers(0, 2**32 - 1))
def test_separation_only_removes(seed: int) -> None:
    probability = np.random.default_rng(seed).random((12, 12, 12)).astype(np.float32)
    mask = probability >= 0.6
    result = separate_sheets(
        mask, probability, (0.7, 0.8), min_part=4, max_contact=1, min_overlap=0
    )
    assert not (result & ~mask).any()


def test_thick_sheets_are_worn_off_to_the_gap() -> None:
    mask = np.zeros((24, 24, 24), np.bool_)
    mask[:, 8:12] = mask[:, 13:17] = True  # one voxel apart
    result = keep_apart(mask, gap=3)
    assert betti_numbers(result) == (2, 0, 0)
    assert not (result & ~mask).any()
    assert result[:, 8:10].all()
    assert result[:, 15:17].all()
    assert not result[3:-3, 10:15, 3:-3].any()


@given(st.integers(0, 2**32 - 1))
def test_wearing_off_changes_no_topology(seed: int) -> None:
    mask = np.random.default_rng(seed).random((10, 10, 10)) < 0.1
    result = keep_apart(mask, 2)
    assert betti_numbers(result) == betti_numbers(mask)
    assert label_components(result, 26)[1] >= label_components(mask, 26)[1]


def test_a_gap_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="gap must be 1 or more"):
        keep_apart(np.ones((4, 4, 4), np.bool_), 0)
