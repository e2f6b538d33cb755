"""Results that are folders, under their final name only once they are whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.data.atomic import resource_errors, sync_folder
from pipeline.data.ome_zarr import build_levels, create_ome_zarr
from pipeline.vesuvius.geometry import VoxelSize

__all__ = ["whole_folder", "write_ome_zarr"]

_CHUNK = 128  # voxels along an axis


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give a new folder to fill and move it to `final`, in place of what is there.

    What a killed run left is removed by the next one for the same result.

    Args:
        final: where the folder belongs.

    Yields:
        The folder to fill.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.removed")
    with resource_errors(final):
        for left in (partial, old):
            if left.exists():
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if final.exists():
            final.replace(old)
        partial.replace(final)
        sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)


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
