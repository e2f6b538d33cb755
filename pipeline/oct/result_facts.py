"""What a person is told of a file's boundaries, and what should make them look twice."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pipeline.oct.coordinates import Layers
from pipeline.oct.tables import thickness_um
from pipeline.oct.volume import OctVolume

__all__ = ["layer_facts"]

logger = logging.getLogger(__name__)


def layer_facts(volume: OctVolume, rows: Layers, least_valid: float, name: str) -> dict[str, Any]:
    """Return what a person is told of a file's boundaries; warn of those not to be trusted.

    Args:
        volume: the file.
        rows: of all of its B-scans, `(N, W)`, in its frame.
        least_valid: share of valid columns below which it is flagged.
        name: of the input, for the log.

    Returns:
        `bscans`; `ilm_valid` and `bm_valid`, shares of the columns; `ilm_sigma_px` and
        `bm_sigma_px`, means; `thickness_px` and `thickness_um`, means over the columns where both
        are valid, None where there is none or no scale; `flagged`; `flagged_bscans`, indices.
    """
    both = rows.ilm_valid & rows.bm_valid
    thickness = (rows.bm_px - rows.ilm_px)[both]
    in_um = thickness_um(volume, rows)
    shares = np.minimum(rows.ilm_valid.mean(axis=1), rows.bm_valid.mean(axis=1))
    ilm, bm = float(rows.ilm_valid.mean()), float(rows.bm_valid.mean())
    flagged = min(ilm, bm) < least_valid
    if flagged:
        logger.warning(
            "%s: %.0f %% of the ILM's and %.0f %% of BM's columns are valid, expected %.0f %%: a "
            "pathological or foreign scan; look at its picture before using the rows",
            name, 100 * ilm, 100 * bm, 100 * least_valid,
        )  # fmt: skip
    return {
        "bscans": len(shares),
        "ilm_valid": round(ilm, 4),
        "bm_valid": round(bm, 4),
        "ilm_sigma_px": round(float(rows.ilm_sigma_px.mean()), 4),
        "bm_sigma_px": round(float(rows.bm_sigma_px.mean()), 4),
        "thickness_px": round(float(thickness.mean()), 3) if both.any() else None,
        "thickness_um": None if in_um is None or not both.any() else round(np.nanmean(in_um), 2),
        "flagged": flagged,
        "flagged_bscans": np.flatnonzero(shares < least_valid).tolist(),
    }
