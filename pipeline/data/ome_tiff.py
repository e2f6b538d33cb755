"""Volumes as OME-TIFF, which napari, Fiji and ITK open: one file with axes and voxel size."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.volume_source import Spacing
from pipeline.data.writers import write_tiff

__all__ = ["OME_UNITS", "write_ome_tiff"]

OME_UNITS = {
    "angstrom": "Å",
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
}
"""The units of length of OME-XML, by their names in OME-Zarr."""

_UNKNOWN = "reference frame"  # OME's word for a length that is no length of the world


def write_ome_tiff(
    path: Path | str,
    volume: NDArray[Any],
    *,
    spacing: Spacing | None = None,
    unit: str | None = "micrometer",
    name: str = "",
) -> Path:
    """Write `volume` `(D, H, W)` as OME-TIFF with LZW, a plane a page, atomically.

    The same volume makes the same bytes.

    Args:
        path: the file, `.ome.tif`.
        volume: the voxels.
        spacing: distance between voxels along `(D, H, W)`; None where it is unknown: left out.
        unit: of the spacing, a key of `OME_UNITS`; None or another one is written as unknown.
        name: of the image in its metadata.

    Returns:
        The path.

    Raises:
        ValueError: no volume.
        ResourceError: the file cannot be written.
    """
    if volume.ndim != 3:
        raise ValueError(f"{path}: OME-TIFF takes (D, H, W) here, got {volume.shape}")
    metadata: dict[str, Any] = {"axes": "ZYX", "UUID": str(_identity(volume)), "Name": name}
    for axis, side in zip("ZYX", spacing or (), strict=False):
        metadata[f"PhysicalSize{axis}"] = float(side)
        metadata[f"PhysicalSize{axis}Unit"] = OME_UNITS.get(unit or "", _UNKNOWN)
    return write_tiff(path, volume, ome=True, metadata=metadata)


def _identity(volume: NDArray[Any]) -> uuid.UUID:
    """Return an identity by content: the one tifffile draws tells machine and time."""
    digest = hashlib.sha256(np.ascontiguousarray(volume).data).hexdigest()
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{volume.shape} {volume.dtype} {digest}")
