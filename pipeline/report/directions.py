"""Whether a metric is better when it is higher or when it is lower, as far as its name tells."""

from __future__ import annotations

import re

__all__ = ["lower_is_better"]

_GUESSES = re.compile(r"top\d+")
_HIGHER = {
    "accuracy", "auc", "ccc", "cldice", "coverage", "dice", "f1", "found", "iou", "mcc",
    "precision", "recall", "score", "sensitivity", "specificity", "surface", "topology",
}  # fmt: skip
_LOWER = {
    "brier", "distance", "ece", "error", "hd95", "loss", "mae", "max", "merge", "mse", "nll",
    "p95", "rmse", "split", "violations",
}  # fmt: skip


def lower_is_better(metric: str) -> bool | None:
    """Return whether less of `metric` is better, None where its name does not tell.

    Example:
        >>> [lower_is_better(name) for name in ("test ilm_mae_px", "voi_score", "vessel_density")]
        [True, False, None]
    """
    words = set(re.findall(r"[a-z0-9]+", metric.lower()))
    if {"truth", "probability"} <= words or any(map(_GUESSES.fullmatch, words)) or words & _HIGHER:
        return False
    return True if words & _LOWER else None
