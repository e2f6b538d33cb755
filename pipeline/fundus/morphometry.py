"""How much vessel an image shows, and how wide the vessels are.

Calibres come from the distance transform. On the pixel grid that distance runs to the centre of the
nearest background pixel, which is half a pixel too far, and the centreline of an even number of
pixels lies between two of them. Both vanish on a grid twice as fine: there every width is even.
"""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import skeletonize

from pipeline.errors import InputError
from pipeline.fundus.fov import fov_box

__all__ = ["skeleton_length_px", "vessel_calibre"]

_STRAIGHT_STEP, _DIAGONAL_STEP = 0.948, 1.343  # Kulpa 1977: lengths on a square grid


def vessel_calibre(
    mask: NDArray[Any], fov: NDArray[Any] | None = None, pixel_um: float | None = None
) -> dict[str, float]:
    """Measure density, length and calibre of the vessels inside the field of view.

    Vessels cut by the rim of the field of view keep their width there: what lies outside is
    unknown, not background.

    Args:
        mask: vessels `(H, W)`; any value but 0 is vessel.
        fov: `(H, W)`; any value but 0 is inside; None is the whole frame.
        pixel_um: size of a pixel on the retina in micrometres; adds the entries in mm and um.

    Returns:
        `vessel_density` (share of the field of view; NaN where that is empty),
        `skeleton_length_px`, `mean_calibre_px` and `median_calibre_px` (full widths along the
        skeleton; NaN where there is no vessel or no background); with `pixel_um` also
        `skeleton_length_mm`, `mean_calibre_um` and `median_calibre_um`.

    Raises:
        InputError: shapes differ or are not `(H, W)`, or `pixel_um` is not positive.
    """
    vessel, inside = _checked(mask, fov)
    if pixel_um is not None and not pixel_um > 0:
        raise InputError(f"pixel_um must be positive, got {pixel_um!r}; give micrometres per pixel")
    result = {
        "vessel_density": nan,
        "skeleton_length_px": 0.0,
        "mean_calibre_px": nan,
        "median_calibre_px": nan,
    }
    if inside.any():
        box = fov_box(inside)
        vessel, inside = vessel[box] & inside[box], inside[box]
        skeleton = skeletonize(vessel)
        result["vessel_density"] = float(vessel.sum() / inside.sum())
        result["skeleton_length_px"] = skeleton_length_px(skeleton)
        calibre_px = _calibre_px(vessel | ~inside, skeleton)
        if calibre_px.size:
            result["mean_calibre_px"] = float(calibre_px.mean())
            result["median_calibre_px"] = float(np.median(calibre_px))
    if pixel_um is not None:
        result["skeleton_length_mm"] = result["skeleton_length_px"] * pixel_um / 1000
        result["mean_calibre_um"] = result["mean_calibre_px"] * pixel_um
        result["median_calibre_um"] = result["median_calibre_px"] * pixel_um
    return result


def skeleton_length_px(skeleton: NDArray[np.bool_]) -> float:
    """Return the length of a one-pixel-wide `skeleton` `(H, W)`, without bias over directions.

    Steps of 1 and root 2 overestimate every line that is not at a multiple of 45 degrees, by 5 per
    cent on average; Kulpa's weights, 0.948 and 1.343, are right on average and off by at most 5 per
    cent. A diagonal step counts where no pixel completes the corner between its two ends.
    """
    straight = np.count_nonzero(skeleton[1:] & skeleton[:-1])
    straight += np.count_nonzero(skeleton[:, 1:] & skeleton[:, :-1])
    top_left, top_right = skeleton[:-1, :-1], skeleton[:-1, 1:]
    bottom_left, bottom_right = skeleton[1:, :-1], skeleton[1:, 1:]
    diagonal = np.count_nonzero(top_left & bottom_right & ~top_right & ~bottom_left)
    diagonal += np.count_nonzero(top_right & bottom_left & ~top_left & ~bottom_right)
    return float(_STRAIGHT_STEP * straight + _DIAGONAL_STEP * diagonal)


def _calibre_px(
    not_background: NDArray[np.bool_], skeleton: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the full width at each skeleton pixel; empty where nothing bounds the vessels.

    On the doubled grid a vessel `w` pixels wide has `2w` rows, and the inner of its two middle rows
    is `w` away from the background: the distance there is the width itself.
    """
    if not_background.all() or not skeleton.any():
        return np.zeros(0)
    fine = not_background.repeat(2, axis=0).repeat(2, axis=1)
    distance = ndimage.distance_transform_edt(fine)
    height, width = skeleton.shape
    blocks = distance.reshape(height, 2, width, 2).max(axis=(1, 3))
    return np.asarray(blocks[skeleton], dtype=np.float64)


def _checked(
    mask: NDArray[Any], fov: NDArray[Any] | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    vessel = np.asarray(mask) != 0
    if vessel.ndim != 2:
        raise InputError(f"mask must be (H, W), got shape {vessel.shape}")
    inside = np.ones_like(vessel) if fov is None else np.asarray(fov) != 0
    if inside.shape != vessel.shape:
        raise InputError(f"fov has shape {inside.shape}, mask has {vessel.shape}; expected equal")
    return vessel, inside
