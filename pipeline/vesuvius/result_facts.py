"""What a person is told of a result: what was found, and what should make them look twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.vesuvius.member_agreement import IDENTICAL

__all__ = ["foreground_facts", "log_facts"]

logger = logging.getLogger(__name__)

# The share of the voxels that sheets take; outside of it, something is wrong with the prediction.
_PLAUSIBLE_FOREGROUND = (0.001, 0.4)


def foreground_facts(
    foreground: int, voxels: int, name: str, member_difference: float | None = None
) -> dict[str, Any]:
    """Return and log what is remarkable about a result, for its sidecar.

    Args:
        foreground: voxels of surface.
        voxels: of the volume.
        name: of the input, for the log.
        member_difference: as the function of that name returns it.

    Returns:
        `foreground`, `background`, `foreground_percent`, `member_difference` where it is known, and
        `warnings`: a list of sentences, usually empty.
    """
    share, (least, most) = foreground / voxels, _PLAUSIBLE_FOREGROUND
    warnings = []
    if not least <= share <= most:
        warnings.append(
            f"{share:.2%} of the volume is surface, expected {least:.1%} to {most:.0%}: check "
            "activation, threshold and preprocessing"
        )
    if member_difference is not None and member_difference <= IDENTICAL:
        warnings.append(
            f"members of the ensemble differ by {member_difference:.1g} at most: they are one "
            "model, or saturated; check the checkpoints"
        )
    for warning in warnings:
        logger.warning("%s: %s", name, warning)
    known = {} if member_difference is None else {"member_difference": member_difference}
    return {
        "foreground": foreground,
        "background": voxels - foreground,
        "foreground_percent": round(100 * share, 4),
        **known,
        "warnings": warnings,
    }


def log_facts(name: str, details: Mapping[str, Any]) -> None:
    """Say in one line what a sidecar will say of a volume.

    Args:
        name: of the input.
        details: with `shape`, `source_dtype`, `checkpoint`, what `foreground_facts` returns and
            `seconds`; of a repaired volume also what `sheet_facts` returns.
    """
    metrics = details["checkpoint"].get("metrics", {})
    scores = [f"{key} {value:.4g}" for key, value in metrics.items() if "loss" not in key][:2]
    found = "not repaired, sheets not counted"
    if "sheets" in details:
        area = f", {details['area_mm2']:.4g} mm2" if "area_mm2" in details else ""
        largest = details["largest_sheet_voxels"]
        found = f"{details['sheets']} sheets{area}, the largest of {largest} voxels"
    logger.info(
        "%s: %s of %s; checkpoint of epoch %s (%s); foreground %d, background %d voxels (%.2f %%); "
        "%s; %s",
        name, tuple(details["shape"]), details["source_dtype"],
        details["checkpoint"].get("epoch", "?"), ", ".join(scores),
        details["foreground"], details["background"], details["foreground_percent"], found,
        ", ".join(f"{stage} {s:.1f} s" for stage, s in details["seconds"].items()),
    )  # fmt: skip
