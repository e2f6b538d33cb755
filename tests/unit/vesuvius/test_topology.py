"""The chains: probes with known defects, records, settings and bad input."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.measure import euler_number

from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius.betti_numbers import enclosed, label_components
from pipeline.vesuvius.metrics import surface_score, topology_score
from pipeline.vesuvius.recipes import RECIPES, STEPS
from pipeline.vesuvius.topology import PostProcess, postprocess

SIDE = 64
OFF, FAINT, LOW, ON = 0.02, 0.2, 0.6, 0.95
TRUTH = np.zeros((SIDE, SIDE, SIDE), np.uint8)
TRUTH[:, 20:23] = TRUTH[:, 50:53] = 1
HOLE = np.s_[10:12, 20:23, 10:12]

DEFECTS: dict[str, list[tuple[Any, float]]] = {
    "nothing": [],
    "a hole of 2x2": [(HOLE, FAINT)],
    "a hole of 1x1": [(np.s_[10, 20:23, 10], FAINT)],
    "a hole of 5x5": [(np.s_[10:15, 20:23, 10:15], FAINT)],
    "a cavity": [(np.s_[10, 21, 10], OFF)],
    "a speck": [(np.s_[10, 30, 10], ON)],
    "a large dim speck": [(np.s_[8:16, 30:36, 8:16], LOW)],
    "a hole and a hidden cavity": [(HOLE, FAINT), (np.s_[40, 51, 40], OFF)],
    "all of them": [
        (HOLE, FAINT),
        (np.s_[40, 51, 40], OFF),
        (np.s_[10, 30, 10], ON),
        (np.s_[41:44, 50:53, 10:12], FAINT),
    ],
}


def probability(*changes: tuple[Any, float]) -> NDArray[np.float32]:
    volume = np.where(TRUTH, ON, OFF).astype(np.float32)
    for box, value in changes:
        volume[box] = value
    return volume


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_the_probe_is_repaired(defect: str) -> None:
    result = postprocess(probability(*DEFECTS[defect]), frame=0)
    assert result.mask.dtype == np.uint8
    assert topology_score(result.mask, TRUTH)["score"] == 1
    assert not (result.mask > TRUTH).any()
    # A ball dips into a wide hole: its middle is filled less thickly than the sheet is.
    assert np.count_nonzero(result.mask < TRUTH) <= (30 if "5x5" in defect else 0)


def test_a_tear_stays_unless_holes_are_filled_without_evidence() -> None:
    """The network saw no surface at all there."""
    torn = probability((HOLE, OFF))
    assert topology_score(postprocess(torn, frame=0).mask, TRUTH)["score"] < 1
    filled = postprocess(torn, frame=0, hole_evidence=0.0).mask
    assert topology_score(filled, TRUTH)["score"] == 1


def test_a_staircase_becomes_what_it_was() -> None:
    steps = np.arange(SIDE)
    truth = np.zeros_like(TRUTH)
    truth[steps, :, steps] = truth[steps[1:], :, steps[:-1]] = 1
    volume = np.where(truth, 0.4, OFF).astype(np.float32)
    volume[steps, :, steps] = ON
    score = surface_score(postprocess(volume, frame=0).mask, truth)
    assert score["topology"]["score"] == score["surface_dice"] == 1
    assert score["voi_score"] > 0.98


def test_a_weak_bridge_is_cut_on_request() -> None:
    volume = probability((np.s_[10:12, 23:50, 10:12], LOW))
    assert label_components(postprocess(volume).mask != 0, 26)[1] == 1
    assert label_components(postprocess(volume, separate_instances=True).mask != 0, 26)[1] == 2


def test_a_slit_all_the_way_is_a_tear_and_stays() -> None:
    volume = probability((np.s_[:, 20:23, 40], OFF))
    mask = postprocess(volume, frame=0).mask
    np.testing.assert_array_equal(mask, volume > 0.5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_near_sheets_stay_two_by_the_default_recipe(recipe: str) -> None:
    volume = np.full((48, 48, 48), OFF, np.float32)
    volume[:, 20:22] = volume[:, 25:27] = ON
    volume[20:22, 20:22, 20:22] = OFF
    sheets = label_components(postprocess(volume, recipe=recipe).mask != 0, 26)[1]
    assert sheets == {"default": 2, "original": 0}[recipe]  # a ball of 2 fits into neither


def test_the_original_recipe_opens_and_closes() -> None:
    volume = probability((np.s_[20:26, 20:26, 20:26], ON), (np.s_[10, 21, 10], OFF))
    volume[:, 30:36] = ON
    mask = postprocess(volume, recipe="original").mask
    assert mask[:, 30:36].all()
    assert not mask[:, 50:53].any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_and_everything_pass(recipe: str, value: float) -> None:
    settings = {"frame": 0} if recipe == "default" else {}
    mask = postprocess(np.full((20, 20, 20), value, np.float32), recipe=recipe, **settings).mask
    assert (mask == value).all()


def test_the_chain_is_idempotent_on_its_own_result() -> None:
    first = postprocess(probability(*DEFECTS["all of them"])).mask
    np.testing.assert_array_equal(postprocess(first.astype(np.float32)).mask, first)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float64])
def test_scaled_integers_are_probabilities(kind: type[Any]) -> None:
    volume = probability(*DEFECTS["all of them"])
    scale = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 1
    scaled = (volume * scale).astype(kind)
    np.testing.assert_array_equal(postprocess(scaled).mask, postprocess(volume).mask)


def test_the_record_says_what_each_step_did() -> None:
    volume = probability(*DEFECTS["all of them"])
    mask, record = postprocess(volume, betti=True, min_component_size=50)
    assert json.loads(json.dumps(record)) == record
    assert [entry["step"] for entry in record] == [
        "hysteresis",
        "zero_frame",
        "remove_small_components",
        "plug_diagonals",
        "fill_tunnels",
        "interpolate_gaps",
        "fill_cavities",
    ]
    voxels = 0
    for before, after in pairwise(record):
        assert after["betti_before"] == before["betti_after"]
    for entry in record:
        voxels += entry["voxels_added"] - entry["voxels_removed"]
        assert entry["voxels"] == voxels
        assert entry["seconds"] >= 0
    assert voxels == mask.sum()
    assert record[2]["settings"] == {"min_component_size": 50, "reference_voxels": None}
    assert record[0]["betti_after"]["6"] == [3, 2, 1]
    assert record[-1]["betti_after"]["6"] == [2, 0, 0]


def test_betti_numbers_are_counted_on_request() -> None:
    ends = postprocess(probability()).record
    assert [("betti_after" in entry) for entry in ends] == [True, *[False] * 5, True]
    assert not any(
        "betti_after" in entry for entry in postprocess(probability(), betti=False).record
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
def test_betti_numbers_in_26_connectivity_are_those_of_skimage(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((7, 8, 9)) < density
    steps = [{"name": "threshold"}]
    (entry,) = postprocess(mask.astype(np.float32), steps=steps, betti=True).record
    components, tunnels, cavities = entry["betti_after"]["26"]
    assert components == label_components(mask, 26)[1]
    assert cavities == enclosed(*label_components(~mask, 6)).sum()
    assert components - tunnels + cavities == euler_number(mask, connectivity=3)


def test_settings_describe_the_chain_and_make_it_again() -> None:
    volume = probability(*DEFECTS["all of them"])
    chain = PostProcess(threshold=0.4, kernel_size=1, separate_instances=True, max_hole_size=9)
    settings = json.loads(json.dumps(chain.settings()))
    again = PostProcess(**settings)
    assert again.settings() == chain.settings()
    np.testing.assert_array_equal(again(volume).mask, chain(volume).mask)


def test_every_step_runs_in_a_chain_of_its_own() -> None:
    for name in sorted(set(STEPS) - {"threshold", "hysteresis"}):
        steps = [{"name": "threshold", "threshold": 0.4}, {"name": name}]
        mask, record = postprocess(probability(), steps=steps, betti=False)
        assert mask.shape == TRUTH.shape
        assert record[1]["step"] == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "best"}, "recipe must be one of"),
        ({"min_size": 3}, "has no setting 'min_size'; it has threshold"),
        ({"betti": "all"}, "betti must be"),
        ({"steps": []}, "first step must be one of threshold, hysteresis"),
        ({"steps": [{"name": "zero_frame"}]}, "first step must be"),
        ({"steps": [{"name": "threshold"}, {"name": "polish"}]}, "step 2 is 'polish'"),
        ({"steps": [{"name": "threshold"}, {"name": "threshold"}]}, "step 2 is 'threshold'"),
        ({"steps": [{"name": "threshold", "size": 1}]}, "step 'threshold' has no setting 'size'"),
        ({"steps": [{"name": "threshold"}], "frame": 1}, r"steps stand alone, got \['frame'\]"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused_at_once(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PostProcess(**settings)


def test_a_threshold_that_is_no_probability_is_refused() -> None:
    for recipe in RECIPES:
        with pytest.raises(ConfigurationError, match=r"threshold|low"):
            postprocess(probability(), recipe=recipe, threshold=1.5)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.zeros((4, 4), np.float32), r"must be \(D, H, W\) and not empty, got shape \(4, 4\)"),
        (np.zeros((0, 4, 4), np.float32), "not empty"),
        (np.full((4, 4, 4), np.nan, np.float32), "runs from nan"),
        (np.full((4, 4, 4), 1.5, np.float32), "apply the activation once"),
        (np.zeros((4, 4, 4), np.int32), "has type int32"),
    ],
)
def test_what_is_no_probability_is_refused(volume: NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        postprocess(volume)


def test_smoothing_mends_a_porous_sheet_and_is_told_in_the_record() -> None:
    porous = probability()
    porous[:, 20:23][np.random.default_rng(0).random((SIDE, 3, SIDE)) < 0.25] = OFF
    rough, mended = (postprocess(porous, frame=0, smoothing=sigma) for sigma in (0, 1.0))
    assert topology_score(rough.mask, TRUTH)["score"] < 1
    assert topology_score(mended.mask, TRUTH)["score"] == 1
    assert mended.record[0]["settings"] == {"sigma": 1.0, "sheet_thickness": 2}
    assert "betti_after" in mended.record[1]
    with pytest.raises(ConfigurationError, match="sigma"):
        postprocess(porous, smoothing=-1)
