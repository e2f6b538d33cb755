"""Whether annotated rows can be what they claim, in the frame of their images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

__all__ = ["check_rows", "in_pixels"]

_NORMALISED_MAX = 1.5
_OUTSIDE_FRACTION = 0.05  # of the height: what an annotator may have continued past the edge

Rows = NDArray[Any]


def in_pixels(layers: Mapping[str, Rows], height: int) -> tuple[dict[str, Rows], list[str]]:
    """Return rows in pixels; where all are fractions of the height they are multiplied by it.

    Args:
        layers: rows `(N, W)` float per boundary.
        height: rows of the images.

    Returns:
        The rows, and a note where they were multiplied.
    """
    present = [rows[np.isfinite(rows)] for rows in layers.values()]
    values = np.concatenate([rows.ravel() for rows in present])
    if not values.size or values.max() > _NORMALISED_MAX or values.min() <= -0.5:
        return dict(layers), []
    # float16 has no room for rows of several hundred with their fractions.
    wide = {name: rows.astype(np.result_type(rows, np.float32)) for name, rows in layers.items()}
    note = f"rows were fractions of the height: multiplied by {height}"
    return {name: rows * rows.dtype.type(height) for name, rows in wide.items()}, [note]


def check_rows(path: Path | str, layers: Mapping[str, Rows], height: int) -> list[str]:
    """Refuse rows that cannot be, and return notes on those that are only odd.

    Args:
        path: where they were read, for the message.
        layers: rows `(N, W)` float per boundary, NaN where nobody annotated.
        height: rows of the images.

    Returns:
        How many rows leave the image a little, and in how many columns ILM lies below BM.

    Raises:
        InputError: rows far outside the image, ILM below BM in most columns, or columns that are
            marked as not annotated by something else than NaN.
    """
    notes = []
    for name, rows in layers.items():
        negative = rows[rows < 0]
        if negative.size and (negative == -1).all():
            raise InputError(
                f"{path}: layer {name} is -1 in {negative.size} columns, which looks like a mark "
                "for columns without annotation; store NaN there"
            )
        with np.errstate(invalid="ignore"):  # some NaN signal
            beyond = np.maximum(-rows, rows - height)
        outside = int(np.count_nonzero(beyond > 0))
        furthest = float(np.nanmax(beyond)) if outside else 0.0
        if furthest > _OUTSIDE_FRACTION * height:
            raise InputError(
                f"{path}: layer {name} has {outside} rows outside the image, the furthest by "
                f"{furthest:g}, expected rows from 0 to {height}; give them in the image's frame"
            )
        if outside:
            notes.append(f"{outside} rows of {name} outside the image, by up to {furthest:.3g}")
    return notes + _check_order(path, layers)


def _check_order(path: Path | str, layers: Mapping[str, Rows]) -> list[str]:
    if "ILM" not in layers or "BM" not in layers:
        return []
    ilm, bm = layers["ILM"], layers["BM"]
    both = np.count_nonzero(np.isfinite(ilm) & np.isfinite(bm))
    crossed = np.count_nonzero(ilm > bm)
    if crossed > both / 2:
        raise InputError(
            f"{path}: ILM lies below BM in {crossed} of {both} columns; are their names exchanged?"
        )
    nowhere = np.count_nonzero((ilm == 0) & (bm == 0))
    if nowhere:
        raise InputError(
            f"{path}: ILM and BM are both 0 in {nowhere} columns, which looks like a mark for "
            "columns without annotation; store NaN there"
        )
    return [f"ILM lies below BM in {crossed} of {both} columns"] if crossed else []
