"""Whole volumes in the forms that other programs open: OME-Zarr, NIfTI, OME-TIFF, DICOM."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import whole_folder
from pipeline.data.dicom_segmentation import check_dicom_installed, write_dicom_segmentation
from pipeline.data.nifti_writer import write_nifti
from pipeline.data.ome_tiff import write_ome_tiff
from pipeline.data.ome_zarr import build_levels, create_ome_zarr
from pipeline.data.volume_source import Spacing
from pipeline.inference.batch import BatchRun
from pipeline.vesuvius.geometry import VoxelSize

__all__ = ["ExchangeForms", "write_ome_zarr"]

logger = logging.getLogger(__name__)

_CHUNK = 128  # voxels along an axis
_UM_PER_MM = 1000.0
_NIFTI = (".nii", ".nii.gz")


class ExchangeForms(NamedTuple):
    """The mask once more, on request, as one file that programs for images of bodies open.

    Args:
        nifti: as `<name>.nii.gz`; of a NIfTI input the place is kept.
        ome_tiff: as `<name>.ome.tif`.
        dicom_seg: as `<name>.dcm`, a binary Segmentation.
    """

    nifti: bool = False
    ome_tiff: bool = False
    dicom_seg: bool = False

    def check(self) -> None:
        """Refuse what could not be written in the end.

        Raises:
            ConfigurationError: DICOM is asked for without its library.
        """
        if self.dicom_seg:
            check_dicom_installed()

    def suffixes(self) -> list[str]:
        """Return what the names of the files asked for end with."""
        forms = {".nii.gz": self.nifti, ".ome.tif": self.ome_tiff, ".dcm": self.dicom_seg}
        return [suffix for suffix, wanted in forms.items() if wanted]

    def write(
        self,
        batch: BatchRun,
        name: str,
        mask: NDArray[np.uint8],
        size: VoxelSize,
        source: str = "",
    ) -> list[Path]:
        """Write what was asked for; return the files.

        Args:
            batch: the run, which names them.
            name: of the input.
            mask: `(D, H, W)`, 0 and 1.
            size: of a voxel.
            source: the input's file.

        Raises:
            InputError: the mask has more voxels along an axis than a form can count.
            ResourceError: a file cannot be written.
        """
        written = {suffix: batch.path(name, suffix) for suffix in self.suffixes()}
        spacing_mm = _spacing_mm(size)
        if self.nifti:
            like = source if source.lower().endswith(_NIFTI) else None
            write_nifti(
                written[".nii.gz"], mask,
                spacing=spacing_mm or size.spacing, unit="mm" if spacing_mm else None, like=like,
            )  # fmt: skip
        if self.ome_tiff:
            path = written[".ome.tif"]
            write_ome_tiff(path, mask, spacing=size.spacing, unit=size.unit, name=Path(name).name)
        if self.dicom_seg:
            if spacing_mm is None:
                logger.warning("%s: the voxel size is unknown; its .dcm states 1 mm", name)
            write_dicom_segmentation(
                written[".dcm"], mask,
                label="papyrus surface", algorithm=batch.bundle, spacing_mm=spacing_mm,
            )  # fmt: skip
        return list(written.values())

    def warn_where_streamed(self, batch: BatchRun) -> None:
        """Say of which volumes these files are missing, because they never were in memory."""
        streamed = [str(row["image"]) for row in batch.rows if row.get("streamed")]
        if streamed and (suffixes := self.suffixes()):
            logger.warning(
                "%s: streamed, so there is no %s, which needs the whole; there is OME-Zarr",
                ", ".join(streamed), ", ".join(suffixes),
            )  # fmt: skip


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


def _spacing_mm(size: VoxelSize) -> Spacing | None:
    if size.um is None:
        return None
    z, y, x = (side / _UM_PER_MM for side in size.um)
    return z, y, x
