"""Variation of information between the sheets of a prediction and of the truth.

Sheets are 26-connected components. Only voxels that are foreground in one mask at least are looked
at; those that the other mask lacks form one class of their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.vesuvius.betti_numbers import label_components

__all__ = ["voi_of_masks"]


def voi_of_masks(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Return what splits and what merges the sheets of two masks `(D, H, W)`, in bits.

    Args:
        prediction: foreground of the prediction.
        truth: foreground of the truth, of the same shape.

    Returns:
        The entropy of the predicted sheets given the true ones (split), and of the true ones given
        the predicted (merge); both 0 where both masks are empty.
    """
    either = prediction | truth
    predicted, predicted_count = label_components(prediction, 26)
    true, true_count = label_components(truth, 26)
    pair = true[either].astype(np.int64)
    pair *= predicted_count + 1
    pair += predicted[either]
    if not pair.size:
        return 0.0, 0.0
    pairs, voxels = np.unique(pair, return_counts=True)
    share = voxels / pair.size
    true_share = _sum_by(pairs // (predicted_count + 1), share, true_count + 1)
    predicted_share = _sum_by(pairs % (predicted_count + 1), share, predicted_count + 1)
    split = share @ np.log2(true_share / share)
    merge = share @ np.log2(predicted_share / share)
    return max(float(split), 0.0), max(float(merge), 0.0)  # rounding may leave -1e-16


def _sum_by(key: NDArray[np.int64], share: NDArray[np.float64], keys: int) -> NDArray[np.float64]:
    """Return for every entry the sum of `share` over the entries with the same `key`."""
    sums: NDArray[np.float64] = np.bincount(key, weights=share, minlength=keys).astype(np.float64)
    return sums[key]
