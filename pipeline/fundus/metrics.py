"""Scores of vessel maps inside the field of view.

A pixel is called vessel where `probability >= threshold`, compared in the precision that the
probabilities come in. What cannot be measured is NaN and is counted, never 1.0:

- `dice`, `iou`, `cldice`: NaN where truth and prediction are both empty (nothing was there to be
  found, so neither 0 nor 1 says anything), 0 where only one is;
- `auc`, `mcc`: NaN where the truth has one class only; `mcc` is 0 where only the prediction has;
- `sensitivity`: NaN without vessel pixels; `specificity`: NaN without background pixels;
- everything: NaN where the field of view is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from math import nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import skeletonize

from pipeline.errors import InputError
from pipeline.fundus.fov import fov_box

__all__ = [
    "METRICS",
    "THRESHOLD_GRID",
    "Case",
    "area_under_curve",
    "choose_threshold",
    "pooled_metrics",
    "summarise",
    "vessel_metrics",
]

Case = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]
"""Probability, label and field of view (None: the whole frame) of one image."""

METRICS = ("dice", "iou", "auc", "sensitivity", "specificity", "accuracy", "mcc", "cldice")
"""Names and order of what `vessel_metrics` returns."""

THRESHOLD_GRID = tuple(round(0.2 + 0.025 * step, 3) for step in range(25))
"""Thresholds that `choose_threshold` tries: 0.2 to 0.8."""


def vessel_metrics(
    probability: NDArray[Any],
    label: NDArray[Any],
    fov: NDArray[Any] | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Score one vessel map against its truth, inside the field of view.

    Args:
        probability: `(H, W)`, 0..1; a mask is taken as probabilities 0 and 1.
        label: `(H, W)`, bool or values 0 and 1.
        fov: `(H, W)`, bool or values 0 and 1; None is the whole frame.
        threshold: probability from which on a pixel is vessel.

    Returns:
        The `METRICS` by name; NaN as the module says.

    Raises:
        InputError: shapes differ, a mask holds other values, or a probability is not in 0..1.
    """
    return pooled_metrics([(probability, label, fov)], threshold)


def pooled_metrics(cases: Iterable[Case], threshold: float = 0.5) -> dict[str, float]:
    """Score all pixels of several images as if they were one image.

    Counts, ranks and skeletons are summed over the images; of one image it is `vessel_metrics`.
    Cases are consumed one by one, but 4 to 8 bytes per pixel of the fields of view are kept, for
    the ranks.

    Args:
        cases: probability, label and field of view of each image.
        threshold: probability from which on a pixel is vessel.

    Returns:
        The `METRICS` by name; NaN as the module says, and where there is no case.

    Raises:
        InputError: as `vessel_metrics`.
    """
    total = _Counts()
    positives: list[NDArray[Any]] = []
    negatives: list[NDArray[Any]] = []
    for case in cases:
        probability, label, fov = _checked(case)
        total = total + _count(probability, label, fov, threshold)
        positives.append(probability[label & fov])
        negatives.append(probability[fov & ~label])
    auc = _rank_auc(np.concatenate(positives), np.concatenate(negatives)) if positives else nan
    return _scores(total, auc)


def area_under_curve(
    probability: NDArray[Any], label: NDArray[Any], fov: NDArray[Any] | None = None
) -> float:
    """Return the area under the ROC curve inside `fov`, exact, ties counted half.

    NaN where a class is absent. Arguments and errors as in `vessel_metrics`.
    """
    probability, label, fov = _checked((probability, label, fov))
    return _rank_auc(probability[label & fov], probability[fov & ~label])


