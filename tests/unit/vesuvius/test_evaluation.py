from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.vesuvius.evaluation import SurfaceMetrics, score_row
from pipeline.vesuvius.metrics import surface_score
from pipeline.vesuvius.pictures import three_planes
from pipeline.vesuvius.sheet_measures import sheet_facts
from pipeline.vesuvius.topology import PostProcess


def sheets() -> NDArray[np.uint8]:
    label = np.zeros((32, 32, 32), np.uint8)
    label[:, 8:10] = 1
    label[:, 20:22] = 1
    return label


def probability(label: NDArray[np.uint8], inside: float = 0.55, outside: float = 0.1) -> Any:
    return np.where(label == 1, inside, outside).astype(np.float32)


def item(values: Any, label: Any, **further: Any) -> dict[str, Any]:
    tensors = {"pred": torch.as_tensor(values)[None], "label": torch.as_tensor(label)[None]}
    return {"name": "a.tif", **tensors, **further}


def completed(metric: SurfaceMetrics, name: str = "val_surface") -> dict[str, float]:
    engine = SimpleNamespace(state=SimpleNamespace(metrics={"val_surface_dice": -1.0}))
    metric.completed(engine, name)  # type: ignore[arg-type]
    return dict(engine.state.metrics)


def test_the_threshold_with_the_best_mean_is_kept() -> None:
    metric = SurfaceMetrics(thresholds=(0.05, 0.4, 0.9))
    metric.update([item(probability(sheets()), sheets())])
    found = completed(metric)
    assert found["threshold"] == 0.4
    assert found["val_surface"] == pytest.approx(1)
    assert found["val_surface_dice"] == pytest.approx(1)  # and not that of an earlier epoch


def test_unlabelled_voxels_change_nothing() -> None:
    label = sheets()
    label[:8] = 2
    noisy = probability(sheets())
    noisy[:8] = 0.99
    metric = SurfaceMetrics(thresholds=(0.4,))
    metric.update([item(noisy, label)])
    assert completed(metric)["val_dice"] == 1


def test_the_value_is_the_mean_over_the_volumes() -> None:
    label, other = sheets(), np.roll(sheets(), 5, axis=1)
    metric = SurfaceMetrics(threshold=0.5)
    metric.update([item(probability(label), label), item(probability(other), label)])
    expected = [
        surface_score((probability(truth) >= 0.5).astype(np.uint8), label)["score"]
        for truth in (label, other)
    ]
    assert completed(metric, "test_score")["test_score"] == pytest.approx(np.mean(expected))
    assert [row["score"] for row in metric.per_image] == pytest.approx(expected)


def test_a_row_tells_what_repair_changed() -> None:
    label = sheets()
    holed = probability(label, inside=0.9)
    holed[10:12, 8:10, 10:12] = 0.2  # a hole through one sheet, of which a trace is left
    metric = SurfaceMetrics(threshold=0.5, repair=PostProcess(threshold=0.5, frame=0))
    metric.update([item(holed, label, stratum="s1")])
    (row,) = metric.per_image
    assert row["cut_topology"] < 0.5
    assert row["topology"] == 1
    assert row["stratum"] == "s1"
    assert row["k1"] == "0/0/0"


def test_a_score_is_that_of_the_competition_laid_out_flat() -> None:
    label = sheets()
    mask = np.roll(label, 1, axis=1)
    found, row = surface_score(mask, label), score_row(mask, label)
    for key in ("score", "surface_dice", "voi_score", "voi_split", "voi_merge"):
        assert row[key] == found[key]
    assert row["topology"] == found["topology"]["score"]


def test_sheets_are_counted_and_measured() -> None:
    numbers, facts = sheet_facts(sheets())
    assert facts["sheets"] == 2
    assert facts["foreground"] + facts["background"] == 32**3
    assert facts["largest_sheet_voxels"] == 32 * 32 * 2
    assert set(facts["sheet_faces"].values()) == {2 * 32 * 32}
    assert len(np.unique(numbers)) == 3


def test_nothing_found_is_no_sheet() -> None:
    assert sheet_facts(np.zeros((4, 4, 4), np.uint8))[1]["sheets"] == 0


def test_a_picture_shows_three_planes_before_and_after() -> None:
    label = sheets()
    picture = three_planes(probability(label), label > 0, label, label)
    assert picture.shape[2] == 3
    assert picture.shape[0] == pytest.approx(picture.shape[1], rel=0.02)
    green = (picture == np.array([30, 165, 67])).all(axis=-1) | (picture[..., 1] > 150)
    assert green.any()
