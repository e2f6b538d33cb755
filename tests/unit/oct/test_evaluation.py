from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.oct.coordinates import extract_layers
from pipeline.oct.evaluation import LayerMetrics, layers_in_source
from pipeline.oct.frames import rows_to_height
from pipeline.oct.transforms import render_label

FRAME, SOURCE = (60, 24), (62, 24)  # as 480 rows and 496 are to each other


def logits_of(ilm: Any, bm: Any, height: int = FRAME[0], sure: float = 12.0) -> torch.Tensor:
    """The logits `(3, h, w)` of a network that is right, for rows in its frame."""
    rows = np.arange(height)[:, None]
    ilm, bm = (np.asarray(row, np.float64)[None] for row in (ilm, bm))
    above, below = ilm - rows - 0.5, rows - bm + 0.5
    inside = np.minimum(-above, -below)
    planes = np.stack([above, inside, below])
    return torch.from_numpy(np.clip(sure * planes, -30, 30).astype(np.float32))


def item(ilm: Any = 20.0, bm: Any = 40.0, off: float = 0.0, **further: Any) -> dict[str, Any]:
    """A B-scan whose true rows are given, in the source's frame, and predicted `off` rows below."""
    ilm, bm = (np.broadcast_to(np.asarray(row, np.float64), SOURCE[1]) for row in (ilm, bm))
    seen = [
        rows_to_height(np.nan_to_num(r, nan=30.0) + off, *(SOURCE[0], FRAME[0])) for r in (ilm, bm)
    ]
    truth = {"ilm_source": torch.from_numpy(ilm.copy()), "bm_source": torch.from_numpy(bm.copy())}
    return {
        "name": "a",
        "subject": "p1",
        "pred": logits_of(seen[0], seen[1]),
        **truth,
        "source_shape": torch.tensor(SOURCE),
        "scale_y_um": 4.0,
        **further,
    }


def completed(metric: LayerMetrics, name: str = "val_mae_px", **before: float) -> dict[str, float]:
    engine = SimpleNamespace(state=SimpleNamespace(metrics=dict(before)))
    metric.completed(engine, name)  # type: ignore[arg-type]
    return dict(engine.state.metrics)


@given(
    row=st.floats(5, 50),
    height=st.integers(40, 120),
    new_height=st.integers(40, 120),
)
@settings(max_examples=30)
def test_rows_come_back_in_the_frame_of_the_source(
    row: float, height: int, new_height: int
) -> None:
    row = row * height / 62
    ilm = np.full(16, row)
    seen = rows_to_height(ilm, height, new_height)
    logits = logits_of(seen, np.minimum(seen + 5, new_height - 1), new_height)[None]
    found = layers_in_source(logits, {}, (height, 16))
    assert abs(found.ilm_px - row).max() <= 0.51 * height / new_height


def test_a_prediction_that_is_off_by_rows_of_the_source_scores_these() -> None:
    metric = LayerMetrics({})
    metric.update([item(off=0), item(off=4.0, name="b", subject="p2")])
    found = completed(metric)
    for boundary in ("ilm", "bm"):
        assert found[f"val_{boundary}_mae_px"] == pytest.approx(2.0, abs=0.5)
    errors = [row["ilm_mae_px"] for row in metric.per_image]
    assert errors == pytest.approx([0.0, 4.0], abs=0.5)  # not 4 * 60 / 62: rows of the source
    assert [row["ilm_bias_px"] for row in metric.per_image] == pytest.approx([0, 4.0], abs=0.5)


def test_the_value_is_the_mean_of_both_boundaries_over_eyes_and_not_over_columns() -> None:
    metric = LayerMetrics({})
    metric.update([item(off=0, subject="p1"), item(off=0, subject="p1"), item(off=6, subject="p2")])
    rows = metric.per_image
    each = [(row["ilm_mae_px"] + row["bm_mae_px"]) / 2 for row in rows]
    value = completed(metric)["val_mae_px"]
    assert value == metric.compute() == pytest.approx((np.mean(each[:2]) + each[2]) / 2)
    assert value > np.mean(each) + 0.5


