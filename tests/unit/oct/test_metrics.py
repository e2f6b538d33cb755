from __future__ import annotations

from dataclasses import replace
from math import isnan, nan, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.oct.metrics import ScanRows, boundary_metrics, evaluate_scans, layer_metrics

seeds = st.integers(0, 2**32 - 1)


def scan(name: str, eye: str, errors: tuple[Any, Any], scale_y_um: float | None = None) -> ScanRows:
    """Return a scan whose ILM is annotated at 100, 101, ... and BM 50 rows below."""
    ilm_error, bm_error = (np.asarray(error, dtype=float) for error in errors)
    ilm = 100.0 + np.arange(ilm_error.size)
    return ScanRows(
        name,
        eye,
        predicted={"ILM": ilm + ilm_error, "BM": ilm + 50 + bm_error},
        truth={"ILM": ilm, "BM": ilm + 50},
        valid={},
        scale_y_um=scale_y_um,
    )


def test_figures_by_hand() -> None:
    truth = np.array([10.0, 20.0, 30.0, 40.0, nan])
    predicted = np.array([11.0, 18.0, 30.0, 44.0, 7.0])
    valid = np.array([True, True, True, False, True])
    metrics = boundary_metrics(predicted, truth, valid, scale_y_um=4.0)
    expected = {
        "columns": 4,
        "found": 1.0,
        "coverage": 0.75,
        "mae_px": 7 / 4,
        "rmse_px": sqrt(21 / 4),
        "p95_px": 3.7,
        "max_px": 4.0,
        "bias_px": 3 / 4,
        "mae_um": 7.0,
        "max_um": 16.0,
        "valid_mae_px": 1.0,
        "valid_bias_px": -1 / 3,
        "valid_max_um": 8.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@given(seed=seeds)
def test_concordance_by_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(100, 9, 30), rng.normal(103, 5, 30)
    covariance = np.cov([first, second], bias=True)
    gap = first.mean() - second.mean()
    expected = 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + gap**2)
    assert boundary_metrics(first, second)["ccc"] == pytest.approx(expected)


@given(seed=seeds, shift=st.floats(-20, 20))
def test_a_constant_shift_is_the_bias_and_every_other_error(seed: int, shift: float) -> None:
    truth = np.random.default_rng(seed).uniform(50, 400, 64)
    metrics = boundary_metrics(truth + shift, truth, scale_y_um=3.87)
    assert metrics["bias_px"] == pytest.approx(shift, abs=1e-9)
    for name in ("mae_px", "rmse_px", "p95_px", "max_px"):
        assert metrics[name] == pytest.approx(abs(shift), abs=1e-9)
    assert metrics["mae_um"] == pytest.approx(3.87 * abs(shift), abs=1e-9)


def test_columns_without_annotation_change_nothing() -> None:
    errors = np.array([1.0, -2.0, 3.0, 0.5])
    truth = np.array([10.0, 12.0, 11.0, 13.0])
    gap = np.full(3, nan)
    known = boundary_metrics(truth + errors, truth)
    with_gap = boundary_metrics(np.append(truth + errors, [4, 5, 6]), np.append(truth, gap))
    assert with_gap == known


def test_a_missing_prediction_lowers_what_is_found_and_hides_nowhere_else() -> None:
    truth = np.full(4, 20.0)
    metrics = boundary_metrics(np.array([21.0, nan, nan, nan]), truth)
    assert (metrics["found"], metrics["coverage"], metrics["mae_px"]) == (0.25, 0.25, 1.0)
    nothing = boundary_metrics(np.full(4, nan), truth)
    assert (nothing["columns"], nothing["found"]) == (4, 0)
    assert isnan(nothing["mae_px"])
    assert isnan(boundary_metrics(truth, np.full(4, nan))["found"])


def test_leaving_the_wrong_columns_out_betters_the_valid_figures_alone() -> None:
    truth = np.linspace(100, 120, 50)
    predicted = truth + np.where(np.arange(50) < 10, 30, 0.5)
    metrics = boundary_metrics(predicted, truth, np.arange(50) >= 10)
    assert metrics["coverage"] == 0.8
    assert metrics["valid_mae_px"] == pytest.approx(0.5)
    assert metrics["mae_px"] == pytest.approx(0.2 * 30 + 0.8 * 0.5)


