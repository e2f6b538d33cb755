"""What a run of predictions comes to, boundary by boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LayerSummary"]


class LayerSummary:
    """Sums over the columns seen so far, so that none of them is kept."""

    def __init__(self) -> None:
        self._columns = self._valid = 0
        self._sum = self._sigma_sum = 0.0
        self._lowest, self._highest = np.inf, -np.inf

    def add(
        self,
        rows: NDArray[np.floating],
        valid: NDArray[np.bool_],
        sigma: NDArray[np.floating] | None = None,
    ) -> None:
        """Count columns in: rows, where they are valid, and their standard deviations."""
        counted = valid & np.isfinite(rows)
        self._columns += rows.size
        if not counted.any():
            return
        values = rows[counted].astype(np.float64)
        self._valid += values.size
        self._sum += float(values.sum())
        self._lowest = min(self._lowest, float(values.min()))
        self._highest = max(self._highest, float(values.max()))
        if sigma is not None:
            self._sigma_sum += float(sigma[counted].astype(np.float64).sum())

    @property
    def mean_px(self) -> float | None:
        """The mean over the valid columns; None without any."""
        return self._sum / self._valid if self._valid else None

    def figures(self) -> dict[str, Any]:
        """Return coverage, mean, range and mean standard deviation of the valid columns."""
        seen = self._valid > 0
        return {
            "columns": self._columns,
            "valid_columns": self._valid,
            "coverage_percent": 100.0 * self._valid / self._columns if self._columns else None,
            "mean_row_px": self.mean_px,
            "min_row_px": self._lowest if seen else None,
            "max_row_px": self._highest if seen else None,
            "mean_sigma_px": self._sigma_sum / self._valid if seen else None,
        }
