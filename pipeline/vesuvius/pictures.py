"""Planes of a volume with its surface drawn over them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEGEND", "LEGEND_WITH_TRUTH", "three_planes"]

LEGEND = "Middle planes: the image, the surface before repair, and after it."
LEGEND_WITH_TRUTH = f"{LEGEND} Green: both agree; red: prediction only; blue: truth only."

_SIDE_PX = 320  # larger planes are shown by their middle part
_GAP_PX = 6


def three_planes(
    image: NDArray[Any],
    before: NDArray[np.bool_],
    after: NDArray[np.uint8],
    label: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return the middle planes of a volume as one RGB picture.

    Left the image, in the middle the surface by the threshold alone, right the repaired one.
    Without truth the surface is cyan. With truth, agreement is green, what only the prediction has
    is red, what only the truth has is blue, and unlabelled voxels are dark.

    Args:
        image: `(D, H, W)`, any grey values.
        before: `(D, H, W)`, the mask by the threshold alone.
        after: `(D, H, W)`, the repaired mask.
        label: `(D, H, W)`, 0, 1 and 2 (unlabelled).
    """
    views = [[_plane(v, axis) for v in (image, before, after)] for axis in range(3)]
    # Of the planes alone: percentiles of a whole volume take longer than its repair.
    shown = np.concatenate([planes[0].ravel() for planes in views])
    low, high = np.percentile(shown, (0.5, 99.5))
    rows = []
    for axis, (plane, *masks) in enumerate(views):
        grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)
        truth = None if label is None else _plane(label, axis)
        parts = [_painted(grey, None, None)]
        parts += [_painted(grey, mask > 0, truth) for mask in masks]
        rows.append(np.concatenate([_margin(part) for part in parts], axis=1))
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(row, [(0, 0), (0, width - row.shape[1]), (0, 0)], constant_values=255)
        for row in rows
    ]
    return np.concatenate(padded, axis=0)


def _plane(volume: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return the middle plane across an axis, its middle part where large, enlarged where small."""
    plane = np.take(volume, volume.shape[axis] // 2, axis)
    starts = [max(0, (n - _SIDE_PX) // 2) for n in plane.shape]
    plane = plane[tuple(slice(start, start + _SIDE_PX) for start in starts)]
    factor = max(1, _SIDE_PX // max(plane.shape))
    enlarged: NDArray[Any] = plane.repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged


def _painted(
    grey: NDArray[Any], mask: NDArray[np.bool_] | None, truth: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    drawn = np.repeat(grey[..., None] * 255, 3, axis=-1).astype(np.float32)
    if mask is None:
        return drawn.astype(np.uint8)
    layers = [(mask, (0, 230, 255))]
    if truth is not None:
        drawn[truth == 2] *= 0.4
        real, seen = truth == 1, mask & (truth != 2)
        layers = [
            (seen & real, (40, 220, 90)),
            (seen & ~real, (255, 60, 60)),
            (real & ~mask, (70, 120, 255)),
        ]
    for pixels, colour in layers:
        drawn[pixels] = 0.25 * drawn[pixels] + 0.75 * np.array(colour, np.float32)
    return drawn.clip(0, 255).astype(np.uint8)


def _margin(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(picture, [(0, _GAP_PX), (0, _GAP_PX), (0, 0)], constant_values=255)
