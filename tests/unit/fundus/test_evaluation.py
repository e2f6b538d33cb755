"""Vessel metrics as MONAI's evaluator sees them, and what an evaluation draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ignite.engine import Engine

from pipeline.data.cases import Cases, inputs_below
from pipeline.errors import ConfigurationError, InputError
from pipeline.fundus.cases import training_cases
from pipeline.fundus.evaluation import VesselMetrics
from pipeline.fundus.metrics import choose_threshold, pooled_metrics, vessel_metrics
from pipeline.fundus.results import EvaluationWriter, ResultWriter, overlay
from pipeline.inference.batch import BatchRun


@pytest.fixture
def items() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    made = []
    for number in range(3):
        label = generator.random((20, 30)) < 0.2
        noise = generator.random(label.shape)
        probability = np.clip(0.5 * label + 0.5 * noise, 0, 1).astype(np.float32)
        fov = np.ones((20, 30), np.uint8)
        fov[:, :3] = 0
        made.append(
            {
                "pred": torch.from_numpy(probability)[None],
                "native_label": torch.from_numpy(label.astype(np.float32))[None],
                "native_fov": torch.from_numpy(fov)[None],
                "name": f"eye_{number}.png",
                "fov_source": "given",
                "image_path": f"eye_{number}.png",
            }
        )
    return made


def maps(items: list[dict[str, Any]]) -> list[Any]:
    keys = ("pred", "native_label", "native_fov")
    arrays = [[item[key][0].numpy() for key in keys] for item in items]
    return [(pred, label > 0, fov > 0) for pred, label, fov in arrays]


def evaluated(metric: VesselMetrics, items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    engine = Engine(lambda engine, batch: None)
    metric.reset()
    for item in items:
        metric.update([item])
    metric.completed(engine, name)
    return dict(engine.state.metrics)


def test_validation_chooses_the_threshold_and_scores_with_it(items: list[dict[str, Any]]) -> None:
    found = evaluated(VesselMetrics(), items, "val_dice")
    threshold = choose_threshold(maps(items))
    expected = pooled_metrics(maps(items), threshold)
    assert found["threshold"] == threshold
    assert {key: found[f"val_{key}"] for key in expected} == expected


def test_a_given_threshold_is_never_chosen_again(items: list[dict[str, Any]]) -> None:
    metric = VesselMetrics(threshold=0.3, per_image_rows=True)
    found = evaluated(metric, items, "test_dice")
    assert found["threshold"] == 0.3
    assert found["test_dice"] == pooled_metrics(maps(items), 0.3)["dice"]


def test_each_image_has_a_row_with_its_own_scores(items: list[dict[str, Any]]) -> None:
    metric = VesselMetrics(threshold=0.4, per_image_rows=True)
    found = evaluated(metric, items, "test_dice")
    assert [row["image"] for row in metric.per_image] == ["eye_0.png", "eye_1.png", "eye_2.png"]
    for row, case in zip(metric.per_image, maps(items), strict=True):
        expected = vessel_metrics(*case, threshold=0.4)
        assert {key: row[key] for key in expected} == expected
        assert row["fov"] == "given"
        assert 0 < row["vessel_density"] < 1
    mean = np.mean([row["dice"] for row in metric.per_image])
    assert found["test_dice_mean"] == pytest.approx(mean)


def test_strata_of_the_manifest_have_means_of_their_own(
    items: list[dict[str, Any]], tmp_path: Path
) -> None:
    for item, stratum in zip(items, ("A", "G", "A"), strict=True):
        item["stratum"] = stratum
    metric = VesselMetrics(threshold=0.4, per_image_rows=True)
    evaluated(metric, items, "test_dice")
    metric.cases, metric.items = [], []  # the maps are not what is tested
    EvaluationWriter(str(tmp_path), metric, {}).write()
    strata = yaml.safe_load((tmp_path / "test_metrics.yaml").read_text())["strata"]
    dice = [row["dice"] for row in metric.per_image]
    assert strata["A"]["images"] == 2
    assert strata["A"]["dice"] == pytest.approx((dice[0] + dice[2]) / 2)
    assert strata["G"]["dice"] == pytest.approx(dice[1])


def test_an_overlay_tells_agreement_from_errors() -> None:
    photograph = np.full((3, 1, 3), 100, np.uint8)
    mask, truth = np.array([[True], [True], [False]]), np.array([[True], [False], [True]])
    drawn = overlay(photograph, mask, truth)[:, 0]
    assert [int(pixel.argmax()) for pixel in drawn] == [1, 0, 2]  # green, red, blue


def test_a_picture_never_replaces_an_input(tmp_path: Path) -> None:
    names = ("eye.png", "pictures/eye.png")
    (tmp_path / "pictures").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    cases = [{"image": str(tmp_path / name), "name": name} for name in names]
    batch = BatchRun(cases, str(tmp_path), {}, None, "fundus_vessels")
    given = {"name": names[0], "native_image": torch.zeros(3, 20, 30), "fov_source": "given"}
    made = {"pred": torch.zeros(1, 20, 30), "native_fov": torch.ones(1, 20, 30)}
    engine = Engine(lambda engine, items: [made])
    ResultWriter(batch, 0.5).attach(engine)
    with pytest.raises(InputError, match="would overwrite the input"):
        engine.run([[given]])
    assert (tmp_path / "pictures/eye.png").read_bytes() == b"mine"


def test_an_overlay_of_a_large_photograph_is_shown_smaller() -> None:
    shown = overlay(np.zeros((1200, 1800, 3), np.uint8), np.zeros((1200, 1800), bool))
    assert shown.shape == (600, 900, 3)


def test_without_data_the_phantom_is_used_and_named(tmp_path: Path) -> None:
    cases = training_cases(None, "drive", str(tmp_path / "phantom"))
    assert "PHANTOM" in cases.facts[0]
    assert [len(cases.train), len(cases.val), len(cases.test)] == [8, 2, 2]
    assert "8 / 2 / 2" in cases.facts[1]


def test_a_split_without_labels_is_refused_naming_those_that_have_some() -> None:
    labelled = {"image": "a.png", "label": "b.png"}
    cases = Cases([labelled], [], [{"image": "c.png", "label": None}], ())
    assert cases.split("all") == [labelled]
    with pytest.raises(ConfigurationError, match=r"train 1, val 0, test 0, all 1"):
        cases.split("test")
    with pytest.raises(ConfigurationError, match="expected one of train, val, test, all"):
        cases.split("holdout")


def test_inference_needs_a_folder_and_no_results_inside_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dataset_dir is not set"):
        inputs_below(None, "images", str(tmp_path))
    with pytest.raises(ConfigurationError, match="lies in dataset_dir"):
        inputs_below(str(tmp_path), "images", str(tmp_path / "out"))
    with pytest.raises(InputError, match=str(tmp_path)):
        inputs_below(str(tmp_path), "images", "elsewhere")
