from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.betti_numbers import betti_numbers
from pipeline.vesuvius.smoothing import restore_thickness, smooth
from pipeline.vesuvius.topology import postprocess


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.6))
def test_laws(seed: int, threshold: float) -> None:
    noise = np.random.default_rng(seed).random((10, 11, 12)).astype(np.float32)
    mask = gaussian_filter(noise, 0.8) >= 0.45
    result = restore_thickness(mask, noise, threshold)
    assert not (result & ~mask).any()
    assert result[mask & (noise >= threshold)].all()
    assert betti_numbers(result) == betti_numbers(mask)
    np.testing.assert_array_equal(restore_thickness(result, noise, threshold), result)


def test_nothing_and_everything_stay_as_they_are() -> None:
    for value in (0.0, 1.0):
        volume = np.full((8, 8, 8), value, np.float32)
        np.testing.assert_array_equal(restore_thickness(volume > 0.5, volume), volume > 0.5)


def sheet_with_a_pinhole() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    probability = np.zeros((40, 40, 40), np.float32)
    probability[:, 20:22] = 1
    probability[20, 20:22, 20] = 0
    return probability


def test_a_sheet_is_as_thick_as_before_smoothing_and_its_pinhole_closed() -> None:
    probability = sheet_with_a_pinhole()
    low = {"threshold": 0.3, "betti": False}
    assert (smooth(probability, 1.0) >= 0.3)[10, :, 10].sum() == 4
    mask, record = postprocess(probability, smoothing=1.0, **low)
    assert record[-1]["step"] == "restore_thickness"
    assert record[-1]["voxels_removed"] > 0
    inner = np.s_[3:-3, 3:-3, 3:-3]
    sheet = probability.astype(np.bool_)
    hole = mask[inner] & ~sheet[inner]
    assert not (sheet[inner] & ~mask[inner].astype(np.bool_)).any()
    assert hole.sum() == hole[17, :, 17].sum() == 1  # one layer of what was closed


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("thickness", [1, 2, 3, 5])
def test_smoothing_leaves_the_middle_of_a_flat_sheet_its_value(
    sigma: float, thickness: int
) -> None:
    probability = np.zeros((40, 40, 40), np.float32)
    probability[:, 20 : 20 + thickness] = 0.7
    smoothed = smooth(probability, sigma, thickness)
    assert smoothed[20].max(axis=0) == pytest.approx(np.full(40, 0.7), abs=1e-5)
    assert smooth(np.ones((30, 30, 30), np.float32), sigma).max() == 1


def test_settings_that_make_no_sense_are_refused() -> None:
    volume = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(ConfigurationError, match="sigma must be 0 or more"):
        smooth(volume, -1)
    with pytest.raises(ConfigurationError, match="sheet_thickness must be 1 or more"):
        smooth(volume, 1, 0)
    np.testing.assert_array_equal(smooth(volume + 0.3, 0), volume + 0.3)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95])
def test_a_flat_sheet_is_found_whole_at_every_threshold(threshold: float) -> None:
    probability = sheet_with_a_pinhole() * np.float32(0.99)
    mask = postprocess(probability, smoothing=1.0, threshold=threshold, betti=False).mask
    inner = np.s_[3:-3, 3:-3, 3:-3]
    assert (mask[inner].astype(np.bool_) >= (probability[inner] > 0)).all()


def test_what_was_not_smoothed_is_left_alone() -> None:
    steps = [entry["step"] for entry in postprocess(sheet_with_a_pinhole()).record]
    assert "restore_thickness" not in steps
