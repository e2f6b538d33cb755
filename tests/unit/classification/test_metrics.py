from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.metrics import ConfusionMatrix, TopKCategoricalAccuracy
from monai.metrics import compute_roc_auc
from numpy.typing import NDArray
from sklearn import metrics as oracle
from torch.nn import functional

from pipeline.classification.metrics import (
    area_under_curve,
    best_temperature,
    class_metrics,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    log_probabilities,
    top_k_accuracy,
)
from pipeline.errors import ConfigurationError, InputError

Arrays = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]


def drawn(classes: int = 7, samples: int = 60, seed: int = 0, coarse: bool = False) -> Arrays:
    """Logits, labels of all classes but the last, and weights; `coarse` logits have ties."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.standard_normal((samples, classes))
    logits = logits.round() if coarse else logits
    label = generator.integers(0, max(classes - 1, 2), samples)
    return logits, label, generator.random(samples) + 0.1


def brute_force(
    logits: Sequence[Sequence[float]], label: Sequence[int], weights: Sequence[float], k: int = 5
) -> dict[str, float]:
    """The figures by their definitions, a sample and a class at a time."""
    classes = len(logits[0])
    right = top = nll = total = 0.0
    bins: dict[int, float] = {}
    tp, fp, fn = ([0.0] * classes for _ in range(3))
    for row, truth, weight in zip(logits, label, weights, strict=True):
        odds = [math.exp(value) for value in row]
        p = [value / sum(odds) for value in odds]
        order = sorted(range(classes), key=lambda c: (-row[c], c))
        guess = order[0]
        right += weight * (guess == truth)
        top += weight * (truth in order[:k])
        nll -= weight * math.log(p[truth])
        total += weight
        if guess == truth:
            tp[truth] += weight
        else:
            fp[guess] += weight
            fn[truth] += weight
        place = math.ceil(p[guess] * 15)
        bins[place] = bins.get(place, 0.0) + weight * ((guess == truth) - p[guess])
    there = [c for c in range(classes) if tp[c] + fn[c] > 0]
    found = {
        "accuracy": right / total,
        "balanced_accuracy": sum(tp[c] / (tp[c] + fn[c]) for c in there) / len(there),
        "macro_f1": sum(2 * tp[c] / (2 * tp[c] + fp[c] + fn[c]) for c in there) / len(there),
        "nll": nll / total,
        "ece": sum(abs(gap) for gap in bins.values()) / total,
    }
    return found | ({f"top{k}": top / total} if k < classes else {})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("classes", [3, 5, 6, 11])
def test_every_figure_equals_its_definition(classes: int, coarse: bool, weighted: bool) -> None:
    logits, label, weights = drawn(classes, seed=classes, coarse=coarse)
    found = classification_metrics(logits, label, weights if weighted else None)
    share = weights.tolist() if weighted else [1.0] * len(label)
    expected = brute_force(logits.tolist(), label.tolist(), share)
    assert found == pytest.approx(expected, rel=1e-12)
    assert ("top5" in found) == (classes > 5)


def test_a_sample_of_weight_2_counts_as_two_samples() -> None:
    logits, label, _ = drawn()
    weights = np.ones(len(label), int)
    weights[::3] = 2
    twice = np.repeat(np.arange(len(label)), weights)
    expected = classification_metrics(logits[twice], label[twice])
    assert classification_metrics(logits, label, weights) == pytest.approx(expected)


def test_a_sample_of_weight_0_does_not_count() -> None:
    logits, label, weights = drawn()
    weights[label == 2] = 0
    kept = label != 2
    expected = classification_metrics(logits[kept], label[kept], weights[kept])
    assert classification_metrics(logits, label, weights) == pytest.approx(expected)


def test_one_logit_gives_the_figures_of_the_two_logits_that_mean_the_same() -> None:
    logits, _, weights = drawn(1)
    label = np.random.default_rng(1).integers(0, 2, len(logits))
    two = np.concatenate([np.zeros_like(logits), logits], axis=1) + 3.0
    found = classification_metrics(logits, label, weights)
    assert found == pytest.approx(classification_metrics(two, label, weights))
    assert set(found) == {"accuracy", "balanced_accuracy", "macro_f1", "nll", "ece", "auc"}


def test_a_logit_of_0_is_the_first_class() -> None:
    label = np.array([0])
    assert classification_metrics(np.zeros((1, 1)), label)["accuracy"] == 1
    assert classification_metrics(np.zeros((1, 4)), label)["accuracy"] == 1


@pytest.mark.parametrize("scale", [1, 1000])
def test_log_probabilities_equal_torchs_and_stay_finite(scale: int) -> None:
    logits = drawn()[0] * scale
    expected = functional.log_softmax(torch.from_numpy(logits), dim=1).numpy()
    np.testing.assert_allclose(log_probabilities(logits), expected, rtol=1e-12, atol=1e-12)
    one = log_probabilities(logits[:, :1])
    np.testing.assert_allclose(
        one[:, 1], functional.logsigmoid(torch.from_numpy(logits[:, 0])).numpy(), atol=1e-12
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_figures_of_classes_that_occur_equal_scikit_learns(weighted: bool) -> None:
    logits, label, weights = drawn(seed=4)
    share = weights if weighted else None
    predicted = logits.argmax(axis=1)
    matrix = confusion_matrix(predicted, label, 7, share)
    settings: dict[str, Any] = {"labels": range(7), "sample_weight": share}
    np.testing.assert_allclose(matrix, oracle.confusion_matrix(label, predicted, **settings))
    found = class_metrics(matrix)
    there = found["support"] > 0
    for name in ("recall", "precision", "f1"):
        score = getattr(oracle, f"{name}_score")
        expected = score(label, predicted, average=None, zero_division=np.nan, **settings)
        np.testing.assert_allclose(found[name][there], expected[there])
    found_all = classification_metrics(logits, label, share)
    expected_nll = oracle.log_loss(
        label, np.exp(log_probabilities(logits)), labels=range(7), sample_weight=share
    )
    assert found_all["nll"] == pytest.approx(expected_nll)


def test_confusion_and_top_k_equal_ignites() -> None:
    logits, label, _ = drawn()
    pair = (torch.from_numpy(logits), torch.from_numpy(label))
    counts, top = ConfusionMatrix(7), TopKCategoricalAccuracy(3)
    for metric in (counts, top):
        metric.update(pair)
    np.testing.assert_array_equal(
        confusion_matrix(logits.argmax(1), label, 7), counts.compute().numpy()
    )
    assert top_k_accuracy(logits, label, 3) == pytest.approx(top.compute())


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(0, 3)), max_size=30),
)
def test_auc_is_the_share_of_pairs_in_order_ties_half(rows: list[tuple[int, int, int]]) -> None:
    pairs = right = 0.0
    for one, one_label, one_weight in rows:
        for other, other_label, other_weight in rows:
            if one_label > other_label:
                weight = one_weight * other_weight
                pairs += weight
                right += weight * ((one > other) + 0.5 * (one == other))
    score, label, weight = (np.array([row[n] for row in rows], int) for n in range(3))
    found = area_under_curve(score, label, weight)
    assert found == pytest.approx(right / pairs if pairs else math.nan, nan_ok=True)


def test_auc_equals_monais() -> None:
    generator = np.random.default_rng(0)
    score, label = generator.integers(0, 9, 50).astype(float), generator.integers(0, 2, 50)
    expected = compute_roc_auc(torch.from_numpy(score), torch.from_numpy(label))
    assert area_under_curve(score, label) == pytest.approx(expected)


def test_classes_without_a_sample_are_nan_and_left_out_of_means() -> None:
    logits, label, _ = drawn()
    assert 6 not in label
    found = class_metrics(confusion_matrix(logits.argmax(1), label, 7))
    assert found["predicted"][6] > 0
    assert all(np.isnan(found[name][6]) for name in ("recall", "precision", "f1"))
    assert not any(np.isnan(found[name][:6]).any() for name in ("recall", "f1"))
    means = classification_metrics(logits, label)
    assert means["balanced_accuracy"] == pytest.approx(found["recall"][:6].mean())
    assert means["macro_f1"] == pytest.approx(found["f1"][:6].mean())


def test_a_class_that_is_never_predicted_has_f1_0_and_no_precision() -> None:
    found = class_metrics(np.array([[3, 0], [2, 0]]))
    assert np.isnan(found["precision"][1])
    assert (found["recall"][1], found["f1"][1]) == (0, 0)
    np.testing.assert_array_equal(found["precision"][0], 0.6)


def test_a_perfect_classifier_has_the_best_figures() -> None:
    label = np.arange(12) % 6
    found = classification_metrics(60 * np.eye(6)[label], label)
    ones = {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "top5": 1}
    assert found == pytest.approx({**ones, "nll": 0, "ece": 0}, abs=1e-12)


def test_always_the_largest_class_is_right_as_often_as_it_occurs() -> None:
    label = np.array([0] * 9 + [1, 2])
    logits = np.tile([5.0, 0, 0], (11, 1))
    found = classification_metrics(logits, label)
    assert found["accuracy"] == pytest.approx(9 / 11)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["macro_f1"] == pytest.approx(2 * 9 / (9 + 11) / 3)


def test_calibration_error_is_0_where_confidence_is_the_accuracy() -> None:
    probability = np.tile([0.75, 0.25], (8, 1))
    label = np.array([0, 0, 0, 1] * 2)
    assert expected_calibration_error(probability, label) == pytest.approx(0)
    assert expected_calibration_error(probability, np.zeros(8, int)) == pytest.approx(0.25)


def test_a_confidence_between_two_bins_belongs_to_the_lower_one() -> None:
    probability, label = np.array([[0.5, 0.5], [0.75, 0.25]]), np.array([1, 0])
    assert expected_calibration_error(probability, label, bins=2) == pytest.approx(0.375)


def test_top_k_grows_with_k_from_the_accuracy_on() -> None:
    logits, label, weights = drawn()
    shares = [top_k_accuracy(logits, label, k, weights) for k in range(1, 7)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(classification_metrics(logits, label, weights)["accuracy"])


def test_without_a_sample_everything_is_nan() -> None:
    found = classification_metrics(np.zeros((0, 9)), np.zeros(0, int))
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("logits", "label", "weights", "message"),
    [
        (np.zeros(3), [0] * 3, None, r"shape \(3,\), expected \(N, K\)"),
        (np.full((2, 3), np.nan), [0, 0], None, "of 2 samples are not finite"),
        (np.zeros((2, 3)), [0, 3], None, "from 0 to 3, expected class numbers from 0 to 2"),
        (np.zeros((2, 3)), [-1, 0], None, "from -1 to 0"),
        (np.zeros((2, 3)), [0.0, 1.0], None, "label holds float64"),
        (np.zeros((2, 1)), [0, 2], None, "from 0 to 1"),
        (np.zeros((2, 3)), [0], None, r"label has the shape \(1,\), expected \(2,\)"),
        (np.zeros((2, 3)), [0, 1], [1, -1], "weights must be finite and at least 0"),
        (np.zeros((2, 3)), [0, 1], [1], "weights has the shape"),
    ],
    ids=range(9),
)
def test_what_does_not_fit_is_named(logits: Any, label: Any, weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classification_metrics(logits, np.array(label), weights)


@pytest.mark.parametrize("k", [0, 3])
def test_a_top_k_that_says_nothing_is_refused(k: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"top_k must be in 1\.\.2 of 3 classes, got {k}"):
        top_k_accuracy(np.zeros((1, 3)), np.zeros(1, int), k)


def test_the_best_temperature_undoes_a_scaling_of_calibrated_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    probability = np.exp(log_probabilities(logits))
    label = np.array([rng.choice(3, p=row) for row in probability])
    assert best_temperature(logits, label) == pytest.approx(1, abs=0.1)
    assert best_temperature(3 * logits, label) == pytest.approx(3, abs=0.3)


def test_the_temperature_of_a_perfect_classifier_stays_bounded():
    logits = np.array([[5.0], [-5.0]])
    assert best_temperature(logits, np.array([1, 0])) == pytest.approx(0.25, rel=1e-3)
