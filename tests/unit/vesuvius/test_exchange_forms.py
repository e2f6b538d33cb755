"""One mask in every form, each read back by a library that did not write it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.writers import write_tiff
from pipeline.errors import ConfigurationError
from pipeline.inference.batch import BatchRun
from pipeline.vesuvius.geometry import VoxelSize
from pipeline.vesuvius.phantom import scroll_phantom
from pipeline.vesuvius.whole_results import ExchangeForms, write_ome_zarr

Made = tuple[Path, NDArray[np.uint8], VoxelSize]
ALL = ExchangeForms(nifti=True, ome_tiff=True, dicom_seg=True)
SIZE = VoxelSize((7.9, 5.0, 3.25), "micrometer")
PHANTOM = (36, 40, 52)
UM_PER_MM = 1000.0


@pytest.fixture(scope="module")
def itk() -> Any:
    return pytest.importorskip("SimpleITK", reason="ITK-SNAP and 3D Slicer read by ITK")


def run_over(folder: Path, source: str = "a/scroll.tif") -> BatchRun:
    cases = [{"name": source, "image": str(folder / "in" / source)}]
    return BatchRun(cases, str(folder / "out"), {}, None, "vesuvius_surface")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def written(folder: Path, forms: ExchangeForms, mask: NDArray[np.uint8], size: VoxelSize) -> Path:
    """Write the forms beside `scroll.tif` and `scroll_surface.zarr`; return their folder."""
    batch = run_over(folder)
    found = forms.write(batch, "a/scroll.tif", mask, size, "scroll.tif")
    out = folder / "out" / "a"
    assert found == [out / f"scroll{suffix}" for suffix in forms.suffixes()]
    write_tiff(out / "scroll.tif", mask, **size.tiff_tags())
    write_ome_zarr(out / "scroll_surface.zarr", mask, size, "max", {})
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A phantom's sheets in all forms but DICOM, whose library may be absent."""
    mask = (scroll_phantom(0, PHANTOM).label == 1).astype(np.uint8)
    forms = ALL._replace(dicom_seg=False)
    return written(tmp_path_factory.mktemp("drawn"), forms, mask, SIZE), mask, SIZE


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, lamina_data: Path) -> Made:
    """The walls of an ovule, with the voxel size that its file tells."""
    source = lamina_data / "vesuvius" / "plantseg" / "sample_ovule.h5"
    if not source.is_file():
        pytest.skip("no volume of plantseg")
    with h5py.File(source) as file:
        image = file["raw"][:30, :90, :101]
        z, y, x = (float(side) for side in file["raw"].attrs["element_size_um"])
    mask = (image > np.percentile(image, 80)).astype(np.uint8)
    size = VoxelSize((z, y, x), "micrometer")
    forms = ALL._replace(dicom_seg=False)
    return written(tmp_path_factory.mktemp("real"), forms, mask, size), mask, size


@pytest.fixture(params=["drawn", "real"])
def made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


