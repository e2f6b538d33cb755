"""What a volume's file says of the size of its voxels, and how results keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.volumes import open_volume

__all__ = ["VoxelSize", "voxel_size"]

_UM = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
_RATIOS = (1e-6, 4e9)  # between which two numbers of 32 bits can tell a TIFF's resolution
_UM_PER_CM = 1e4


class VoxelSize(NamedTuple):
    """The distance between voxels.

    Args:
        spacing: along `(D, H, W)` in `unit`; None where it is unknown.
        unit: such as `micrometer`; None where it is unknown.
    """

    spacing: tuple[float, float, float] | None = None
    unit: str | None = None

    @property
    def um(self) -> tuple[float, float, float] | None:
        """The spacing in micrometres; None where it or a unit of length is unknown."""
        if self.spacing is None or self.unit not in _UM:
            return None
        z, y, x = (side * _UM[self.unit] for side in self.spacing)
        return z, y, x

    def tiff_tags(self) -> dict[str, Any]:
        """Return arguments of `write_tiff` that keep it: pixels per centimetre, and all in JSON."""
        if self.um is None:
            return {}
        tags: dict[str, Any] = {
            "metadata": {"spacing_zyx": list(self.spacing or ()), "unit": self.unit}
        }
        per_cm = (_UM_PER_CM / self.um[2], _UM_PER_CM / self.um[1])
        if all(_RATIOS[0] < pixels < _RATIOS[1] for pixels in per_cm):
            tags |= {"resolution": per_cm, "resolutionunit": "CENTIMETER"}
        return tags

    def facts(self) -> dict[str, Any]:
        """Return `spacing` and `unit` for a sidecar."""
        return {"spacing": None if self.spacing is None else list(self.spacing), "unit": self.unit}


def voxel_size(path: str | Path, spacing: Sequence[float]) -> VoxelSize:
    """Return the size of the voxels of a volume that was read.

    Args:
        path: of its file, which alone knows the unit.
        spacing: as `LoadVolumed` gives it, NaN where it is unknown.
    """
    if len(spacing) != 3 or not all(math.isfinite(side) and side > 0 for side in spacing):
        return VoxelSize()
    z, y, x = (float(side) for side in spacing)
    if not Path(path).exists():
        return VoxelSize((z, y, x))
    with open_volume(path) as volume:
        return VoxelSize((z, y, x), volume.unit)
