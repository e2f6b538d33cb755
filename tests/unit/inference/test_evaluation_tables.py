from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.evaluation_tables import (
    EvaluationFolder,
    column_means,
    items_of,
    known_mean,
)


def test_an_item_is_what_was_given_and_what_was_made_of_it() -> None:
    batch, output = [{"name": "a", "image": 1}, {"name": "b", "image": 2}], [{"pred": 3}, {}]
    engine: Any = SimpleNamespace(state=SimpleNamespace(batch=batch, output=output))
    assert items_of(engine) == [{"name": "a", "image": 1, "pred": 3}, {"name": "b", "image": 2}]


def test_items_without_a_result_are_an_error_and_not_left_out() -> None:
    engine: Any = SimpleNamespace(state=SimpleNamespace(batch=[{}, {}], output=[{}]))
    with pytest.raises(ValueError, match="zip"):
        items_of(engine)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1))
def test_a_mean_is_that_of_the_known_values(values: list[float]) -> None:
    known = [value for value in values if not math.isnan(value)]
    expected = np.mean(known) if known else math.nan
    assert known_mean(values) == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_means_leave_out_what_is_no_number() -> None:
    rows = [{"image": "a", "x": 1.0, "y": math.nan, "ok": True}, {"image": "b", "x": 3, "z": 5.0}]
    means = column_means(rows)
    assert (means["x"], means["z"]) == (2, 5)
    assert math.isnan(means["y"])
    assert set(means) == {"x", "y", "z"}


def test_scalars_of_numpy_are_numbers() -> None:
    rows = [{"x": np.float32(1), "n": np.int64(2), "ok": np.True_}]
    assert column_means(rows) == {"x": 1.0, "n": 2.0}


@pytest.mark.parametrize("unknown", [{}, {"x": None}, {"x": math.nan}], ids=str)
def test_complete_means_are_of_columns_that_every_row_knows(unknown: dict[str, Any]) -> None:
    rows = [{"x": 1.0, "y": 1.0}, {**unknown, "y": 3.0}]
    assert column_means(rows) == {"x": 1.0, "y": 2.0}
    assert column_means(rows, complete=True) == {"y": 2.0}


def test_no_rows_have_no_means() -> None:
    assert column_means([]) == column_means([], complete=True) == {}


def test_the_tables_say_rows_summary_number_and_figures_in_this_order(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "new", {"experiment": "x", "split": "test"})
    rows = [{"image": "b", "dice": 0.5}, {"image": "a", "dice": 0.7}]
    folder.write_tables(rows, {"threshold": 0.4, "average_metrics": {"dice": 0.6}})
    assert yaml.safe_load((tmp_path / "new/per_image_metrics.yaml").read_text()) == rows
    found = yaml.safe_load((tmp_path / "new/test_metrics.yaml").read_text())
    assert list(found) == ["experiment", "split", "num_test_images", "threshold", "average_metrics"]
    assert (found["num_test_images"], found["average_metrics"]) == (2, {"dice": 0.6})


def test_what_belongs_to_an_input_keeps_its_folders(tmp_path: Path) -> None:
    folder = EvaluationFolder(str(tmp_path), {})
    assert folder.prediction("p0/eye.tif", ".csv") == tmp_path / "predictions/p0/eye.csv"
    assert folder.picture("p0/eye.tif") == tmp_path / "pictures/p0/eye.png"
