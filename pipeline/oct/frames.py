"""Rows and columns between frames of different size, by the half-pixel rule.

Pixel centres of an image that is resized go from `p` to `(p + 0.5) * new / old - 0.5`. Rows are not
cut off at the border, so that going there and back returns every row: the row 0 of 496 lies at
-0.016 of 480.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

if TYPE_CHECKING:  # a frame needs none of the compiled loops
    from pipeline.oct.coordinates import Layers

__all__ = ["columns_to_width", "layers_to_frame", "rows_to_height"]

Floats = NDArray[np.float64]


def rows_to_height(rows: NDArray[np.floating], height: int, new_height: int) -> Floats:
    """Return `rows` of a frame of `height` rows in a frame of `new_height`; NaN stays NaN.

    Raises:
        InputError: a height is not above 0.
    """
    _check_sizes(height, new_height)
    return (np.asarray(rows, dtype=np.float64) + 0.5) * (new_height / height) - 0.5


def columns_to_width(values: NDArray[np.floating], new_width: int) -> Floats:
    """Return `values` `(..., W)` at the centres of `new_width` columns, `(..., new_width)`.

    Between columns they are interpolated, beyond the outer centres they stay the same. NaN where
    a column that has a part in it is NaN.

    Raises:
        InputError: a width is not above 0.
    """
    given = np.asarray(values, dtype=np.float64)
    left, right, part = _neighbours(given.shape[-1], new_width)
    between = (1 - part) * given[..., left] + part * given[..., right]
    return np.where(part == 0, given[..., left], between)  # 0 * NaN would be NaN


def layers_to_frame(layers: Layers, size: tuple[int, int], new_size: tuple[int, int]) -> Layers:
    """Return `layers` of a frame of `size` in one of `new_size`, `(rows, columns)` each.

    Sigmas are scaled with the rows; a column is valid where all that have a part in it are.

    Raises:
        InputError: a size is not above 0, or the layers are not as wide as `size`.
    """
    (height, width), (new_height, new_width) = size, new_size
    _check_sizes(height, new_height)
    if layers.ilm_px.shape[-1] != width:
        raise InputError(
            f"layers have {layers.ilm_px.shape[-1]} columns, their frame {width}; expected as many:"
            " pass the frame of the logits, (rows, columns)"
        )
    scale = new_height / height
    return replace(
        layers,
        ilm_px=rows_to_height(columns_to_width(layers.ilm_px, new_width), height, new_height),
        bm_px=rows_to_height(columns_to_width(layers.bm_px, new_width), height, new_height),
        ilm_sigma_px=columns_to_width(layers.ilm_sigma_px, new_width) * scale,
        bm_sigma_px=columns_to_width(layers.bm_sigma_px, new_width) * scale,
        ilm_valid=_valid_at(layers.ilm_valid, new_width),
        bm_valid=_valid_at(layers.bm_valid, new_width),
    )


def _neighbours(
    width: int, new_width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the columns left and right of each new centre, and the right one's part."""
    _check_sizes(width, new_width)
    centres = (np.arange(new_width) + 0.5) * (width / new_width) - 0.5
    centres = np.clip(centres, 0, width - 1)
    left = np.floor(centres).astype(np.int64)
    return left, np.minimum(left + 1, width - 1), centres - left


def _valid_at(valid: NDArray[np.bool_], new_width: int) -> NDArray[np.bool_]:
    left, right, part = _neighbours(valid.shape[-1], new_width)
    both: NDArray[np.bool_] = valid[..., left] & (valid[..., right] | (part == 0))
    return both


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise InputError(f"sizes of frames are {sizes}; expected 1 or more rows and columns")
