from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.oct.risk_coverage import risk_coverage, sigma_for_coverage

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds)
def test_each_point_is_the_error_of_the_columns_it_keeps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    error, sigma = rng.normal(0, 3, (4, 25)), rng.integers(0, 8, (4, 25)) / 4
    error[rng.random(error.shape) < 0.1] = np.nan
    curve = risk_coverage(error, sigma)
    known = ~np.isnan(error)
    for threshold, coverage, mae in zip(curve.sigma_px, curve.coverage, curve.mae_px, strict=True):
        kept = known & (sigma <= threshold)
        assert coverage == pytest.approx(kept.sum() / known.sum())
        assert mae == pytest.approx(np.abs(error[kept]).mean())


def test_the_curve_rises_to_all_columns() -> None:
    sigma = np.array([0.3, 0.1, 0.2, 0.2])
    curve = risk_coverage(10 * sigma, sigma)
    assert curve.sigma_px.tolist() == [0.1, 0.2, 0.3]
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    np.testing.assert_allclose(curve.mae_px, [1, 5 / 3, 2])


@given(seed=seeds, coverage=st.floats(0.001, 1))
def test_the_sigma_for_a_coverage_is_the_least_that_keeps_it(seed: int, coverage: float) -> None:
    sigma = np.random.default_rng(seed).integers(0, 9, (3, 11)) / 3
    chosen = sigma_for_coverage(sigma, coverage)
    assert (sigma <= chosen).mean() >= coverage - 1e-9
    assert (sigma < chosen).mean() < coverage


def test_a_share_that_is_a_whole_number_of_columns_keeps_just_these() -> None:
    assert sigma_for_coverage(np.arange(10), 0.7) == 6


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InputError, match="same columns"):
        risk_coverage(np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match="0 of 3 columns"):
        risk_coverage(np.full(3, np.nan), np.zeros(3))
    with pytest.raises(InputError, match="1 of these no sigma"):
        risk_coverage(np.zeros(2), np.array([0, np.nan]))
    for share in (0.0, 1.1):
        with pytest.raises(InputError, match="a share above 0"):
            sigma_for_coverage(np.ones(4), share)
    with pytest.raises(InputError, match="0 sigmas"):
        sigma_for_coverage(np.zeros(0), 0.5)
