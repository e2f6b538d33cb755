"""The official score: stored pairs, probes with known values, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius.metrics import (
    surface_dice,
    surface_score,
    topology_score,
    variation_of_information,
)

Volume = NDArray[np.uint8]
SIDE = 64


def sheets(*starts: int, thickness: int = 3) -> Volume:
    volume = np.zeros((SIDE, SIDE, SIDE), np.uint8)
    for start in starts:
        volume[:, start : start + thickness, :] = 1
    return volume


def changed(*boxes: tuple[Any, ...], to: int) -> Volume:
    volume = sheets(20, 50)
    for box in boxes:
        volume[box] = to
    return volume


TRUTH = sheets(20, 50)
HOLE = np.s_[10:12, 20:23, 10:12]
PROBES = {
    "itself": (TRUTH, 1.0, 1.0, 1.0, 1.0),
    "empty": (sheets(), 0.56923, 1.0, 0.0, 0.76923),
    "full": (np.ones_like(TRUTH), 0.6658, 1.0, 0.1850, 0.8600),
    "one sheet missing": (sheets(20), 0.8833, 1.0, 0.6667, 1.0),
    "slit on the octant plane": (
        changed(np.s_[:, 20:23, 32], to=0),
        0.95042,
        1.0,
        1.0,
        0.85833,
    ),
    "slit inside octants": (changed(np.s_[:, 20:23, 40], to=0), 0.71245, 0.2, 1.0, 0.86414),
    "bridge": (changed(np.s_[10, 23:50, 10], to=1), 0.91792, 1.0, 0.998, 0.76723),
    "hole of 2x2": (changed(HOLE, to=0), 0.79941, 0.33333, 1.0, 0.99833),
    "hole of 1x1": (changed(np.s_[10, 20:23, 10], to=0), 0.7998, 0.33333, 1.0, 0.9995),
    "inner voxel removed": (changed(np.s_[10, 21, 10], to=0), 0.7999, 0.33333, 1.0, 0.9998),
    "voxel added": (changed(np.s_[10, 30, 10], to=1), 0.8000, 0.33333, 1.0, 1.0),
    "hole and cavity": (
        changed(HOLE, np.s_[40, 51, 40], to=0),
        0.79933,
        0.33333,
        1.0,
        None,
    ),
    "shifted by 1": (sheets(21, 51), 0.8739, 1.0, 1.0, 0.6397),
    "shifted by 2": (sheets(22, 52), 0.8728, 1.0, 1.0, 0.6367),
    "shifted by 3": (sheets(23, 53), 0.7544, 1.0, 0.5289, 0.7692),
    "thicker": (sheets(19, 49, thickness=5), 0.8980, 1.0, 1.0, 0.7086),
    "other value": (2 * TRUTH, 1.0, 1.0, 1.0, 1.0),
}
"""Prediction, score, topology, SurfaceDice and VOI of the official code, as far as printed."""


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_scores_as_officially(name: str) -> None:
    prediction, score, topology, dice, voi = PROBES[name]
    result = surface_score(prediction, TRUTH)
    rounding = 6e-5  # most values were printed with four digits
    assert result["score"] == pytest.approx(score, abs=rounding)
    assert result["topology"]["score"] == pytest.approx(topology, abs=rounding)
    # Where a whole number is printed the official code is as near to it as a few pieces of surface.
    assert result["surface_dice"] == pytest.approx(dice, abs=6e-4)
    if voi is not None:
        assert result["voi_score"] == pytest.approx(voi, abs=rounding)


COUNTED = {
    "slit inside octants": (0, (0, 2, 0)),
    "hole of 2x2": (1, (0, 1, 0)),
    "hole of 1x1": (1, (0, 1, 0)),
    "inner voxel removed": (2, (0, 1, 0)),
    "voxel added": (0, (0, 1, 0)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_probe_has_the_one_feature_it_was_made_for(name: str) -> None:
    dimension, counts = COUNTED[name]
    expected = {k: counts if k == dimension else (0, 0, 0) for k in range(3)}
    topology = surface_score(PROBES[name][0], TRUTH)["topology"]
    assert topology["counts"] == expected
    assert [k for k in range(3) if topology["f1"][k] is not None] == [dimension]


def test_components_weigh_a_little_more_than_tunnels_and_cavities() -> None:
    prediction = changed(np.s_[:, 20:23, 40], HOLE, to=0)
    topology = topology_score(prediction, TRUTH)
    assert topology["counts"] == {0: (0, 2, 0), 1: (0, 1, 0), 2: (0, 0, 0)}
    assert topology["f1"] == {0: 0.2, 1: pytest.approx(1 / 3), 2: None}
    assert topology["score"] == pytest.approx((0.34 * 0.2 + 0.33 / 3) / 0.67)


def test_two_empty_volumes_are_equal() -> None:
    result = surface_score(sheets(), sheets())
    assert (result["score"], result["surface_dice"], result["voi_score"]) == (1.0, 1.0, 1.0)
    assert result["topology"]["score"] == 1.0


def test_an_unlabelled_frame_is_not_scored() -> None:
    label = np.pad(TRUTH[3:-3, 3:-3, 3:-3], 3, constant_values=2)
    prediction = np.pad(TRUTH[3:-3, 3:-3, 3:-3], 3, constant_values=1)
    assert surface_score(prediction, label)["score"] == pytest.approx(1.0)


def staircase(*more: tuple[int, int]) -> Volume:
    volume = np.zeros((SIDE, SIDE, SIDE), np.uint8)
    for step in range(SIDE):
        for down, right in ((0, 0), *more):
            if step + max(down, right) < SIDE:
                volume[step + down, :, step + right] = 1
    return volume


def test_a_staircase_falls_apart_for_topology_alone() -> None:
    result = surface_score(staircase(), staircase((1, 0)))
    assert result["topology"]["counts"][0] == (0, 124, 0)
    assert result["score"] == pytest.approx(0.62044, abs=6e-6)
    assert result["topology"]["score"] == pytest.approx(0.00402, abs=6e-6)
    assert result["surface_dice"] == pytest.approx(1.0)
    assert result["voi_score"] == pytest.approx(0.76924, abs=6e-6)


def test_a_staircase_plugged_on_the_other_side_holds() -> None:
    result = surface_score(staircase((0, 1)), staircase((1, 0)))
    assert result["topology"]["score"] == 1.0
    assert result["score"] == pytest.approx(0.8998, abs=6e-5)
    assert result["voi_score"] == pytest.approx(0.714, abs=6e-4)


@pytest.fixture(scope="module")
def stored_cases(lamina_data: Path) -> dict[str, tuple[Volume, Volume, dict[str, Any]]]:
    folder = lamina_data / "vesuvius" / "metric_cases"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    cases = {}
    for name, expected in json.loads((folder / "expected.json").read_text("utf-8")).items():
        with np.load(folder / f"{name}.npz") as arrays:
            cases[name] = arrays["prediction"], arrays["label"], expected
    return cases


def test_all_stored_pairs_score_as_officially(
    stored_cases: dict[str, tuple[Volume, Volume, dict[str, Any]]],
) -> None:
    assert len(stored_cases) == 28
    for name, (prediction, label, expected) in stored_cases.items():
        result = surface_score(prediction, label)
        topology = result["topology"]
        counts = {str(k): list(count) for k, count in topology["counts"].items()}
        assert counts == expected["counts"], name
        assert topology["score"] == pytest.approx(expected["topo"], abs=1e-12), name
        assert result["score"] == pytest.approx(expected["score"], abs=1e-12), name
        for key in ("surface_dice", "voi_score", "voi_split", "voi_merge"):
            assert result[key] == pytest.approx(expected[key], abs=1e-9), (name, key)
        for k, f1 in topology["f1"].items():
            official = expected["topoF1"][str(k)]
            assert (f1 is None) == (official is None), name
            assert official is None or f1 == pytest.approx(official, abs=6e-5), name


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Volume, Volume]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = tuple(draw(st.integers(1, 12)) for _ in range(3))
    prediction = (rng.random(shape) < rng.random()).astype(np.uint8)
    return prediction, rng.choice(3, shape, p=[0.5, 0.4, 0.1]).astype(np.uint8)


@given(pairs())
def test_what_is_predicted_where_nothing_is_labelled_is_no_matter(
    pair: tuple[Volume, Volume],
) -> None:
    prediction, label = pair
    other = np.where(label == 2, 1 - prediction, prediction)
    assert surface_score(prediction, label) == surface_score(other, label)


@given(pairs())
def test_the_parts_alone_are_those_of_the_whole(pair: tuple[Volume, Volume]) -> None:
    whole = surface_score(*pair)
    assert whole["surface_dice"] == surface_dice(*pair)
    assert whole["topology"] == topology_score(*pair)
    voi = variation_of_information(*pair)
    assert voi == {key: whole[key] for key in ("voi_score", "voi_split", "voi_merge")}
    weights = 0.30 * whole["topology"]["score"] + 0.35 * whole["surface_dice"]
    assert whole["score"] == pytest.approx(weights + 0.35 * whole["voi_score"])
    assert whole["topology"]["score"] <= whole["topology"]["upper_bound"]


@given(pairs())
def test_strides_and_types_of_the_arrays_are_no_matter(pair: tuple[Volume, Volume]) -> None:
    prediction, label = pair
    strided = np.asfortranarray(prediction).astype(np.float32) * 255
    assert surface_score(strided, label.astype(np.int64)) == surface_score(prediction, label)


@given(pairs())
def test_without_matching_the_upper_bound_stands_alone(pair: tuple[Volume, Volume]) -> None:
    exact, bounded = surface_score(*pair), surface_score(*pair, matching=False)
    assert bounded["topology"]["upper_bound"] == exact["topology"]["upper_bound"]
    for k, (matched, predicted, truth) in bounded["topology"]["counts"].items():
        assert (predicted, truth) == exact["topology"]["counts"][k][1:]
        assert matched is None or matched == exact["topology"]["counts"][k][0]
    for result in (bounded, bounded["topology"]):
        if any(count[0] is None for count in bounded["topology"]["counts"].values()):
            assert result["score"] is None
        else:  # no block has a feature in both volumes: nothing needs matching
            assert result["score"] is not None


def test_a_score_that_was_given_up_is_none() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((2, 24, 24, 24)) < 0.5
    result = surface_score(*noise, max_flips=10)
    assert result["score"] is None
    assert result["topology"]["score"] is None
    assert result["topology"]["f1"][1] is None
    assert result["topology"]["counts"][1][0] is None
    assert 0 < result["topology"]["upper_bound"] <= 1
    assert 0 < result["surface_dice"] <= 1


ZEROS = np.zeros((4, 5, 6), np.uint8)


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (ZEROS[0], ZEROS[0], r"prediction must be a volume .*got shape \(5, 6\)"),
        (ZEROS, ZEROS[:, :, 0], r"label must be a volume .*got shape \(4, 5\)"),
        (ZEROS[:0], ZEROS[:0], r"with voxels in it, got shape \(0, 5, 6\)"),
        (ZEROS, ZEROS[1:], r"prediction has shape \(4, 5, 6\), label has \(3, 5, 6\)"),
        (ZEROS, ZEROS + 3, r"label holds values 3; expected 0, 1 and 2 \(unlabelled\)"),
        (ZEROS, np.full(ZEROS.shape, np.nan), r"label holds values nan; expected 0, 1"),
        (np.full(ZEROS.shape, np.nan), ZEROS, r"prediction holds 120 NaN voxels; .*mask"),
        (ZEROS + 0.25, ZEROS, r"between 0 and 1, such as 0\.25; .*threshold"),
    ],
    ids=["2-d", "label-2-d", "empty", "shapes", "values", "label-nan", "nan", "probability"],
)
def test_unusable_volumes_are_refused_in_one_line(
    prediction: NDArray[Any], label: NDArray[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        surface_score(prediction, label)
    assert "\n" not in str(caught.value)


def test_without_an_ignore_label_two_is_an_unknown_value() -> None:
    with pytest.raises(InputError, match=r"label holds values 2; expected 0 and 1;"):
        surface_score(ZEROS, ZEROS + 2, ignore_label=None)


@pytest.mark.parametrize("tolerance", [-1.0, np.nan, np.inf])
def test_a_tolerance_that_is_no_distance_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigurationError, match="tolerance must be a distance in voxels"):
        surface_dice(ZEROS, ZEROS, tolerance)


@pytest.mark.parametrize("ignore_label", [0, 1])
def test_an_ignore_label_that_is_a_class_is_refused(ignore_label: int) -> None:
    with pytest.raises(ConfigurationError, match="ignore_label must differ from background"):
        surface_score(ZEROS, ZEROS, ignore_label=ignore_label)
