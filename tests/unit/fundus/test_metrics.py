from __future__ import annotations

from math import isnan, nan, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from pipeline.errors import InputError
from pipeline.fundus.metrics import (
    METRICS,
    THRESHOLD_GRID,
    Case,
    area_under_curve,
    choose_threshold,
    pooled_metrics,
    summarise,
    vessel_metrics,
)

seeds = st.integers(0, 2**32 - 1)


def make_case(seed: int, shape: tuple[int, int] = (24, 31), levels: int = 0) -> Case:
    """Blobs, a noisy map of them and a field of view; `levels` above 0 makes ties."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    label = np.abs(rows - shape[0] / 2 - 4 * np.sin(columns / 5 + rng.uniform(0, 6))) < 2
    probability = 0.35 * label + 0.65 * rng.random(shape)
    if levels:
        probability = np.round(probability * levels) / levels
    fov = (rows - shape[0] / 2) ** 2 + (columns - shape[1] / 2) ** 2 < 13**2
    return probability.astype(np.float32), label, fov


def same(first: dict[str, float], second: dict[str, float], tolerance: float = 0.0) -> None:
    assert list(first) == list(second)
    np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=0, atol=tolerance)


def cells(*rows: str) -> NDArray[np.bool_]:
    return np.array([[cell == "#" for cell in row] for row in rows])


def test_hand_computed_counts() -> None:
    label = cells("##..", "##..")
    probability = cells("###.", "#...").astype(np.float32)
    metrics = vessel_metrics(probability, label)
    expected = {
        "dice": 6 / 8,
        "iou": 3 / 5,
        "sensitivity": 3 / 4,
        "specificity": 3 / 4,
        "accuracy": 6 / 8,
        "mcc": 0.5,
        "auc": 0.75,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert tuple(metrics) == METRICS


def test_centreline_dice_by_hand() -> None:
    label = np.zeros((7, 20), np.bool_)
    label[3, 2:18] = True
    predicted = np.zeros((7, 20), np.float32)
    predicted[3, 2:10] = 1  # half of the line, all of it right: precision 1, sensitivity 1/2
    assert vessel_metrics(predicted, label)["cldice"] == pytest.approx(2 / 3)


def test_perfect_prediction_scores_one_everywhere() -> None:
    _, label, fov = make_case(0)
    assert set(vessel_metrics(label.astype(np.float32), label, fov).values()) == {1.0}


@given(seed=seeds, other=seeds)
def test_pixels_outside_the_field_of_view_change_nothing(seed: int, other: int) -> None:
    probability, label, fov = make_case(seed)
    foreign_probability, foreign_label, _ = make_case(other)
    assert fov is not None
    changed = vessel_metrics(
        np.where(fov, probability, foreign_probability), np.where(fov, label, ~foreign_label), fov
    )
    same(changed, vessel_metrics(probability, label, fov))


@given(seed=seeds)
def test_cropping_to_the_field_of_view_changes_nothing(seed: int) -> None:
    case = make_case(seed)
    padded = tuple(np.pad(array, 5) for array in case if array is not None)
    same(vessel_metrics(*padded), vessel_metrics(*case))


@given(seed=seeds, levels=st.sampled_from([0, 3, 20]))
def test_auc_equals_scikit_learn(seed: int, levels: int) -> None:
    probability, label, fov = make_case(seed, levels=levels)
    expected = roc_auc_score(label[fov], probability[fov])
    assert area_under_curve(probability, label, fov) == pytest.approx(expected, abs=1e-12)
    assert area_under_curve(1 - probability, ~label, fov) == pytest.approx(expected, abs=1e-3)


@given(seed=seeds)
def test_auc_does_not_change_under_monotone_maps(seed: int) -> None:
    probability, label, fov = make_case(seed, levels=50)
    for mapped in (probability**3, np.sqrt(probability), 0.2 + 0.5 * probability):
        assert area_under_curve(mapped, label, fov) == area_under_curve(probability, label, fov)


def test_auc_of_a_constant_map_is_one_half() -> None:
    _, label, fov = make_case(3)
    assert area_under_curve(np.full(label.shape, 0.3), label, fov) == 0.5


@given(seed=seeds, threshold=st.sampled_from([0.25, 0.5, 0.7]))
def test_counts_equal_brute_force(seed: int, threshold: float) -> None:
    probability, label, fov = make_case(seed, levels=20)
    assert fov is not None
    tp = fp = fn = tn = 0
    for p, is_vessel in zip(probability[fov], label[fov], strict=True):
        called = p >= np.float32(threshold)
        tp, fp = tp + (called and is_vessel), fp + (called and not is_vessel)
        fn, tn = fn + (not called and is_vessel), tn + (not called and not is_vessel)
    metrics = vessel_metrics(probability, label, fov, threshold)
    assert metrics["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert metrics["iou"] == pytest.approx(tp / (tp + fp + fn))
    assert metrics["sensitivity"] == pytest.approx(tp / (tp + fn))
    assert metrics["specificity"] == pytest.approx(tn / (tn + fp))
    assert metrics["accuracy"] == pytest.approx((tp + tn) / (tp + fp + fn + tn))
    called = probability[fov] >= np.float32(threshold)
    assert metrics["mcc"] == pytest.approx(matthews_corrcoef(label[fov], called))


@given(seed=seeds)
def test_swapping_the_classes_swaps_sensitivity_and_specificity(seed: int) -> None:
    probability, label, fov = make_case(seed, levels=64)  # 1 - p is exact
    between = 0.5 + 1 / 128  # no value lies on the threshold
    metrics = vessel_metrics(probability, label, fov, between)
    swapped = vessel_metrics(1 - probability, ~label, fov, 1 - between)
    assert swapped["sensitivity"] == metrics["specificity"]
    assert swapped["specificity"] == metrics["sensitivity"]
    for name in ("accuracy", "mcc", "auc"):
        assert swapped[name] == pytest.approx(metrics[name], abs=1e-12)


@given(seed=seeds)
def test_dice_and_iou_say_the_same(seed: int) -> None:
    metrics = vessel_metrics(*make_case(seed))
    assert metrics["dice"] == pytest.approx(2 * metrics["iou"] / (1 + metrics["iou"]))


def test_threshold_belongs_to_vessel_in_the_precision_of_the_map() -> None:
    label = cells("#.")
    single = np.array([[0.575, 0.1]], np.float32)
    assert vessel_metrics(single, label, threshold=0.575)["dice"] == 1.0
    assert vessel_metrics(single.astype(np.float64), label, threshold=0.5751)["dice"] == 0.0


EMPTY, FULL = np.zeros((6, 6), np.bool_), np.ones((6, 6), np.bool_)
HALF = np.tri(6, dtype=np.bool_)


@pytest.mark.parametrize(
    ("predicted", "label", "undefined", "zero"),
    [
        (EMPTY, EMPTY, {"dice", "iou", "auc", "sensitivity", "mcc", "cldice"}, set()),
        (HALF, EMPTY, {"auc", "sensitivity", "mcc"}, {"dice", "iou", "cldice"}),
        (EMPTY, HALF, set(), {"dice", "iou", "sensitivity", "mcc", "cldice"}),
        (FULL, FULL, {"auc", "specificity", "mcc"}, set()),
        (FULL, HALF, set(), {"specificity", "mcc"}),
    ],
    ids=["both empty", "label empty", "prediction empty", "both full", "prediction full"],
)
def test_what_cannot_be_measured_is_nan_and_never_one(
    predicted: NDArray[np.bool_], label: NDArray[np.bool_], undefined: set[str], zero: set[str]
) -> None:
    metrics = vessel_metrics(predicted, label)
    assert {name for name, value in metrics.items() if isnan(value)} == undefined
    assert {name for name, value in metrics.items() if value == 0} == zero


def test_empty_field_of_view_gives_nan_everywhere() -> None:
    assert all(isnan(value) for value in vessel_metrics(HALF, HALF, EMPTY).values())
    assert all(isnan(value) for value in pooled_metrics([]).values())


@given(seed=seeds)
def test_pooling_images_equals_laying_them_side_by_side(seed: int) -> None:
    cases = [make_case(seed + step, levels=30) for step in range(3)]
    joined = [np.hstack([np.pad(case[part], 3) for case in cases]) for part in range(3)]  # type: ignore[arg-type]
    same(pooled_metrics(iter(cases)), vessel_metrics(*joined), 1e-12)


def test_pooling_one_image_is_its_own_score() -> None:
    case = make_case(8)
    same(pooled_metrics([case], 0.4), vessel_metrics(*case, 0.4))


@given(seed=seeds)
def test_chosen_threshold_has_the_best_mean_dice(seed: int) -> None:
    cases = [make_case(seed + step, levels=40) for step in range(3)]
    mean_dice = [
        np.mean([vessel_metrics(*case, t)["dice"] for case in cases]) for t in THRESHOLD_GRID
    ]
    chosen = choose_threshold(cases)
    assert mean_dice[THRESHOLD_GRID.index(chosen)] == pytest.approx(max(mean_dice), abs=1e-12)


def test_equally_good_thresholds_give_the_middle_one() -> None:
    case = (HALF.astype(np.float32), HALF, None)
    assert choose_threshold([case]) == 0.5
    assert choose_threshold([case], [0.4, 0.3, 0.6]) == 0.4
    assert choose_threshold([case], [0.4, 0.6]) == 0.4


def test_images_without_vessels_do_not_choose_the_threshold() -> None:
    case = make_case(4, levels=40)
    empty = (np.full(HALF.shape, 0.7, np.float32), EMPTY, None)
    assert choose_threshold([case, empty]) == choose_threshold([case])
    with pytest.raises(InputError, match="no validation image has a vessel pixel"):
        choose_threshold([empty])


def test_empty_grid_is_refused() -> None:
    with pytest.raises(InputError, match="grid of thresholds is empty"):
        choose_threshold([make_case(1)], [])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32])
def test_label_may_be_bool_or_zero_and_one(dtype: type) -> None:
    probability, label, fov = make_case(1)
    expected = vessel_metrics(probability, label, fov)
    assert fov is not None
    same(vessel_metrics(probability, label.astype(dtype), fov.astype(dtype)), expected)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            (HALF, HALF * np.uint8(255), None),
            r"label must be bool .* found values 0, 255; .* > 127",
        ),
        ((HALF, HALF, HALF * 2), r"fov must be bool .* found values 0, 2"),
        ((HALF, HALF * nan, None), r"label must be bool"),
        ((HALF, HALF[:3], None), r"label has shape \(3, 6\), probability has \(6, 6\)"),
        ((HALF, HALF, HALF[:, :2]), r"fov has shape \(6, 2\), probability has \(6, 6\)"),
        ((HALF[None], HALF[None], None), r"probability must be \(H, W\), got shape \(1, 6, 6\)"),
        ((HALF * 9.0, HALF, None), r"probability must lie in 0..1, found 0.0 to 9.0; .*sigmoid"),
        ((HALF * nan, HALF, None), r"probability must lie in 0..1"),
        ((HALF * np.uint8(255), HALF, None), r"divide a mask by 255"),
    ],
    ids=["0/255", "fov values", "nan label", "label", "fov", "batch", "logits", "nan", "mask 255"],
)
def test_bad_input_is_refused_in_one_line(case: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        vessel_metrics(*case)
    assert "\n" not in str(raised.value)


def test_summary_leaves_nan_out_and_counts_it() -> None:
    rows = [
        {"image": "a", "dice": 0.8, "auc": nan, "fov": "given"},
        {"image": "b", "dice": 0.6, "auc": 0.9, "fov": "given"},
        {"image": "c", "dice": nan, "auc": nan, "fov": "derived"},
    ]
    summary = summarise(rows)
    assert set(summary) == {"dice", "auc"}
    assert summary["dice"] == pytest.approx(
        {"mean": 0.7, "sd": 0.1 * sqrt(2), "min": 0.6, "count": 2, "nan": 1}
    )
    assert summary["auc"]["mean"] == 0.9
    assert isnan(summary["auc"]["sd"])
    assert summary["auc"]["nan"] == 2


def test_summary_of_nothing_known_is_nan() -> None:
    summary = summarise([{"dice": nan}])["dice"]
    assert isnan(summary["mean"])
    assert isnan(summary["min"])
    assert (summary["count"], summary["nan"]) == (0, 1)
