"""How sure a mean is: bootstrap intervals, the same for the same values on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["CONFIDENCE", "RESAMPLES", "bootstrap_interval", "image_interval"]

CONFIDENCE = 0.95
RESAMPLES = 10_000

_DRAWS_OF_A_PAGE = 10_000_000  # for one metric, about 0.2 s
_DRAWS_AT_ONCE = 2_000_000  # bounds the memory to some 30 MB


def bootstrap_interval(
    values: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile interval of the mean under resampling, None below two values.

    With few values (under about 20) it is somewhat too narrow, as every percentile interval is.

    Args:
        values: finite numbers `(N,)`; the order in which they stand decides nothing.
        confidence: share of the resampled means inside the interval.
        resamples: how often N values are drawn with replacement.
        seed: of the draws.

    Example:
        >>> bootstrap_interval([0.5, 0.5, 0.5])
        (0.5, 0.5)
        >>> bootstrap_interval([0.5]) is None
        True
    """
    sample: NDArray[np.float64] = np.sort(np.asarray(values, dtype=np.float64))
    if sample.ndim != 1 or not np.isfinite(sample).all():
        raise ValueError(f"values must be finite numbers (N,), got {values!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
    if sample.size < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // sample.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, sample.size, (count, sample.size))
        means[start : start + count] = sample[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def image_interval(values: ArrayLike) -> tuple[float, float] | None:
    """Return the interval of a mean over images for a page, with fewer resamples of very many.

    The interval of 20,000 images is narrow, and a page shows four digits of it.
    """
    sample = np.asarray(values, dtype=np.float64)
    resamples = int(np.clip(_DRAWS_OF_A_PAGE // max(sample.size, 1), 500, RESAMPLES))
    return bootstrap_interval(sample, resamples=resamples)
