"""The score of a predicted papyrus surface, as the surface-detection competition computes it.

Voxels that the truth leaves unlabelled become background in both volumes. What remains is compared
three ways: topology (`topology_score`), SurfaceDice within a tolerance (`surface_dice`) and the
variation of information between the sheets (`variation_of_information`). The score weighs them
0.30, 0.35 and 0.35; that of a set is the mean over its volumes.

The score can be led astray, as its components show: an empty prediction keeps a topology of 1 where
each block of the truth has one sheet, defects in the planes between blocks cost nothing, and a
single false cavity adds a dimension of its own to the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius.surface_distance import surface_dice_of_masks
from pipeline.vesuvius.topology_matching import (
    MAX_FLIPS,
    FeatureCounts,
    blocks_of,
    count_features,
)
from pipeline.vesuvius.variation_of_information import voi_of_masks

__all__ = [
    "DIMENSION_WEIGHTS",
    "SCORE_WEIGHTS",
    "surface_dice",
    "surface_score",
    "topology_score",
    "variation_of_information",
]

SCORE_WEIGHTS = {"topology": 0.30, "surface_dice": 0.35, "voi": 0.35}
"""Weights of the score."""

DIMENSION_WEIGHTS = (0.34, 0.33, 0.33)
"""Weights of components, tunnels and cavities in the topology score."""

_VOI_SCALE = 0.3
_Masks = tuple[NDArray[np.bool_], NDArray[np.bool_]]


def surface_score(
    prediction: NDArray[Any],
    label: NDArray[Any],
    tolerance: float = 2.0,
    ignore_label: int | None = 2,
    *,
    matching: bool = True,
    max_flips: int = MAX_FLIPS,
) -> dict[str, Any]:
    """Score one predicted surface against its truth.

    Args:
        prediction: `(D, H, W)`, a mask: any value but 0 is surface. Axes as in the files: the score
            depends on their order.
        label: `(D, H, W)`, 0 background, 1 surface, `ignore_label` unlabelled.
        tolerance: distance in voxels within which a piece of surface counts as found.
        ignore_label: value of unlabelled voxels; None where there are none.
        matching: count matched features. Without, topology has an upper bound only, at a part of
            the cost.
        max_flips: effort per block before matching is given up. The default is far beyond what
            sheets need; a noisy prediction early in training may exceed it.

    Returns:
        `surface_dice`, `voi_score`, `voi_split` and `voi_merge` (bits), `topology` as
        `topology_score` gives it, and their weighted mean `score`; None where the matched features
        could not all be counted.

    Raises:
        InputError: a volume is empty or not `(D, H, W)`, shapes differ, the label has other values,
            or the prediction has NaN or values between 0 and 1.
        ConfigurationError: `tolerance` or `ignore_label` is of no use.
    """
    masks = _masks(prediction, label, ignore_label)
    voi = _voi(masks)
    dice = surface_dice_of_masks(*masks, tolerance)
    topology = _topology(masks, matching, max_flips)
    score = None
    if topology["score"] is not None:
        score = fsum(
            (
                SCORE_WEIGHTS["topology"] * topology["score"],
                SCORE_WEIGHTS["surface_dice"] * dice,
                SCORE_WEIGHTS["voi"] * voi["voi_score"],
            )
        )
    return {"score": score, "surface_dice": dice, **voi, "topology": topology}


def surface_dice(
    prediction: NDArray[Any],
    label: NDArray[Any],
    tolerance: float = 2.0,
    ignore_label: int | None = 2,
) -> float:
    """Return the share of both surfaces, by area, that lies within `tolerance` of the other.

    1 where both volumes are empty, 0 where exactly one is. Arguments and errors as in
    `surface_score`.
    """
    return surface_dice_of_masks(*_masks(prediction, label, ignore_label), tolerance)


def variation_of_information(
    prediction: NDArray[Any], label: NDArray[Any], ignore_label: int | None = 2
) -> dict[str, float]:
    """Compare the 26-connected sheets of a prediction with those of the truth.

    Arguments and errors as in `surface_score`.

    Returns:
        `voi_score` (0..1), `voi_split` and `voi_merge` in bits: what splitting and merging sheets
        costs. Voxels that one volume lacks count as one sheet of its own there.
    """
    return _voi(_masks(prediction, label, ignore_label))


def topology_score(
    prediction: NDArray[Any],
    label: NDArray[Any],
    ignore_label: int | None = 2,
    *,
    matching: bool = True,
    max_flips: int = MAX_FLIPS,
) -> dict[str, Any]:
    """Compare components, tunnels and cavities of a prediction with those of the truth.

    They are counted in eight blocks and summed. Arguments and errors as in `surface_score`.

    Returns:
        By dimension 0 (components but the first of a block), 1 (tunnels) and 2 (cavities):
        `counts`, the features (matched, predicted, truth), and `f1`, None where neither volume has
        any. `score`, the weighted mean of these; 1 where there is none. `upper_bound`, the same as
        if each block's features matched as far as their numbers allow. Where matched features could
        not be counted they, their `f1` and `score` are None.
    """
    return _topology(_masks(prediction, label, ignore_label), matching, max_flips)


def _voi(masks: _Masks) -> dict[str, float]:
    split, merge = voi_of_masks(*masks)
    score = 1 / (1 + _VOI_SCALE * (split + merge))
    return {"voi_score": score, "voi_split": split, "voi_merge": merge}


def _topology(masks: _Masks, matching: bool, max_flips: int) -> dict[str, Any]:
    prediction, truth = masks
    blocks = [
        count_features(prediction[block], truth[block], matching, max_flips)
        for block in blocks_of(prediction.shape)
    ]
    dimensions = list(zip(*blocks, strict=True))
    counts = [_sum(dimension) for dimension in dimensions]
    most = [
        _sum([block._replace(matched=min(block.predicted, block.truth)) for block in dimension])
        for dimension in dimensions
    ]
    known = all(count.matched is not None for count in counts)
    return {
        "counts": {dimension: tuple(count) for dimension, count in enumerate(counts)},
        "f1": {dimension: _f1(count) for dimension, count in enumerate(counts)},
        "score": _mean_f1(counts) if known else None,
        "upper_bound": _mean_f1(most),
    }


def _sum(blocks: Sequence[FeatureCounts]) -> FeatureCounts:
    """Add the counts of the blocks; the matched ones of all are known or none."""
    matched = [block.matched for block in blocks if block.matched is not None]
    return FeatureCounts(
        sum(matched) if len(matched) == len(blocks) else None,
        sum(block.predicted for block in blocks),
        sum(block.truth for block in blocks),
    )


def _f1(counts: FeatureCounts) -> float | None:
    if counts.matched is None or not counts.predicted + counts.truth:
        return None
    if not counts.truth:
        return 0.5 / (counts.predicted + 0.5)
    return 2 * counts.matched / (counts.predicted + counts.truth)


def _mean_f1(counts: Sequence[FeatureCounts]) -> float:
    """Return the weighted mean over the dimensions in which either volume has a feature."""
    active = [
        (weight, f1)
        for weight, f1 in zip(DIMENSION_WEIGHTS, map(_f1, counts), strict=True)
        if f1 is not None
    ]
    if not active:
        return 1.0
    return fsum(weight * f1 for weight, f1 in active) / fsum(weight for weight, _ in active)


def _masks(prediction: NDArray[Any], label: NDArray[Any], ignore_label: int | None) -> _Masks:
    """Return the foreground of both volumes, without what the truth leaves unlabelled."""
    predicted, truth = np.asarray(prediction), np.asarray(label)
    for name, volume in (("prediction", predicted), ("label", truth)):
        if volume.ndim != 3 or not volume.size:
            raise InputError(
                f"{name} must be a volume (D, H, W) with voxels in it, got shape {volume.shape}"
            )
    if predicted.shape != truth.shape:
        raise InputError(
            f"prediction has shape {predicted.shape}, label has {truth.shape}; they must be equal: "
            "score at the label's own size"
        )
    _check_prediction(predicted)
    foreground, ignored = _read_label(truth, ignore_label)
    return np.asarray((predicted != 0) & ~ignored), np.asarray(foreground)


def _check_prediction(prediction: NDArray[Any]) -> None:
    """Refuse probabilities: all of them would be surface."""
    if prediction.dtype.kind not in "fc":
        return
    if np.isnan(prediction).any():
        raise InputError(
            f"prediction holds {int(np.isnan(prediction).sum())} NaN voxels; expected a mask: "
            "find out where they come from before thresholding"
        )
    between = (prediction > 0) & (prediction < 1)
    if between.any():
        raise InputError(
            f"prediction holds values between 0 and 1, such as {prediction[between][0]:g}; "
            "expected a mask: threshold the probability first"
        )


def _read_label(
    label: NDArray[Any], ignore_label: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where the label is surface and where it is unlabelled."""
    if ignore_label in (0, 1):
        raise ConfigurationError(
            f"ignore_label must differ from background (0) and surface (1), got {ignore_label!r}; "
            "the competition uses 2; None ignores nothing"
        )
    foreground = label == 1
    ignored = np.zeros_like(foreground) if ignore_label is None else label == ignore_label
    if not (foreground | ignored | (label == 0)).all():
        unknown = np.unique(label[~(foreground | ignored | (label == 0))])[:5]
        found = ", ".join(f"{value:g}" for value in unknown)
        expected = "0 and 1" if ignore_label is None else f"0, 1 and {ignore_label} (unlabelled)"
        raise InputError(
            f"label holds values {found}; expected {expected}; map the classes of the file first"
        )
    return foreground, ignored
