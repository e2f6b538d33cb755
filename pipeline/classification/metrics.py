"""Scores of a classifier over a set of images.

A network gives `K` logits, or one for two classes: the log-odds of the second, whose probabilities
are `(1 - p, p)`. Predicted is the class with the highest probability, of equal ones the first; so a
single logit of 0 is the first class.

What cannot be measured is NaN and is left out of means over the classes:

- recall and F1 of a class without a sample, and its precision, even where it was predicted;
- precision of a class that was never predicted; its F1 is 0;
- `auc` where a class is absent; everything without a sample.

Figures are means over the samples, weighted where weights are given, and never over batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError

__all__ = [
    "area_under_curve",
    "best_temperature",
    "class_metrics",
    "classification_metrics",
    "confusion_matrix",
    "expected_calibration_error",
    "log_probabilities",
    "top_k_accuracy",
]

Array = NDArray[np.float64]

TOP_K = 5
CALIBRATION_BINS = 15
MOST_TEMPERATURE = 4.0


def log_probabilities(logits: NDArray[Any]) -> Array:
    """Return the logarithms of the classes' probabilities, in double precision.

    Args:
        logits: `(N, K)`; `(N, 1)` for two classes.

    Returns:
        `(N, K)`, K at least 2.

    Raises:
        InputError: another shape, or a logit is NaN or infinite.
    """
    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.shape[1] < 1:
        raise InputError(f"logits have the shape {values.shape}, expected (N, K)")
    if not np.isfinite(values).all():
        raise InputError(
            f"logits of {int((~np.isfinite(values)).any(axis=1).sum())} of {len(values)} samples "
            "are not finite; train again at a lower learning rate"
        )
    if values.shape[1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=1)
    shifted = values - values.max(axis=1, keepdims=True, initial=-np.inf)
    logs: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def classification_metrics(
    logits: NDArray[Any],
    label: NDArray[Any],
    weights: NDArray[Any] | None = None,
    top_k: int = TOP_K,
) -> dict[str, float]:
    """Score a classifier.

    Args:
        logits: `(N, K)`; `(N, 1)` for two classes.
        label: `(N,)`, class numbers from 0.
        weights: `(N,)`, what each sample counts; None: all the same.
        top_k: how many guesses `top<k>` has.

    Returns:
        `accuracy`, `balanced_accuracy` (mean recall), `macro_f1`, `top<k>` where there are more
        classes than k, `nll` (mean negative log-likelihood of the truth, the plain cross entropy),
        `ece`, and with two classes `auc`.

    Raises:
        InputError: shapes differ, or a label is no class.
    """
    logs = log_probabilities(logits)
    classes = logs.shape[1]
    truth, counts = _checked(label, weights, len(logs), classes)
    predicted = logs.argmax(axis=1)
    per_class = class_metrics(confusion_matrix(predicted, truth, classes, counts))
    found = {
        "accuracy": _mean(predicted == truth, counts),
        "balanced_accuracy": _known_mean(per_class["recall"]),
        "macro_f1": _known_mean(per_class["f1"]),
    }
    if top_k < classes:
        found[f"top{top_k}"] = top_k_accuracy(logs, truth, top_k, counts)
    found["nll"] = _mean(-logs[np.arange(len(logs)), truth], counts)
    found["ece"] = expected_calibration_error(np.exp(logs), truth, CALIBRATION_BINS, counts)
    if classes == 2:
        found["auc"] = area_under_curve(logs[:, 1] - logs[:, 0], truth, counts)
    return found


def best_temperature(logits: NDArray[Any], label: NDArray[Any]) -> float:
    """Return what to divide logits by, so that their probabilities are as sure as they are right.

    It is the one with the least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599); no
    prediction changes. Few images that are all right would ask for endless sureness, so it stays
    between 0.25 and 4.

    Args:
        logits: `(N, K)`, or `(N, 1)` for two classes.
        label: class numbers `(N,)`.
    """
    from scipy.optimize import minimize_scalar

    rows, values = np.arange(len(label)), np.asarray(logits, np.float64)

    def nll(log_temperature: float) -> float:
        found = log_probabilities(values / exp(log_temperature))
        return float(-found[rows, label].mean())

    bounds = (-log(MOST_TEMPERATURE), log(MOST_TEMPERATURE))
    return exp(float(minimize_scalar(nll, bounds=bounds, method="bounded").x))


def confusion_matrix(
    predicted: NDArray[Any],
    label: NDArray[Any],
    classes: int,
    weights: NDArray[Any] | None = None,
) -> Array:
    """Count the samples by class, truth along the rows and prediction along the columns.

    Args:
        predicted: `(N,)`, class numbers.
        label: `(N,)`, class numbers.
        classes: how many there are.
        weights: `(N,)`, what each sample counts; None: 1.

    Returns:
        `(classes, classes)`.

    Raises:
        InputError: shapes differ, or a number is no class.
    """
    truth, counts = _checked(label, weights, len(predicted), classes)
    guess, _ = _checked(predicted, None, len(predicted), classes, "predicted")
    cells: Any = np.bincount(truth * classes + guess, counts, classes * classes)
    return np.asarray(cells.reshape(classes, classes), np.float64)


def class_metrics(confusion: NDArray[Any]) -> dict[str, Array]:
    """Return what a confusion matrix `(K, K)` says of each class, truth along its rows.

    Returns:
        `support` and `predicted` (samples), `recall`, `precision` and `f1`, each `(K,)`.
    """
    matrix = np.asarray(confusion, np.float64)
    right, support, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    there = support > 0
    return {
        "support": support,
        "predicted": predicted,
        "recall": _ratio(right, support, there),
        "precision": _ratio(right, predicted, there & (predicted > 0)),
        "f1": _ratio(2 * right, support + predicted, there),
    }


def top_k_accuracy(
    scores: NDArray[Any], label: NDArray[Any], k: int, weights: NDArray[Any] | None = None
) -> float:
    """Return the share of samples whose truth is among the `k` highest scores.

    Of equal scores the first classes count as the higher ones.

    Args:
        scores: `(N, K)`, any increasing function of the probabilities.
        label: `(N,)`.
        k: at least 1 and less than K, where every guess would be right.
        weights: `(N,)`; None: all count the same.

    Raises:
        ConfigurationError: `k` is out of its range.
        InputError: shapes differ, or a label is no class.
    """
    classes = scores.shape[1]
    if not 1 <= k < classes:
        raise ConfigurationError(f"top_k must be in 1..{classes - 1} of {classes} classes, got {k}")
    truth, counts = _checked(label, weights, len(scores), classes)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return _mean((best == truth[:, None]).any(axis=1), counts)


def expected_calibration_error(
    probability: NDArray[Any],
    label: NDArray[Any],
    bins: int = CALIBRATION_BINS,
    weights: NDArray[Any] | None = None,
) -> float:
    """Return how far confidence is from accuracy: 0 is a classifier that knows how sure it may be.

    The probabilities of the predicted classes are sorted into equal bins of (0, 1]; the value is
    the mean over the samples of |accuracy - mean confidence| of their bin. It depends on the bins
    and is too large for few samples.

    Args:
        probability: `(N, K)`.
        label: `(N,)`.
        bins: how many.
        weights: `(N,)`; None: all count the same.

    Raises:
        InputError: shapes differ, or a label is no class.
    """
    truth, counts = _checked(label, weights, len(probability), probability.shape[1])
    confidence = probability.max(axis=1, initial=0.0)
    gap = (probability.argmax(axis=1) == truth) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    total = counts.sum()
    return float(np.abs(np.bincount(place, counts * gap, bins)).sum() / total) if total else nan


def area_under_curve(
    score: NDArray[Any], label: NDArray[Any], weights: NDArray[Any] | None = None
) -> float:
    """Return the area under the ROC curve, exact, ties counted half; NaN where a class is absent.

    Args:
        score: `(N,)`, higher for the second class.
        label: `(N,)`, 0 and 1.
        weights: `(N,)`; None: all count the same.

    Raises:
        InputError: shapes differ, or a label is neither.
    """
    truth, counts = _checked(label, weights, len(score), 2)
    levels, place = np.unique(score, return_inverse=True)
    positive = np.bincount(place, counts * truth, len(levels))
    negative = np.bincount(place, counts * (1 - truth), len(levels))
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else nan


def _checked(
    label: NDArray[Any],
    weights: NDArray[Any] | None,
    samples: int,
    classes: int,
    name: str = "label",
) -> tuple[NDArray[np.int64], Array]:
    """Return class numbers and weights, both `(samples,)`."""
    numbers = np.asarray(label)
    counts = np.ones(samples) if weights is None else np.asarray(weights, np.float64)
    for what, array in ((name, numbers), ("weights", counts)):
        if array.shape != (samples,):
            raise InputError(f"{what} has the shape {array.shape}, expected ({samples},)")
    if samples and (numbers.dtype.kind not in "iub" or not _are_classes(numbers, classes)):
        raise InputError(
            f"{name} holds {numbers.dtype} from {numbers.min()} to {numbers.max()}, expected class "
            f"numbers from 0 to {classes - 1}; see the list of classes"
        )
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise InputError("weights must be finite and at least 0")
    return numbers.astype(np.int64), counts


def _are_classes(numbers: NDArray[Any], classes: int) -> bool:
    return bool(numbers.min() >= 0 and numbers.max() < classes)


def _ratio(above: Array, below: Array, known: NDArray[np.bool_]) -> Array:
    """Return the quotients, NaN where not `known`."""
    found: Array = np.full(len(above), nan)
    return np.divide(above, below, out=found, where=known)


def _mean(values: NDArray[Any], counts: Array) -> float:
    total = counts.sum()
    return float((values * counts).sum() / total) if total else nan


def _known_mean(values: Sequence[float] | Array) -> float:
    """Return the mean of the numbers that are not NaN."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if known.size else nan
