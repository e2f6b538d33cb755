"""Class and confidence of each pixel, and the boundaries that the original read from the classes.

Of equal logits the upper class wins: the lower index, as in `argmax`, which torch takes a second
for on a CPU where comparisons take 50 ms (32 images of 480 x 768).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.oct.logits import as_array, on_gpu

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["class_mask", "confidence_map", "first_transitions"]


def class_mask(logits: NDArray[np.floating] | Tensor) -> NDArray[np.uint8]:
    """Return the most probable class `(B, H, W)` of each pixel.

    Args:
        logits: `(B, 3, H, W)`, array or tensor.

    Raises:
        InputError: the shape or the type is another one.
    """
    values = logits if on_gpu(logits) else as_array(logits)
    above, between, below = values[:, 0], values[:, 1], values[:, 2]
    lowest = (below > above) & (below > between)
    middle = (between > above) & ~lowest
    mask: NDArray[np.uint8] = _to_numpy(middle).astype(np.uint8)
    mask += 2 * _to_numpy(lowest).view(np.uint8)
    return mask


def confidence_map(logits: NDArray[np.floating] | Tensor) -> NDArray[np.float32]:
    """Return the largest softmax probability `(B, H, W)` of each pixel, 1/3 to 1.

    Args:
        logits: `(B, 3, H, W)`, array or tensor, finite.

    Raises:
        InputError: the shape or the type is another one.
    """
    if on_gpu(logits):
        return _to_numpy(logits.detach().softmax(dim=1).amax(dim=1).float())
    values = as_array(logits)
    confidence = np.empty((values.shape[0], *values.shape[2:]), np.float32)
    for image, target in zip(values, confidence, strict=True):  # one fits the cache
        largest = np.maximum(np.maximum(image[0], image[1]), image[2])
        with np.errstate(over="ignore"):  # exp(-inf) is the 0 that is meant
            np.divide(1, sum(np.exp(plane - largest) for plane in image), out=target)
    return confidence


def first_transitions(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the boundaries `(2, B, W)` as the original read them from `mask` `(B, H, W)`.

    ILM is the first row of class 1 under a row of class 0, BM the first of class 2 under one of
    class 1; NaN where a column has none. They may cross, and one stray pixel moves them.
    """
    rows = np.full((2, mask.shape[0], mask.shape[2]), np.nan)
    for boundary in range(2):
        for h in range(mask.shape[1] - 1, 0, -1):  # upwards, so that the first one stays
            steps = (mask[:, h - 1] == boundary) & (mask[:, h] == boundary + 1)
            rows[boundary][steps] = h
    return rows


def _to_numpy(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