def test_an_eye_is_what_scans_are_grouped_by_where_it_is_known() -> None:
    metric = LayerMetrics({})
    metric.update([item(eye="p1_OD"), item(eye="p1_OS")])
    assert set(metric.figures()["per_subject"]) == {"p1_OD", "p1_OS"}


def test_columns_that_nobody_annotated_count_nowhere() -> None:
    ilm = np.full(SOURCE[1], 20.0)
    ilm[:8] = np.nan  # where the prediction is 10 rows away
    metric = LayerMetrics({})
    metric.update([item(ilm=ilm)])
    (row,) = metric.per_image
    assert row["ilm_columns"] == SOURCE[1] - 8
    assert row["ilm_mae_px"] < 0.5
    assert row["bm_columns"] == SOURCE[1]


def test_a_scan_without_annotated_columns_leaves_its_figures_out() -> None:
    metric = LayerMetrics({})
    metric.update([item(ilm=math.nan, bm=math.nan)])
    found = completed(metric, val_ilm_mae_px=-1.0)
    assert math.isnan(found["val_mae_px"])
    assert "val_ilm_mae_px" not in found  # and not that of an earlier epoch
    assert "threshold" not in found


def test_without_scans_the_value_is_nan() -> None:
    found = completed(LayerMetrics({}))
    assert set(found) == {"val_mae_px"}
    assert math.isnan(found["val_mae_px"])


def test_the_figures_told_have_the_prefix_of_the_name() -> None:
    metric = LayerMetrics({})
    ilm, bm = torch.full((SOURCE[1],), 19.0), torch.full((SOURCE[1],), 38.0)
    metric.update([item(label=render_label(ilm, bm, FRAME[0])[None])])
    expected = {f"test_{b}_{f}" for b in ("ilm", "bm") for f in ("mae_px", "p95_px", "coverage")}
    expected |= {"test_mae_px", "test_thickness_mae_px", "test_dice", "test_coverage"}
    found = completed(metric, "test_mae_px")
    assert set(found) == expected | {"max_sigma_px", "threshold"}
    assert all(isinstance(value, float) for value in found.values())


def test_the_sigma_told_leaves_the_wanted_share_of_annotated_columns_valid() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = [item(ilm=k + 15.0, name=str(k)) for k in range(4)]
    for one in noisy:
        one["pred"] = one["pred"] + 14 * torch.randn(one["pred"].shape, generator=generator)
    first = LayerMetrics({"max_sigma_px": 1e9}, coverage=0.8)
    first.update(noisy)
    sigma = completed(first)["threshold"]
    then = LayerMetrics({"max_sigma_px": sigma})
    then.update(noisy)
    # The rows' own limits (inside the frame) may take a column more.
    assert completed(then)["val_coverage"] == pytest.approx(0.8, abs=0.03)
    found = extract_layers(torch.stack([one["pred"] for one in noisy]))
    sigmas = np.stack([found.ilm_sigma_px, found.bm_sigma_px])
    assert (sigmas <= sigma).mean() == pytest.approx(0.8, abs=1 / sigmas.size)


def test_dice_is_of_the_classes_and_leaves_the_ignored_out() -> None:
    one = item()
    found = extract_layers(one["pred"][None])
    ilm, bm = (torch.from_numpy(rows[0]) for rows in (found.ilm_px, found.bm_px))
    label = render_label(ilm, bm, FRAME[0])
    label[:, :4] = 255
    wrong = one["pred"].clone()
    wrong[:, :, :4] = wrong[:, :, :4].flip(0)
    metric = LayerMetrics({})
    metric.update([{**one, "pred": wrong, "label": label[None]}])
    assert completed(metric)["val_dice"] == 1
    metric.reset()
    metric.update([{**one, "pred": wrong, "label": render_label(ilm, bm, FRAME[0])[None]}])
    assert completed(metric)["val_dice"] < 0.95


