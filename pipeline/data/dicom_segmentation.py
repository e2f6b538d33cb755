"""Masks as DICOM Segmentation objects, by highdicom, where it is installed."""

from __future__ import annotations

import importlib
import logging
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path
from pipeline.data.volume_source import Spacing
from pipeline.errors import ConfigurationError, InputError

__all__ = ["check_dicom_installed", "write_dicom_segmentation"]

_PATIENT = "lamina"  # of nobody
_LONGEST = np.iinfo(np.uint16).max  # rows and columns
_FEWEST = 8  # voxels of a plane: highdicom 0.28 packs the bits of smaller ones wrongly
_UNKNOWN = "voxel size unknown, stated as 1 mm"
# Required of the images, and empty where it is unknown.
_EMPTY = (
    "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber",
    "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip


def check_dicom_installed() -> None:
    """Refuse to start work whose result could not be written.

    Raises:
        ConfigurationError: highdicom is not installed.
    """
    _library("highdicom")


def write_dicom_segmentation(
    path: Path | str,
    mask: NDArray[np.uint8],
    *,
    label: str,
    algorithm: str,
    spacing_mm: Spacing | None = None,
) -> Path:
    """Write `mask` `(D, H, W)` as a binary DICOM Segmentation with one segment, atomically.

    A Segmentation refers to images and a patient. The images here are of a CT series made for it,
    which is no file; the patient's id is `lamina`, and nothing tells of a person. Rows, columns and
    planes run to the left, the back and the head, from the first voxel at 0. Its numbers are drawn,
    so that each file is an object of its own.

    Args:
        path: the file, `.dcm`.
        mask: 0 and 1.
        label: what the segment is.
        algorithm: what made it.
        spacing_mm: distance between voxels along `(D, H, W)`; None where it is unknown: 1 mm, and
            the content description says so.

    Returns:
        The path.

    Raises:
        ConfigurationError: highdicom is not installed.
        InputError: planes of more rows or columns than DICOM counts, or of fewer than 8 voxels.
        ValueError: no mask.
        ResourceError: the file cannot be written.
    """
    highdicom = _library("highdicom")
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of each field it copies
    if mask.ndim != 3 or mask.dtype != np.uint8 or mask.max(initial=0) > 1:
        raise ValueError(f"{path}: expected 0 and 1 in (D, H, W) of uint8, got {mask.shape}")
    if max(mask.shape[1:]) > _LONGEST or mask[0].size < _FEWEST:
        raise InputError(
            f"{path}: planes of {mask.shape[1:]} voxels, expected at least {_FEWEST} and at most "
            f"{_LONGEST} along an axis; set save_dicom_seg to false, save_ome_zarr to true"
        )
    draw_uid = _library("pydicom.uid").generate_uid
    segmentation = highdicom.seg.Segmentation(
        _images(mask.shape, spacing_mm or (1.0, 1.0, 1.0)),
        mask,
        "BINARY",
        [_segment(highdicom, label, algorithm)],
        series_instance_uid=draw_uid(),
        series_number=2,
        sop_instance_uid=draw_uid(),
        instance_number=1,
        manufacturer="Lamina",
        manufacturer_model_name=algorithm,
        software_versions=metadata.version("lamina"),
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=_UNKNOWN if spacing_mm is None else label,
        omit_empty_frames=False,  # the shape is kept, also of a mask of nothing
    )
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)
    return Path(path)


def _images(shape: tuple[int, ...], spacing_mm: Spacing) -> list[Any]:
    """Return the headers of a CT series with an image per plane, without pixels."""
    dataset, uids = _library("pydicom.dataset"), _library("pydicom.uid")
    decimal = _library("pydicom.valuerep").format_number_as_ds
    depth, rows, columns = shape
    z, y, x = (float(side) for side in spacing_mm)
    study, series, frame_of_reference = (uids.generate_uid() for _ in range(3))
    images = []
    for plane in range(depth):
        image = dataset.Dataset()
        image.SOPClassUID, image.SOPInstanceUID = uids.CTImageStorage, uids.generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID = frame_of_reference
        image.PatientID, image.PatientName = _PATIENT, f"{_PATIENT}^"
        for keyword in _EMPTY:
            setattr(image, keyword, "")
        image.Modality, image.SeriesNumber, image.InstanceNumber = "CT", 1, plane + 1
        image.Rows, image.Columns = rows, columns
        image.PixelSpacing = [decimal(y), decimal(x)]
        image.SliceThickness = decimal(z)
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [0, 0, decimal(plane * z)]
        images.append(image)
    return images


def _segment(highdicom: ModuleType, label: str, algorithm: str) -> Any:
    codes = _library("pydicom.sr.codedict").codes
    return highdicom.seg.SegmentDescription(
        1,
        label,
        codes.SCT.PhysicalObject,
        highdicom.sr.CodedConcept("segment", "99LAMINA", label),  # no public code for such things
        "AUTOMATIC",
        highdicom.AlgorithmIdentificationSequence(
            algorithm, codes.DCM.ArtificialIntelligence, metadata.version("lamina")
        ),
    )


def _library(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            "save_dicom_seg: highdicom is not installed or broken; pip install 'lamina[dicom]', "
            "or set it to false"
        ) from error
