"""Error against the share of columns kept, when the least certain columns are left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

__all__ = ["RiskCoverage", "risk_coverage", "sigma_for_coverage"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RiskCoverage:
    """A curve with one point per distinct sigma, in rising order, each array `(n,)`.

    Attributes:
        sigma_px: columns with at most this sigma are kept.
        coverage: share of the columns that are kept, up to 1.
        mae_px: mean absolute error of these.
    """

    sigma_px: Floats
    coverage: Floats
    mae_px: Floats


def risk_coverage(error_px: NDArray[np.floating], sigma_px: NDArray[np.floating]) -> RiskCoverage:
    """Return the curve of some columns; columns whose error is NaN are left out.

    Args:
        error_px: predicted - annotated rows, of any shape.
        sigma_px: of the same columns.

    Raises:
        InputError: the shapes differ, no column has an error, or a sigma is NaN.
    """
    error, sigma = _known(error_px, sigma_px)
    order = np.argsort(sigma, kind="stable")
    sigma, size = sigma[order], np.abs(error[order])
    last = np.flatnonzero(np.append(sigma[1:] != sigma[:-1], True))  # equal ones come together
    kept = last + 1.0
    return RiskCoverage(sigma[last], kept / size.size, np.cumsum(size)[last] / kept)


def sigma_for_coverage(sigma_px: NDArray[np.floating], coverage: float) -> float:
    """Return the least sigma that keeps at least `coverage` of the columns.

    Args:
        sigma_px: of the columns of a validation set, of any shape, finite.
        coverage: share to keep, above 0 and at most 1.

    Raises:
        InputError: there is no column, a sigma is not finite, or the share is out of its range.
    """
    sigma = np.sort(np.asarray(sigma_px, dtype=np.float64), axis=None)
    if not sigma.size or not np.isfinite(sigma).all() or not 0 < coverage <= 1:
        raise InputError(
            f"{sigma.size} sigmas and a coverage of {coverage}; expected one finite sigma or more, "
            "and a share above 0 and at most 1"
        )
    # A product such as 0.7 * 10 lies a hair above the whole number that is meant.
    return float(sigma[max(0, int(np.ceil(coverage * sigma.size - 1e-9)) - 1)])


def _known(error_px: NDArray[np.floating], sigma_px: NDArray[np.floating]) -> tuple[Floats, Floats]:
    error, sigma = np.asarray(error_px, np.float64), np.asarray(sigma_px, np.float64)
    if error.shape != sigma.shape:
        raise InputError(
            f"errors have shape {error.shape}, sigmas {sigma.shape}; expected those of the same "
            "columns"
        )
    known = ~np.isnan(error)
    if not known.any() or np.isnan(sigma[known]).any():
        raise InputError(
            f"{int(known.sum())} of {error.size} columns have an error, "
            f"{int(np.isnan(sigma[known]).sum())} of these no sigma; expected one or more columns "
            "with both"
        )
    return error[known], sigma[known]
