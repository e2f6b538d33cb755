"""How sure a classifier said to be and how often it was right, from the rows of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.values import finite

__all__ = ["BINS", "Calibration", "calibration_of"]

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Predictions sorted into equal bins of (0, 1] by how sure they were.

    Args:
        counts: predictions per bin `(K,)`.
        confidence: mean probability of each bin `(K,)`, NaN in an empty one.
        accuracy: share of each bin that was right `(K,)`, NaN in an empty one.
    """

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap of the bins, weighted by their counts."""
        gaps = np.abs(np.nan_to_num(self.accuracy - self.confidence)) * self.counts
        return float(gaps.sum() / self.counts.sum())

    @property
    def bias(self) -> float:
        """Mean confidence minus accuracy: above 0 where it was too sure."""
        gaps = np.nan_to_num(self.confidence - self.accuracy) * self.counts
        return float(gaps.sum() / self.counts.sum())


def calibration_of(rows: Sequence[Mapping[str, Any]], bins: int = BINS) -> Calibration | None:
    """Return the calibration of per-image rows, None where they tell nothing of it.

    Args:
        rows: with `predicted_probability` and `correct`; rows without them are left out.
        bins: how many.
    """
    known = [
        (probability, row["correct"])
        for row in rows
        if isinstance(row.get("correct"), bool)
        and (probability := finite(row.get("predicted_probability"))) is not None
        and 0 <= probability <= 1
    ]
    if not known:
        return None
    sure = np.array([probability for probability, _ in known])
    right = np.array([float(correct) for _, correct in known])
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    shared = np.where(counts > 0, counts, math.nan)
    return Calibration(
        counts,
        np.bincount(place, sure, bins) / shared,
        np.bincount(place, right, bins) / shared,
    )
