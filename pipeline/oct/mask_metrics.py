"""Confusion and Dice of class masks, where the truth is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

__all__ = ["CLASSES", "dice_per_class", "mask_confusion"]

CLASSES = ("above_ilm", "retina", "below_bm")
"""Names of the classes 0, 1, 2."""


def mask_confusion(
    predicted: NDArray[np.integer], truth: NDArray[np.integer], ignore_label: int | None = None
) -> NDArray[np.int64]:
    """Return how many pixels of each true class (rows) are called each class (columns), `(3, 3)`.

    The confusion of several scans is the sum of theirs.

    Args:
        predicted: classes 0, 1, 2, of any shape.
        truth: classes of the same shape.
        ignore_label: value of `truth` at pixels whose class is not known.

    Raises:
        InputError: the shapes differ or a mask holds another value.
    """
    if predicted.shape != truth.shape:
        raise InputError(
            f"predicted mask has shape {predicted.shape}, the true one {truth.shape}; expected one "
            "shape: compare masks of one frame"
        )
    known = slice(None) if ignore_label is None else truth != ignore_label
    called, actual = predicted[known].ravel(), truth[known].ravel()
    for name, values in (("predicted", called), ("true", actual)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < len(CLASSES):
            raise InputError(
                f"{name} mask holds values {values.min()} to {values.max()}; expected classes 0, 1,"
                f" 2, and the ignore label {ignore_label} in the true one alone"
            )
    pairs = actual.astype(np.int64) * len(CLASSES) + called
    return np.bincount(pairs, minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))


def dice_per_class(confusion: NDArray[np.integer]) -> dict[str, float]:
    """Return the Dice score of each class of `CLASSES`; NaN where neither mask has it."""
    both, of_either = np.diagonal(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    return {
        name: float(2 * both[index] / of_either[index]) if of_either[index] else float("nan")
        for index, name in enumerate(CLASSES)
    }
