"""The field of view of a fundus photograph, where no mask comes with it.

Scores, normalisation and vessel density belong to the lit disc, not to the black frame around it.
The disc is found by a fixed brightness, which given masks confirm, and then cleaned of the light
that spills over its rim.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import InputError

__all__ = ["derive_fov", "fov_box"]

THRESHOLD = 45 / 255
"""Share of full scale above which the brightest channel counts as lit."""

_DARK_FRACTION = 0.3  # of the way from surround to retina: the threshold of an underexposed image
_SMALLEST_SHARE = 0.05  # a smaller "disc" is a reflection, not a field of view
_NECK_SHARE = 0.03  # of the short side: anything narrower is no part of the disc
_CLEANING_SIDE_PX = 1024  # larger masks are cleaned on a coarser grid, for time and memory


def derive_fov(image: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the field of view of `image`: the largest lit region, without holes.

    An image without a dark surround (a crop, or a camera that fills the frame), a constant one and
    one whose lit part is too small to be a retina give the whole frame, so the mask is never empty.

    Args:
        image: `(H, W)`, `(H, W, 1)` or `(H, W, 3)`; integers span their dtype's range, floats span
            0..1, or 0..255 where a value is above 1. NaN counts as dark.

    Returns:
        Mask `(H, W)`.

    Raises:
        InputError: the shape is another one, or the image has no pixel.
    """
    brightness = _brightness(image)
    threshold = _threshold(brightness)
    if threshold is None:
        return np.ones(brightness.shape, dtype=np.bool_)
    fov = _largest_component(brightness >= threshold)
    fov = _largest_component(_without_necks(ndimage.binary_fill_holes(fov)))
    if fov.mean() < _SMALLEST_SHARE:
        return np.ones(brightness.shape, dtype=np.bool_)
    return fov


def fov_box(fov: NDArray[Any]) -> tuple[slice, slice]:
    """Return the row and column slices of the smallest box around `fov` `(H, W)`.

    Raises:
        InputError: `fov` is not 2-D, or no pixel is set.
    """
    mask = np.asarray(fov) != 0
    if mask.ndim != 2:
        raise InputError(f"fov must be (H, W), got shape {mask.shape}")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise InputError(f"fov has no pixel set in shape {mask.shape}; expected at least one")
    return (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )


def _brightness(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return the brightest channel of `image` on a 0..1 scale, `(H, W)`."""
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise InputError(
            f"image must be (H, W), (H, W, 1) or (H, W, 3) with pixels, got shape "
            f"{np.shape(image)}; drop an alpha channel first"
        )
    brightest: NDArray[np.float32] = pixels.max(axis=-1).astype(np.float32)
    if pixels.dtype == np.bool_:
        return brightest
    if np.issubdtype(pixels.dtype, np.integer):
        return brightest / np.float32(np.iinfo(pixels.dtype).max)
    brightest = np.nan_to_num(brightest, nan=0.0, posinf=0.0, neginf=0.0)
    return brightest / np.float32(255) if brightest.max() > 1 else brightest


def _threshold(brightness: NDArray[np.float32]) -> float | None:
    """Return the brightness that parts retina and surround; None where there is no surround.

    The fixed threshold holds for an ordinary exposure. In a dark image, or 12-bit values in 16-bit
    words, it moves down between the two levels that the image has; then dark corners are demanded,
    because there the darker half of a retina would pass for a surround.
    """
    surround, retina = (float(level) for level in np.percentile(brightness, (1, 95)))
    adapted = surround + _DARK_FRACTION * (retina - surround)
    if adapted >= THRESHOLD:
        return THRESHOLD if surround < THRESHOLD else None
    if _corner_level(brightness) > 0.5 * retina:
        return None
    return adapted


def _corner_level(brightness: NDArray[np.float32]) -> float:
    """Return the second darkest of the medians of the four corners.

    A field of view leaves at least two corners dark, also where the frame cuts off its top.
    """
    height, width = (max(1, side // 32) for side in brightness.shape)
    corners = (
        brightness[:height, :width],
        brightness[:height, -width:],
        brightness[-height:, :width],
        brightness[-height:, -width:],
    )
    return sorted(float(np.median(corner)) for corner in corners)[1]


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest 4-connected component; of equal ones the first in raster order."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == np.argmax(sizes), dtype=np.bool_)


def _without_necks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Open `mask` by a disc, which cuts light leaks and tabs and leaves a smooth rim as it is.

    The frame's edge is continued outwards, so that a field of view cut by the frame keeps its
    corners. A mask that opening would erase is returned unchanged.
    """
    step = ceil(max(mask.shape) / _CLEANING_SIDE_PX)
    coarse = mask[::step, ::step]
    radius_px = max(1.0, _NECK_SHARE * min(coarse.shape))
    margin = ceil(radius_px) + 1
    padded = np.pad(coarse, margin, mode="edge")
    if padded.all() or not padded.any():
        return mask
    core = ndimage.distance_transform_edt(padded) > radius_px
    if not core.any():
        return mask
    opened = ndimage.distance_transform_edt(~core) <= radius_px + 0.5
    opened = opened[margin:-margin, margin:-margin]
    opened = opened.repeat(step, axis=0).repeat(step, axis=1)[: mask.shape[0], : mask.shape[1]]
    return np.asarray(mask & opened, dtype=np.bool_)
