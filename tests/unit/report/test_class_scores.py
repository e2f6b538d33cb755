from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.class_scores import (
    SCORES,
    _interval,
    said_of,
    score_difference,
    score_interval,
)

pairs = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=2, max_size=25
)


def said(found):
    return {str(number): pair for number, pair in enumerate(found)}


@given(pairs)
def test_the_scores_are_those_of_sklearn(found):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = zip(*found, strict=True)
    whole = np.ones((1, len(found)))
    labels = sorted(set(truth))  # a class without an image is left out
    expected = metrics.f1_score(truth, predicted, labels=labels, average="macro", zero_division=0)
    assert SCORES["macro_f1"](whole, found)[0] == pytest.approx(expected)
    recall = metrics.recall_score(truth, predicted, labels=labels, average="macro", zero_division=0)
    assert SCORES["balanced_accuracy"](whole, found)[0] == pytest.approx(recall)


@given(pairs, st.sampled_from(sorted(SCORES)))
def test_an_interval_lies_between_0_and_1_and_in_order(found, score):
    low, high = score_interval(score, said(found))
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize("score", sorted(SCORES))
def test_a_perfect_classifier_is_perfect_in_every_resample(score):
    assert score_interval(score, said([("a", "a"), ("b", "b")] * 5)) == (1.0, 1.0)


def test_drawing_kinds_is_drawing_images():
    rng = np.random.default_rng(0)
    found = [(t, t if rng.random() < 0.7 else "a") for t in rng.choice(list("abc"), 60)]
    compute, values = SCORES["macro_f1"], []
    for _ in range(2000):
        drawn = [found[k] for k in rng.integers(0, 60, 60)]
        values.append(compute(np.ones((1, 60)), drawn)[0])
    expected = np.quantile(values, [0.025, 0.975])
    np.testing.assert_allclose(score_interval("macro_f1", said(found)), expected, atol=0.01)


def test_the_same_answers_do_not_differ_and_opposite_ones_do():
    truth = [("a", "a"), ("b", "b")] * 10
    wrong = [("a", "b"), ("b", "a")] * 10
    assert score_difference("macro_f1", said(truth), said(truth)) == (0, 0, 0)
    assert score_difference("macro_f1", said(wrong), said(truth)) == (-1, -1, -1)


def test_what_is_hard_for_both_cancels():
    rng = np.random.default_rng(1)
    first = [(t, t if rng.random() < 0.5 else "c") for t in rng.choice(list("ab"), 80)]
    better = [(t, t) if n < 8 else (t, p) for n, (t, p) in enumerate(first)]
    _, low, high = score_difference("macro_f1", said(better), said(first))
    alone = score_interval("macro_f1", said(better))
    assert high - low < 0.7 * (alone[1] - alone[0])


def test_other_images_or_another_truth_are_not_paired():
    one = said([("a", "a"), ("b", "b")])
    assert score_difference("macro_f1", one, said([("a", "a"), ("a", "b")])) is None
    assert score_difference("macro_f1", one, said([("a", "a")])) is None


def test_one_image_has_no_interval():
    assert score_interval("macro_f1", said([("a", "a")])) is None
    assert _interval([(SCORES["macro_f1"], [])], 0) is None


def test_rows_of_a_segmentation_say_no_class():
    assert said_of([{"image": "a", "dice": 1.0}]) == {}
    rows = [{"image": "a", "truth": "x", "predicted": "y"}]
    assert said_of(rows) == {"a": ("x", "y")}
