"""Segmentations written by highdicom, read back by the fields of pydicom and by ITK's GDCM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.dicom_segmentation import check_dicom_installed, write_dicom_segmentation
from pipeline.errors import ConfigurationError, InputError

SHAPES = st.permutations([3, 5, 8]) | st.permutations([2, 9, 13])
SIDES = st.lists(st.floats(1e-3, 1e2), min_size=3, max_size=3, unique=True)
SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
ABOUT_A_PERSON = {"PatientBirthDate", "PatientSex", "AccessionNumber", "ReferringPhysicianName"}


@pytest.fixture(scope="module")
def pydicom() -> Any:
    pytest.importorskip("highdicom", reason="highdicom writes DICOM: pip install 'lamina[dicom]'")
    return pytest.importorskip("pydicom")


def noise(shape: Any) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 2, tuple(shape), dtype=np.uint8)


def write(path: Path, mask: NDArray[np.uint8], spacing: Any = None) -> Path:
    return write_dicom_segmentation(
        path, mask, label="papyrus surface", algorithm="vesuvius_surface", spacing_mm=spacing
    )


def stacked(data: Any, depth_mm: float) -> NDArray[np.uint8]:
    """Return `(D, H, W)` from the packed bits, each frame put where its position says."""
    frames, rows, columns = int(data.NumberOfFrames), data.Rows, data.Columns
    bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder="little")
    bits = bits[: frames * rows * columns].reshape(frames, rows, columns)
    volume = np.full_like(bits, 9)
    for frame, facts in zip(bits, data.PerFrameFunctionalGroupsSequence, strict=True):
        x, y, z = facts.PlanePositionSequence[0].ImagePositionPatient
        assert (x, y) == (0, 0)
        volume[round(z / depth_mm)] = frame
    return volume


@settings(max_examples=20)
@given(shape=SHAPES, spacing=SIDES)
def test_the_packed_bits_and_their_places_are_the_mask(
    pydicom: Any, scratch: Path, shape: list[int], spacing: list[float]
) -> None:
    mask = noise(shape)
    data = pydicom.dcmread(write(scratch / "v.dcm", mask, tuple(spacing)))
    assert data.SOPClassUID == data.file_meta.MediaStorageSOPClassUID == SEGMENTATION_STORAGE
    assert (data.Modality, data.SegmentationType, data.BitsAllocated) == ("SEG", "BINARY", 1)
    shared = data.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    found = [measures.SliceThickness, *measures.PixelSpacing]
    assert [float(side) for side in found] == pytest.approx(spacing)
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert [float(one) for one in orientation] == [1, 0, 0, 0, 1, 0]
    np.testing.assert_array_equal(stacked(data, spacing[0]), mask)


# Whole bytes of voxels: of the last byte GDCM reads none where it is not full.
@settings(max_examples=20)
@given(shape=st.permutations([3, 5, 8]) | st.permutations([2, 4, 13]), spacing=SIDES)
def test_gdcm_reads_voxels_and_sizes(
    pydicom: Any, itk: Any, scratch: Path, shape: list[int], spacing: list[float]
) -> None:
    mask = noise(shape)
    image = itk.ReadImage(write(scratch / "i.dcm", mask, tuple(spacing)))
    image = itk.DICOMOrient(image, "LPS")  # the frames may be stored from the last to the first
    np.testing.assert_array_equal(itk.GetArrayFromImage(image) > 0, mask)
    assert image.GetSpacing() == pytest.approx(spacing[::-1])
    assert image.GetOrigin() == pytest.approx((0, 0, 0))
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_nothing_tells_of_a_person(pydicom: Any, tmp_path: Path) -> None:
    data = pydicom.dcmread(write(tmp_path / "somebody.dcm", noise((3, 4, 5))))
    assert (data.PatientID, str(data.PatientName)) == ("lamina", "lamina^")
    assert not any(str(data.get(keyword, "")) for keyword in ABOUT_A_PERSON)
    names = [element.value for element in data.iterall() if element.VR == "PN" and element.value]
    assert set(map(str, names)) == {"lamina^"}
    assert b"somebody" not in (tmp_path / "somebody.dcm").read_bytes()


def test_each_file_is_an_object_of_its_own(pydicom: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / name, noise((3, 4, 5))) for name in ("a.dcm", "b.dcm")]
    first, second = map(pydicom.dcmread, paths)
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert first[keyword].value != second[keyword].value
    assert sorted(tmp_path.iterdir()) == paths


def test_the_images_that_it_refers_to_are_one_for_each_plane(pydicom: Any, tmp_path: Path) -> None:
    data = pydicom.dcmread(write(tmp_path / "v.dcm", noise((3, 4, 5))))
    (series,) = data.ReferencedSeriesSequence
    images = {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence}
    assert len(images) == 3
    assert series.SeriesInstanceUID != data.SeriesInstanceUID


def test_the_segment_is_named(pydicom: Any, tmp_path: Path) -> None:
    data = pydicom.dcmread(write(tmp_path / "v.dcm", noise((3, 4, 5)), (3, 2, 1)))
    (segment,) = data.SegmentSequence
    assert segment.SegmentLabel == "papyrus surface"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentAlgorithmName == "vesuvius_surface"
    assert data.ContentDescription == "papyrus surface"


def test_a_size_that_is_unknown_is_stated_as_such(pydicom: Any, tmp_path: Path) -> None:
    data = pydicom.dcmread(write(tmp_path / "v.dcm", noise((3, 4, 5))))
    measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [float(one) for one in (measures.SliceThickness, *measures.PixelSpacing)] == [1, 1, 1]
    assert data.ContentDescription == "voxel size unknown, stated as 1 mm"


def test_a_mask_of_nothing_keeps_its_shape(pydicom: Any, tmp_path: Path) -> None:
    data = pydicom.dcmread(write(tmp_path / "v.dcm", np.zeros((3, 4, 5), np.uint8)))
    np.testing.assert_array_equal(stacked(data, 1.0), np.zeros((3, 4, 5)))


@pytest.mark.parametrize("shape", [(1, 2, 65536), (20, 7, 1)])
def test_planes_that_dicom_or_its_library_cannot_hold_are_refused(
    pydicom: Any, tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    with pytest.raises(InputError, match=r"v.dcm: planes of .* voxels, expected at least 8 and at"):
        write(tmp_path / "v.dcm", np.zeros(shape, np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [np.full((3, 4, 5), 2, np.uint8), np.zeros((4, 5), np.uint8)])
def test_something_else_than_a_mask_is_refused(
    pydicom: Any, tmp_path: Path, mask: NDArray[np.uint8]
) -> None:
    with pytest.raises(ValueError, match=r"expected 0 and 1 in \(D, H, W\) of uint8, got"):
        write(tmp_path / "v.dcm", mask)


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    for attempt in (check_dicom_installed, lambda: write(tmp_path / "v.dcm", noise((3, 4, 5)))):
        with pytest.raises(ConfigurationError, match=r"highdicom .* pip install 'lamina\[dicom\]'"):
            attempt()
    assert not list(tmp_path.iterdir())
