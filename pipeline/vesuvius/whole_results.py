"""Volumes as OME-Zarr, under their final name only once they are whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.data.atomic import whole_folder
from pipeline.data.ome_zarr import build_levels, create_ome_zarr
from pipeline.vesuvius.geometry import VoxelSize

__all__ = ["write_ome_zarr"]

_CHUNK = 128  # voxels along an axis


def write_ome_zarr(
    path: Path,
    volume: NDArray[Any],
    size: VoxelSize,
    reduce: str,
    attributes: Mapping[str, Any],
) -> Path:
    """Write `volume` `(D, H, W)` as OME-Zarr with coarser levels; return the path.

    Args:
        path: the folder, `name.zarr`.
        volume: the voxels.
        size: of a voxel.
        reduce: how a coarser level is made: `mean`, `nearest` or `max`.
        attributes: of the group, beside OME-Zarr's own.

    Raises:
        ResourceError: the folder cannot be written.
    """
    with whole_folder(path) as folder:
        made = folder / path.name  # the image is named by its folder
        chunks = [min(_CHUNK, length) for length in volume.shape]
        unit = size.unit if size.um is not None else None
        array = create_ome_zarr(
            made, volume.shape, volume.dtype, chunks,
            spacing=size.spacing, unit=unit, attributes=attributes,
        )  # fmt: skip
        array[:] = volume
        build_levels(made, reduce=reduce)
        for child in made.iterdir():
            child.replace(folder / child.name)
        made.rmdir()
    return path
