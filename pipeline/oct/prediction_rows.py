"""Predicted rows as writers take them: an interface, and arrays that have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["PredictedRows", "StoredRows", "part_of"]


class PredictedRows(Protocol):
    """What is predicted for n B-scans, `(n, W)` each, with rows in the frame of the images."""

    @property
    def ilm_px(self) -> NDArray[np.floating]:
        """Rows of the inner limiting membrane."""

    @property
    def bm_px(self) -> NDArray[np.floating]:
        """Rows of Bruch's membrane."""

    @property
    def ilm_sigma_px(self) -> NDArray[np.floating]:
        """Standard deviation of `ilm_px`."""

    @property
    def bm_sigma_px(self) -> NDArray[np.floating]:
        """Standard deviation of `bm_px`."""

    @property
    def ilm_valid(self) -> NDArray[np.bool_]:
        """Where `ilm_px` is to be trusted."""

    @property
    def bm_valid(self) -> NDArray[np.bool_]:
        """Where `bm_px` is to be trusted."""


@dataclass(frozen=True)
class StoredRows:
    """Predicted rows `(n, W)` as arrays.

    Attributes:
        ilm_px, bm_px: rows, those that are not valid too.
        ilm_sigma_px, bm_sigma_px: standard deviation of each.
        ilm_valid, bm_valid: where they are to be trusted.
    """

    ilm_px: NDArray[np.floating]
    bm_px: NDArray[np.floating]
    ilm_sigma_px: NDArray[np.floating]
    bm_sigma_px: NDArray[np.floating]
    ilm_valid: NDArray[np.bool_]
    bm_valid: NDArray[np.bool_]


def part_of(rows: PredictedRows, block: slice) -> StoredRows:
    """Return what is predicted for some of the B-scans."""
    names = StoredRows.__dataclass_fields__
    return StoredRows(**{name: np.asarray(getattr(rows, name))[block] for name in names})
