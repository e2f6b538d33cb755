from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.classification.metrics import CALIBRATION_BINS, expected_calibration_error
from pipeline.report.calibration import BINS, calibration_of

answers = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40)


def rows_of(found):
    return [{"predicted_probability": p, "correct": right} for p, right in found]


@given(answers, st.randoms(use_true_random=False))
def test_order_decides_nothing_and_no_answer_is_lost(found, random):
    one = calibration_of(rows_of(found))
    other = calibration_of(rows_of(random.sample(found, len(found))))
    assert one.counts.sum() == len(found)
    assert one.error == pytest.approx(other.error)
    assert abs(one.bias) <= one.error + 1e-12


@given(answers)
def test_the_error_lies_between_0_and_1(found):
    assert 0 <= calibration_of(rows_of(found)).error <= 1


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_the_error_is_that_of_the_classifiers_metrics(seed, classes):
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.full(classes, 0.5), size=30)
    label = rng.integers(0, classes, 30)
    predicted = probability.argmax(axis=1)
    rows = rows_of(
        [(float(p[k]), bool(k == t)) for p, k, t in zip(probability, predicted, label, strict=True)]
    )
    assert BINS == CALIBRATION_BINS
    expected = expected_calibration_error(probability, label)
    assert calibration_of(rows).error == pytest.approx(expected)


def test_a_bin_holds_its_upper_end():
    found = calibration_of(rows_of([(p, True) for p in (0.0, 0.5, 0.51, 1.0)]), bins=2)
    assert found.counts.tolist() == [2, 2]


def test_a_sure_and_always_wrong_classifier_has_the_largest_error():
    found = calibration_of(rows_of([(1.0, False)] * 3))
    assert (found.error, found.bias) == (1.0, 1.0)
    assert calibration_of(rows_of([(1.0, True)] * 3)).error == 0


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"image": "a", "dice": 0.5}],
        [{"predicted_probability": None, "correct": True}],
        [{"predicted_probability": float("nan"), "correct": True}],
        [{"predicted_probability": 1.5, "correct": True}],
        [{"predicted_probability": 0.5, "correct": 1}],
    ],
)
def test_rows_that_tell_nothing_have_no_calibration(rows):
    assert calibration_of(rows) is None
