"""Volumes as NIfTI, which napari, ITK-SNAP and 3D Slicer open."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path
from pipeline.data.volume_source import Spacing
from pipeline.errors import InputError

if TYPE_CHECKING:
    import nibabel

__all__ = ["write_nifti"]

_LONGEST = np.iinfo(np.int16).max  # voxels along an axis; ITK does not read NIfTI-2, which has more
_SCANNER = 1  # the place is that of the scan
_SPACE_UNIT_BITS = 7  # the others are units of time
# What says where the voxels lie; pixdim does too, in its first four numbers.
_PLACE = (
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def write_nifti(
    path: Path | str,
    volume: NDArray[Any],
    *,
    spacing: Spacing | None = None,
    unit: Literal["mm", "micron", "meter"] | None = "mm",
    like: Path | str | None = None,
) -> Path:
    """Write `volume` `(D, H, W)` as NIfTI with the axes W, H, D, atomically.

    Rows, columns and planes run to the left, the back and the head, from the first voxel at 0.
    That is where ITK puts a volume without a place, such as a TIFF stack: the two lie on each other
    in ITK-SNAP and 3D Slicer. The same volume makes the same bytes.

    Args:
        path: the file, `.nii` or `.nii.gz`.
        volume: the voxels.
        spacing: distance between voxels along `(D, H, W)`; None where it is unknown: 1, without a
            unit.
        unit: of the spacing; None where it is unknown. Readers then take it for millimetres.
        like: a NIfTI file of the same voxels, as `open_volume` gives them, whose place is kept to
            the bit. Nothing else of its header is: it may tell whose scan it is.

    Returns:
        The path.

    Raises:
        InputError: an axis is longer than NIfTI-1 counts.
        ValueError: no volume, or `like` has another shape.
        ResourceError: the file cannot be written.
    """
    import nibabel
    from nibabel.imageglobals import LoggingOutputSuppressor

    if volume.ndim != 3:
        raise ValueError(f"{path}: NIfTI takes (D, H, W), got {volume.shape}")
    with LoggingOutputSuppressor():  # it writes to the standard error what it mends in a header
        source: Any = None if like is None else nibabel.load(like)
    second = isinstance(source, nibabel.Nifti2Image)
    if max(volume.shape) > _LONGEST and not second:
        raise InputError(
            f"{path}: {max(volume.shape)} voxels along an axis, NIfTI counts to {_LONGEST}; "
            "set save_nifti to false, save_ome_zarr to true"
        )
    kind: Any = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    header = kind.header_class()
    header.set_data_dtype(volume.dtype)
    header.set_data_shape(volume.T.shape)
    if source is None:
        _set_place(header, spacing, unit)
    else:
        _copy_place(header, source, like)
    with atomic_path(path) as temporary:
        # Without an affine the place in the header is left as it is.
        nibabel.save(kind(volume.T, None, header), temporary)
    return Path(path)


def _set_place(header: nibabel.Nifti1Header, spacing: Spacing | None, unit: str | None) -> None:
    z, y, x = spacing or (1.0, 1.0, 1.0)
    affine = np.diag([-x, -y, z, 1.0])  # NIfTI's axes lead to the right, the front and the head
    header.set_qform(affine, _SCANNER)
    header.set_sform(affine, _SCANNER)
    if spacing is not None and unit is not None:
        header.set_xyzt_units(unit)


def _copy_place(header: nibabel.Nifti1Header, source: Any, path: Path | str | None) -> None:
    found, shape = source.header, source.shape
    if shape[:3] != header.get_data_shape() or math.prod(shape[3:]) != 1:
        raise ValueError(
            f"{path}: shape {shape}, that of the volume to be written is {header.get_data_shape()}"
        )
    for field in _PLACE:
        header[field] = found[field]
    header["pixdim"][:4] = found["pixdim"][:4]
    header["xyzt_units"] = found["xyzt_units"] & _SPACE_UNIT_BITS