def choose_threshold(cases: Iterable[Case], grid: Sequence[float] = THRESHOLD_GRID) -> float:
    """Return the threshold with the highest mean of the Dice scores of `cases`.

    Images without a vessel pixel inside their field of view are left out: their Dice is 0 or NaN,
    whatever the threshold. Of equally good thresholds the one nearest to the middle of the grid is
    taken, and of two as near the lower one.

    Args:
        cases: probability, label and field of view of each validation image.
        grid: thresholds to try.

    Raises:
        InputError: no case has a vessel pixel, the grid is empty, or as `vessel_metrics`.
    """
    thresholds = np.sort(np.asarray(grid, dtype=np.float64))
    if not thresholds.size:
        raise InputError("grid of thresholds is empty; expected at least one, such as [0.5]")
    curves = [curve for case in cases if (curve := _dice_curve(case, thresholds)) is not None]
    if not curves:
        raise InputError(
            "no validation image has a vessel pixel inside its field of view; the threshold "
            "cannot be chosen: check the labels of the validation split"
        )
    mean_dice = np.mean(curves, axis=0)
    best = thresholds[mean_dice >= mean_dice.max() - 1e-12]
    distance = np.abs(best - (thresholds[0] + thresholds[-1]) / 2)
    return float(best[distance <= distance.min() + 1e-9][0])