def pages(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        found = []
        for page in range(image.n_frames):
            image.seek(page)
            found.append(np.array(image))
    return np.stack(found)


def spacing_mm(size: VoxelSize) -> list[float]:
    assert size.um is not None
    return [side / UM_PER_MM for side in size.um]


def test_itk_reads_the_nifti_onto_the_competitions_tiff(itk: Any, made: Made) -> None:
    folder, mask, size = made
    image, plain = (itk.ReadImage(folder / f"scroll{suffix}") for suffix in (".nii.gz", ".tif"))
    np.testing.assert_array_equal(itk.GetArrayFromImage(image), mask)
    np.testing.assert_array_equal(itk.GetArrayFromImage(plain), mask)
    assert image.GetSpacing() == pytest.approx(spacing_mm(size)[::-1])
    assert image.GetSpacing()[:2] == pytest.approx(plain.GetSpacing()[:2])  # a TIFF knows these
    assert image.GetDirection() == plain.GetDirection()
    assert image.GetOrigin() == plain.GetOrigin()


def test_pillow_and_the_ome_schema_read_the_ome_tiff(made: Made) -> None:
    types = pytest.importorskip("ome_types", reason="ome-types holds OME-XML to the OME schema")
    folder, mask, size = made
    np.testing.assert_array_equal(pages(folder / "scroll.ome.tif"), mask)
    pixels = types.from_tiff(folder / "scroll.ome.tif").images[0].pixels
    assert (pixels.size_z, pixels.size_y, pixels.size_x) == mask.shape
    sides = (pixels.physical_size_z, pixels.physical_size_y, pixels.physical_size_x)
    assert sides == size.spacing
    assert {pixels.physical_size_z_unit.value, pixels.physical_size_x_unit.value} == {"µm"}


def test_the_models_of_ome_zarr_accept_what_is_written(made: Made) -> None:
    models = pytest.importorskip("ome_zarr_models", reason="they hold OME-Zarr to its schema")
    folder, mask, size = made
    group = zarr.open_group(folder / "scroll_surface.zarr", mode="r")
    (multiscale,) = models.open_ome_zarr(group).ome_attributes.multiscales
    axes = [(axis.name, axis.type, axis.unit) for axis in multiscale.axes]
    assert axes == [(name, "space", "micrometer") for name in "zyx"]
    first = multiscale.datasets[0]
    assert first.coordinateTransformations[0].scale == list(size.spacing or ())
    np.testing.assert_array_equal(group[first.path][:], mask)


def test_every_form_is_one_volume_in_one_place(itk: Any, tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom writes DICOM: pip install 'lamina[dicom]'")
    mask = (scroll_phantom(0, PHANTOM).label == 1).astype(np.uint8)
    folder = written(tmp_path, ALL, mask, SIZE)
    nifti, dicom = (itk.ReadImage(folder / f"scroll{suffix}") for suffix in (".nii.gz", ".dcm"))
    dicom = itk.DICOMOrient(dicom, "LPS")
    np.testing.assert_array_equal(itk.GetArrayFromImage(dicom) > 0, mask)
    assert dicom.GetSpacing() == pytest.approx(nifti.GetSpacing())
    assert dicom.GetOrigin() == pytest.approx(nifti.GetOrigin())
    assert dicom.GetDirection() == pytest.approx(nifti.GetDirection())


def test_the_place_of_a_nifti_input_comes_back(tmp_path: Path) -> None:
    affine = np.array([[0, -0.3, 0, 5], [0.7, 0, 0, -2], [0, 0, 1.9, 1], [0, 0, 0, 1]])
    mask = np.random.default_rng(0).integers(0, 2, (3, 4, 6), dtype=np.uint8)
    source = tmp_path / "in" / "scroll.NII.GZ"
    source.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(mask.T, affine), source)
    batch = run_over(tmp_path, source.name)
    size = VoxelSize((1.9, 0.3, 0.7), "millimeter")
    ExchangeForms(nifti=True).write(batch, source.name, mask, size, str(source))
    found = nibabel.load(tmp_path / "out" / "scroll.nii.gz")
    np.testing.assert_array_equal(found.affine, nibabel.load(source).affine)
    np.testing.assert_array_equal(np.asarray(found.dataobj), mask.T)


def test_a_spacing_without_a_unit_keeps_its_numbers(tmp_path: Path) -> None:
    size = VoxelSize((3.0, 2.0, 1.5), None)
    batch = run_over(tmp_path)
    ExchangeForms(nifti=True).write(batch, "a/scroll.tif", np.zeros((3, 4, 5), np.uint8), size)
    header = nibabel.load(tmp_path / "out" / "a" / "scroll.nii.gz").header
    assert header.get_zooms() == (1.5, 2, 3)
    assert header.get_xyzt_units()[0] == "unknown"


def test_a_dicom_of_unknown_voxel_size_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("highdicom", reason="highdicom writes DICOM: pip install 'lamina[dicom]'")
    mask = np.zeros((3, 4, 5), np.uint8)
    ExchangeForms(dicom_seg=True).write(run_over(tmp_path), "a/scroll.tif", mask, VoxelSize())
    said = [record.getMessage() for record in warnings_of(caplog)]
    assert said == ["a/scroll.tif: the voxel size is unknown; its .dcm states 1 mm"]


def test_without_requests_nothing_is_written(tmp_path: Path) -> None:
    mask = np.zeros((3, 4, 5), np.uint8)
    assert ExchangeForms().write(run_over(tmp_path), "a/scroll.tif", mask, SIZE) == []
    assert not list((tmp_path / "out").rglob("*"))


def test_dicom_without_its_library_stops_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    ExchangeForms(nifti=True, ome_tiff=True).check()
    with pytest.raises(ConfigurationError, match=r"save_dicom_seg: .*'lamina\[dicom\]'"):
        ALL.check()


def test_streamed_volumes_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch = run_over(tmp_path)
    batch.rows = [
        {"image": "large.zarr", "streamed": True},
        {"image": "small.tif"},
        {"image": "larger.zarr", "streamed": True},
    ]
    ExchangeForms().warn_where_streamed(batch)
    assert not warnings_of(caplog)
    ExchangeForms(nifti=True, dicom_seg=True).warn_where_streamed(batch)
    (said,) = [record.getMessage() for record in warnings_of(caplog)]
    assert said.startswith("large.zarr, larger.zarr: streamed, so there is no .nii.gz, .dcm")