def test_thickness_errs_by_the_difference_of_both() -> None:
    metrics = layer_metrics([scan("a", "1_OD", ([1, 1, -2], [1, -1, 1]), 4.0)])
    assert metrics["thickness_mae_px"] == pytest.approx((0 + 2 + 3) / 3)
    assert metrics["thickness_bias_um"] == pytest.approx(4 * (0 - 2 + 3) / 3)
    assert metrics["order_violations"] == 0


def test_crossing_rows_are_counted_annotated_or_not() -> None:
    crossing = scan("a", "1_OD", ([0, 60, 0, 60], [0, 0, 0, 0]))
    crossing.truth["ILM"][3] = nan
    assert layer_metrics([crossing])["order_violations"] == 2


def test_one_scan_is_the_same_however_it_is_cut() -> None:
    errors = np.random.default_rng(0).normal(0, 2, (2, 40))
    whole = scan("a", "1", (errors[0], errors[1]), 3.87)

    def part(chosen: slice) -> ScanRows:
        cut = {
            kind: {name: rows[chosen] for name, rows in getattr(whole, kind).items()}
            for kind in ("predicted", "truth")
        }
        return replace(whole, **cut)

    pieces = layer_metrics([part(slice(0, 13)), part(slice(13, 40))])
    assert pieces == pytest.approx(layer_metrics([whole]))


def test_overall_is_the_mean_of_the_eyes_and_not_of_the_columns() -> None:
    scans = [
        scan("a_1", "a", (np.full(300, 1.0), np.full(300, 2.0))),
        scan("a_2", "a", (np.full(100, 3.0), np.full(100, 2.0))),
        scan("b_1", "b", (np.full(10, 9.0), np.full(10, -4.0))),
    ]
    result = evaluate_scans(scans)
    assert [row["scan"] for row in result["per_scan"]] == ["a_1", "a_2", "b_1"]
    assert [row["ilm_mae_px"] for row in result["per_eye"]] == pytest.approx([1.5, 9.0])
    overall = result["overall"]
    assert overall["ilm_mae_px"] == pytest.approx(5.25)
    assert overall["bm_bias_px"] == pytest.approx(-1.0)
    assert overall["ilm_max_px"] == 9.0
    assert (overall["eyes"], overall["scans"], overall["ilm_columns"]) == (2, 3, 410)
    assert (overall["ilm_worst_scan"], overall["ilm_worst_scan_mae_px"]) == ("b_1", 9.0)
    assert overall["bm_worst_scan"] == "b_1"
    assert "ilm_mae_um" not in overall


def test_an_eye_without_annotation_is_left_out_of_the_mean() -> None:
    blank = scan("b", "b", ([1, 1], [1, 1]))
    blank.truth["BM"][:] = nan
    overall = evaluate_scans([scan("a", "a", ([2, 2], [3, 3])), blank])["overall"]
    assert overall["bm_mae_px"] == pytest.approx(3)
    assert overall["bm_worst_scan"] == "a"
    assert isnan(evaluate_scans([blank])["overall"]["bm_mae_px"])


def test_scans_of_different_scale_are_pooled_in_micrometres() -> None:
    scans = [scan("a", "1", ([1.0], [0.0]), 4.0), scan("b", "1", ([1.0], [0.0]), 2.0)]
    assert layer_metrics(scans)["ilm_mae_um"] == pytest.approx(3.0)


def test_a_single_boundary_is_enough() -> None:
    both = scan("a", "1", ([1.0], [0.0]))
    metrics = evaluate_scans([replace(both, truth={"BM": both.truth["BM"]})])["overall"]
    assert metrics["bm_mae_px"] == 0
    assert not [name for name in metrics if name.startswith(("ilm", "thickness", "order"))]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="no scan"):
        evaluate_scans([])
    with pytest.raises(InputError, match="one shape: map the prediction"):
        boundary_metrics(np.zeros(5), np.zeros(4))
    good = scan("a", "1", ([1.0], [0.0]))
    with pytest.raises(InputError, match="a, BM: "):
        layer_metrics([replace(good, valid={"BM": np.ones(3, np.bool_)})])
    other = replace(good, name="b", truth={"ILM": good.truth["ILM"]})
    with pytest.raises(InputError, match="b has predictions of ILM, BM and annotations of ILM;"):
        layer_metrics([good, other])
    with pytest.raises(InputError, match="annotations of nothing"):
        layer_metrics([replace(good, truth={})])
