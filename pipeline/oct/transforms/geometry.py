"""Random changes of position that keep rows exact: whole pixels only, B-scan and rows together.

They stand before `RenderLabeld`, which draws the label from the changed rows. Randomness comes from
MONAI's `self.R`; a probability of 0 changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigurationError, InputError

__all__ = ["RandCropColumnsd", "RandFlipColumnsd", "RandShiftRowsd", "RandTiltd"]

ROW_KEYS = ("ilm", "bm")


class RandCropColumnsd(Randomizable, MapTransform):
    """Cut out neighbouring columns of full height.

    Args:
        keys: B-scans `(1, H, W)`.
        width_px: how many columns.
        row_keys: rows `(W,)`; those that a case lacks are passed over.

    Raises:
        InputError: a B-scan is narrower.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        width_px: int = 128,
        row_keys: Sequence[str] = ROW_KEYS,
    ) -> None:
        if width_px < 1:
            raise ConfigurationError(f"width_px must be positive, got {width_px!r}")
        super().__init__(keys)
        self.width_px = width_px
        self.row_keys = tuple(row_keys)
        self.start = 0

    def randomize(self, columns: int) -> None:
        """Draw the first column of the crop."""
        self.start = int(self.R.randint(columns - self.width_px + 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the crop."""
        case = dict(data)
        columns = int(case[self.keys[0]].shape[-1])
        if columns < self.width_px:
            raise InputError(
                f"{case.get('name', 'B-scan')}: {columns} columns, fewer than the {self.width_px} "
                "of a crop; set width_px lower, or a frame"
            )
        self.randomize(columns)
        for key in _present(case, self.keys, self.row_keys):
            case[key] = case[key][..., self.start : self.start + self.width_px]
        return case


class RandFlipColumnsd(RandomizableTransform, MapTransform):
    """Mirror left and right: the B-scan of the other eye.

    Args:
        keys: B-scans, and labels where they are drawn already.
        prob: of a flip.
        row_keys: rows `(W,)`; those that a case lacks are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob: float = 0.5,
        row_keys: Sequence[str] = ROW_KEYS,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.row_keys = tuple(row_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case, mirrored or not."""
        case = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in _present(case, self.keys, self.row_keys):
                case[key] = torch.as_tensor(case[key]).flip(-1)
        return case


class _RandDisplaceRowsd(RandomizableTransform, MapTransform):
    """Move each column down by whole pixels; what leaves at one end comes in at the other.

    The random number is cut to what keeps all rows of the case away from both ends.

    Args:
        keys: B-scans `(1, H, W)`.
        prob: of a change.
        largest: of the random number, which lies between its negative and it.
        margin_px: rows that stay free at both ends.
        row_keys: rows `(W,)`; those that a case lacks are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float,
        largest: float,
        margin_px: int,
        row_keys: Sequence[str],
    ) -> None:
        if largest < 0 or margin_px < 0:
            raise ConfigurationError(
                f"range and margin_px of {type(self).__name__} must not be negative, got "
                f"{largest!r} and {margin_px!r}"
            )
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.largest = largest
        self.margin_px = margin_px
        self.row_keys = tuple(row_keys)
        self.drawn = 0.0

    def randomize(self, data: Any = None) -> None:
        """Draw the random number, before it is cut."""
        super().randomize(None)
        self.drawn = float(self.R.uniform(-self.largest, self.largest))

    @abstractmethod
    def _path(self, columns: int) -> NDArray[np.float64]:
        """Return how far a random number of 1 moves each column, in pixels."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case, changed or not."""
        case = dict(data)
        self.randomize()
        if not self._do_transform:
            return case
        height, columns = case[self.keys[0]].shape[-2:]
        path = self._path(columns)
        rows = [np.asarray(case[key], np.float64) for key in self.row_keys if key in case]
        low, high = _free_range(rows, path, self.margin_px, height - self.margin_px)
        moved = torch.from_numpy(np.rint(path * np.clip(self.drawn, low, high)).astype(np.int64))
        if not moved.any():
            return case
        for key in _present(case, self.keys):
            case[key] = _displaced(torch.as_tensor(case[key]), moved)
        for key in _present(case, self.row_keys):
            rows_then = torch.as_tensor(case[key])
            case[key] = rows_then + moved.to(rows_then.dtype)
        return case


class RandShiftRowsd(_RandDisplaceRowsd):
    """Shift a B-scan up or down; what leaves at one end comes in at the other.

    Args:
        keys: B-scans `(1, H, W)`.
        prob: of a shift.
        shift_px: largest shift; less where rows come within `margin_px` of an end.
        margin_px: rows that stay free at both ends.
        row_keys: rows `(W,)`; those that a case lacks are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob: float = 0.5,
        shift_px: int = 60,
        margin_px: int = 6,
        row_keys: Sequence[str] = ROW_KEYS,
    ) -> None:
        super().__init__(keys, prob, shift_px, margin_px, row_keys)

    def _path(self, columns: int) -> NDArray[np.float64]:
        return np.ones(columns)


class RandTiltd(_RandDisplaceRowsd):
    """Tilt the retina by moving each column by whole pixels, around the middle of the B-scan.

    Args:
        keys: B-scans `(1, H, W)`.
        prob: of a tilt.
        slope: largest, in rows per column; less where rows come within `margin_px` of an end.
        margin_px: rows that stay free at both ends.
        row_keys: rows `(W,)`; those that a case lacks are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob: float = 0.5,
        slope: float = 0.35,
        margin_px: int = 6,
        row_keys: Sequence[str] = ROW_KEYS,
    ) -> None:
        super().__init__(keys, prob, slope, margin_px, row_keys)

    def _path(self, columns: int) -> NDArray[np.float64]:
        return np.arange(columns, dtype=np.float64) - (columns - 1) / 2


def _present(case: Mapping[Hashable, Any], *keys: Sequence[Hashable]) -> list[Hashable]:
    return [key for group in keys for key in group if key in case]


def _free_range(
    rows: Sequence[NDArray[np.float64]], path: NDArray[np.float64], first: float, last: float
) -> tuple[float, float]:
    """Return between which numbers `rows + number * path` stays between `first` and `last`.

    The range holds 0: rows that lie outside already are not moved further.
    """
    low, high = -np.inf, np.inf
    for boundary in rows:
        known = np.isfinite(boundary) & (path != 0)
        down = (last - boundary[known]) / path[known]
        up = (first - boundary[known]) / path[known]
        low = np.minimum(down, up).max(initial=low)
        high = np.maximum(down, up).min(initial=high)
    return min(float(low), 0.0), max(float(high), 0.0)


def _displaced(image: Tensor, moved: Tensor) -> Tensor:
    """Return `image` `(C, H, W)` with column `x` moved down by `moved[x]` rows, around the ends."""
    height = image.shape[1]
    if (moved == moved[0]).all():
        return image.roll(int(moved[0]), dims=1)
    source = (torch.arange(height)[:, None] - moved) % height
    return image.gather(1, source.expand(image.shape[0], -1, -1))