def test_a_label_with_rows_below_scores_as_one_without() -> None:
    ilm, bm = torch.full((SOURCE[1],), 18.0), torch.full((SOURCE[1],), 40.0)
    label = render_label(ilm, bm, FRAME[0])
    longer = torch.cat([label.float(), torch.stack([ilm, bm])])
    values = []
    for one in (label, longer):
        metric = LayerMetrics({})
        metric.update([item(label=one[None])])
        values.append(completed(metric)["val_dice"])
    assert values[0] == values[1] < 1


def test_the_originals_extraction_stands_beside_ours() -> None:
    one = item()
    one["pred"][:, 3:5, :6] = torch.tensor([-30.0, 30, -30])[:, None, None]  # an island of retina
    metric = LayerMetrics({}, compare_transition=True)
    metric.update([one])
    (row,) = metric.per_image
    assert row["ilm_mae_px"] < 0.5
    assert row["transition_ilm_mae_px"] == pytest.approx(17 * 6 / SOURCE[1], abs=0.6)
    assert row["transition_ilm_max_px"] > 16
    assert metric.figures()["overall"]["transition_ilm_mae_px"] == row["transition_ilm_mae_px"]
    plain = LayerMetrics({})
    plain.update([one])
    assert not [key for key in plain.per_image[0] if key.startswith("transition")]


def test_a_thickness_window_in_micrometres_is_meant_at_the_scale_of_the_logits() -> None:
    # 20 rows of the logits, of 62 / 60 * 4 um each: 82.7 um.
    for window, valid in (((70, 90), 1.0), ((90, 110), 0.0), ((81, 84), 1.0)):
        metric = LayerMetrics({"thickness_um": window, "refine": False, "max_sigma_px": 1e9})
        metric.update([item(ilm=20.0, bm=40.0, scale_y_um=4.0)])
        assert metric.per_image[0]["ilm_coverage"] == valid, window
    metric.update([item(scale_y_um=math.nan)])  # where it cannot be told, it does not count
    assert metric.per_image[-1]["ilm_coverage"] == 1.0
    assert "ilm_mae_um" not in metric.per_image[-1]
    assert metric.per_image[0]["ilm_mae_um"] == pytest.approx(4 * metric.per_image[0]["ilm_mae_px"])


def test_a_watch_gets_the_item_and_its_rows() -> None:
    seen: list[Any] = []
    metric = LayerMetrics({}, watch=lambda *given: seen.append(given))
    metric.update([item(name="a"), item(name="b")])
    assert [given[0]["name"] for given in seen] == ["a", "b"]
    for _, layers, scan in seen:
        np.testing.assert_array_equal(scan.predicted["ILM"], layers.ilm_px[0])
        assert layers.ilm_px.shape == (1, SOURCE[1])


def test_a_scan_without_rows_is_refused_by_name() -> None:
    one = item(name="p7_3")
    del one["bm_source"]
    with pytest.raises(InputError, match="p7_3: no annotated rows of BM"):
        LayerMetrics({}).update([one])


def test_real_rows_are_met_by_a_network_that_draws_them(lamina_data: Any) -> None:
    from pipeline.oct.formats import read_oct  # only where there are files to read

    paths = sorted((lamina_data / "oct" / "heyex_vol").glob("*.vol"))
    if not paths:
        pytest.skip("no oct/heyex_vol in LAMINA_DATA")
    metric = LayerMetrics({}, compare_transition=True)
    for path in paths:
        volume = read_oct(path)
        height = volume.bscans.shape[1]
        truth: dict[str, NDArray[Any]] = {k: volume.layers[k][0] for k in ("ILM", "BM")}
        seen = [rows_to_height(np.nan_to_num(r, nan=200.0), height, 480) for r in truth.values()]
        seen[1] = np.maximum(*seen)
        metric.update([
            {
                "name": path.name, "subject": path.stem, "pred": logits_of(seen[0], seen[1], 480),
                "ilm_source": truth["ILM"], "bm_source": truth["BM"],
                "source_shape": volume.bscans.shape[1:], "scale_y_um": volume.scale_y_um,
            }
        ])  # fmt: skip
    for row in metric.per_image:
        assert row["ilm_max_px"] < 1
        assert row["bm_max_px"] < 1
        assert row["ilm_columns"] <= 768