def summarise(per_image: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean, sample standard deviation and minimum of every number in `per_image`.

    Args:
        per_image: one mapping per image; values that are no numbers, such as names, are skipped.

    Returns:
        By name: `mean`, `sd`, `min` over the values that are not NaN (NaN where there is none; `sd`
        NaN for one), `count` of these, and `nan`, the number of images left out for being NaN.
    """
    values: dict[str, list[float]] = {}
    for row in per_image:
        for name, value in row.items():
            if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                values.setdefault(name, []).append(float(value))
    return {name: _summary(np.asarray(column)) for name, column in values.items()}


def _summary(column: NDArray[np.float64]) -> dict[str, float]:
    known = column[~np.isnan(column)]
    return {
        "mean": float(known.mean()) if known.size else nan,
        "sd": float(known.std(ddof=1)) if known.size > 1 else nan,
        "min": float(known.min()) if known.size else nan,
        "count": int(known.size),
        "nan": int(column.size - known.size),
    }


@dataclass(frozen=True)
class _Counts:
    """Pixel counts of the confusion matrix, and of skeletons and their part on the other mask."""

    true_positive: int = 0
    false_positive: int = 0
    false_negative: int = 0
    true_negative: int = 0
    predicted_skeleton: int = 0
    predicted_skeleton_hit: int = 0
    true_skeleton: int = 0
    true_skeleton_hit: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _count(
    probability: NDArray[Any], label: NDArray[np.bool_], fov: NDArray[np.bool_], threshold: float
) -> _Counts:
    """Count inside the box of the field of view; outside of it nothing can be set."""
    if not fov.any():
        return _Counts()
    box = fov_box(fov)
    inside = fov[box]
    truth = label[box] & inside
    predicted = _at_least(probability[box], threshold) & inside
    both = _total(truth & predicted)
    predicted_only = _total(predicted) - both
    true_only = _total(truth) - both
    predicted_skeleton, true_skeleton = skeletonize(predicted), skeletonize(truth)
    return _Counts(
        true_positive=both,
        false_positive=predicted_only,
        false_negative=true_only,
        true_negative=_total(inside) - both - predicted_only - true_only,
        predicted_skeleton=_total(predicted_skeleton),
        predicted_skeleton_hit=_total(predicted_skeleton & truth),
        true_skeleton=_total(true_skeleton),
        true_skeleton_hit=_total(true_skeleton & predicted),
    )


def _total(mask: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))


def _scores(counts: _Counts, auc: float) -> dict[str, float]:
    tp, fp = counts.true_positive, counts.false_positive
    fn, tn = counts.false_negative, counts.true_negative
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "iou": _ratio(tp, tp + fp + fn),
        "auc": auc,
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
        "mcc": _matthews(counts),
        "cldice": _centreline_dice(counts),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan


def _matthews(counts: _Counts) -> float:
    tp, fp = counts.true_positive, counts.false_positive
    fn, tn = counts.false_negative, counts.true_negative
    if not (tp + fn) * (tn + fp):
        return nan
    scale = sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))  # of an integer without bound
    return (tp * tn - fp * fn) / scale if scale else 0.0


def _centreline_dice(counts: _Counts) -> float:
    if not counts.predicted_skeleton and not counts.true_skeleton:
        return nan
    if not counts.predicted_skeleton or not counts.true_skeleton:
        return 0.0
    precision = counts.predicted_skeleton_hit / counts.predicted_skeleton
    sensitivity = counts.true_skeleton_hit / counts.true_skeleton
    total = precision + sensitivity
    return 2 * precision * sensitivity / total if total else 0.0


def _rank_auc(positives: NDArray[Any], negatives: NDArray[Any]) -> float:
    """Return the share of (vessel, background) pairs in the right order, ties counted half.

    Only the smaller class is looked up in the sorted larger one; the sums are integers, so the
    result is exact to its last division.
    """
    if not positives.size or not negatives.size:
        return nan
    pairs_doubled = 2 * int(positives.size) * int(negatives.size)
    if positives.size <= negatives.size:
        return _doubled_wins(positives, negatives) / pairs_doubled
    return 1.0 - _doubled_wins(negatives, positives) / pairs_doubled


def _doubled_wins(values: NDArray[Any], others: NDArray[Any]) -> int:
    """Return twice the number of pairs with value > other, plus the number of equal pairs."""
    ordered, wanted = np.sort(others), np.sort(values)  # sorted look-ups stay in the cache
    below = np.searchsorted(ordered, wanted, side="left").sum(dtype=np.int64)
    up_to = np.searchsorted(ordered, wanted, side="right").sum(dtype=np.int64)
    return int(below) + int(up_to)


def _dice_curve(case: Case, thresholds: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the Dice of one image at each threshold; None where it has no vessel pixel."""
    probability, label, fov = _checked(case)
    inside = probability[fov]
    vessel = probability[label & fov]
    if not vessel.size:
        return None
    predicted = np.array([np.count_nonzero(_at_least(inside, t)) for t in thresholds])
    hit = np.array([np.count_nonzero(_at_least(vessel, t)) for t in thresholds])
    return np.asarray(2 * hit / (predicted + vessel.size), dtype=np.float64)


def _at_least(probability: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """Compare in the precision of `probability`, as a float32 tensor does with a number."""
    return np.asarray(probability >= probability.dtype.type(threshold), dtype=np.bool_)


def _checked(case: Case) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    probability, label, fov = case
    values = _as_probability(probability)
    truth = _as_mask("label", label, values.shape)
    inside = np.ones(values.shape, np.bool_) if fov is None else _as_mask("fov", fov, values.shape)
    return values, truth, inside


def _as_probability(probability: NDArray[Any]) -> NDArray[Any]:
    values = np.asarray(probability)
    if values.ndim != 2:
        raise InputError(f"probability must be (H, W), got shape {values.shape}")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
        raise InputError(
            f"probability must lie in 0..1, found {values.min()} to {values.max()}; "
            "apply a sigmoid to logits, divide a mask by 255"
        )
    return values


def _as_mask(name: str, mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    values = np.asarray(mask)
    if values.shape != shape:
        raise InputError(
            f"{name} has shape {values.shape}, probability has {shape}; they must be equal: "
            "score at the label's own size"
        )
    if values.dtype == np.bool_:
        return values
    if not ((values == 0) | (values == 1)).all():
        found = ", ".join(f"{value:g}" for value in np.unique(values)[:5])
        raise InputError(
            f"{name} must be bool or hold only 0 and 1, found values {found}; "
            f"turn a 0/255 mask into `{name} > 127` first"
        )
    return np.asarray(values == 1, dtype=np.bool_)
