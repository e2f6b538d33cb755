"""NIfTI written by nibabel, read back by its bytes and by ITK."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.nifti_writer import write_nifti
from pipeline.data.volumes import open_volume
from pipeline.errors import InputError

SHAPES = st.permutations([3, 5, 8]) | st.permutations([1, 2, 13])
SIDES = st.lists(st.floats(1e-3, 1e2), min_size=3, max_size=3, unique=True)
PLACE = (
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
VOXELS_AT = 352
MM = 2


def noise(shape: Any) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 2, tuple(shape), dtype=np.uint8)


def sform(path: Path) -> NDArray[np.float32]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), "<f4", 12, 280).reshape(3, 4)


@given(shape=SHAPES, spacing=SIDES)
def test_the_bytes_are_x_y_z_with_their_sizes(
    scratch: Path, shape: list[int], spacing: list[float]
) -> None:
    volume = noise(shape)
    path = write_nifti(scratch / "v.nii.gz", volume, spacing=tuple(spacing))
    data = gzip.decompress(path.read_bytes())
    assert struct.unpack_from("<8h", data, 40)[:4] == (3, *shape[::-1])
    assert struct.unpack_from("<8f", data, 76)[1:4] == pytest.approx(spacing[::-1])
    assert data[123] == MM
    assert struct.unpack_from("<2h", data, 252) == (1, 1)  # qform_code, sform_code
    np.testing.assert_allclose(sform(path)[:, :3], np.diag([-1, -1, 1] * np.array(spacing[::-1])))
    stored = np.frombuffer(data, np.uint8, volume.size, VOXELS_AT)
    np.testing.assert_array_equal(stored, volume.ravel())  # x fastest, as in (D, H, W)


@given(shape=SHAPES, spacing=SIDES)
def test_itk_reads_the_voxels_and_their_sizes_where_it_puts_a_plain_stack(
    itk: Any, scratch: Path, shape: list[int], spacing: list[float]
) -> None:
    volume = noise(shape)
    image = itk.ReadImage(write_nifti(scratch / "i.nii.gz", volume, spacing=tuple(spacing)))
    np.testing.assert_array_equal(itk.GetArrayFromImage(image), volume)
    assert image.GetPixelIDValue() == itk.sitkUInt8
    assert image.GetSize() == tuple(shape[::-1])
    assert image.GetSpacing() == pytest.approx(spacing[::-1])
    assert image.GetOrigin() == (0, 0, 0)
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_itk_reads_each_type_as_it_is(itk: Any, tmp_path: Path, dtype: str) -> None:
    volume = (noise((3, 4, 5)) * 250).astype(dtype)
    found = itk.GetArrayFromImage(itk.ReadImage(write_nifti(tmp_path / "v.nii", volume)))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, volume)


@pytest.mark.parametrize("spacing", [None, (3.0, 2.0, 1.5)])
def test_an_unknown_unit_is_not_claimed(
    tmp_path: Path, spacing: tuple[float, float, float] | None
) -> None:
    path = write_nifti(tmp_path / "v.nii.gz", noise((3, 4, 5)), spacing=spacing, unit=None)
    with open_volume(path) as volume:
        assert volume.spacing == (spacing or (1, 1, 1))
        assert volume.unit is None


def oblique(kind: Any, shape: tuple[int, int, int], **codes: int) -> Any:
    """An image that lies askew, whose qform and sform differ, with a name in its header."""
    about_z = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -1]])  # and mirrored
    about_y = np.array([[0.28, 0, 0.96], [0, 1, 0], [-0.96, 0, 0.28]])
    turn = about_z @ about_y @ np.diag([0.7, 0.3, 1.9])
    affine = np.vstack([np.column_stack([turn, [-11.25, 40.1, 7 / 3]]), [0, 0, 0, 1]])
    image = kind(noise(shape), affine)
    image.header.set_qform(affine, code=codes.get("qform", 1))
    image.header.set_sform(affine + codes.get("apart", 0) * 0.125, code=codes.get("sform", 2))
    image.header.set_xyzt_units("micron", "sec")
    image.header["descrip"] = b"Somebody's name"
    return image


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(
    "codes", [{}, {"apart": 1}, {"sform": 0}, {"qform": 0}, {"qform": 0, "sform": 0}], ids=str
)
def test_the_place_of_a_nifti_comes_back_to_the_bit(
    tmp_path: Path, kind: Any, codes: dict[str, int]
) -> None:
    source = tmp_path / "in.nii.gz"
    nibabel.save(oblique(kind, (6, 4, 3), **codes), source)
    with open_volume(source) as volume:
        path = write_nifti(tmp_path / "out.nii.gz", volume[:, :, :], like=source)
    given_image, found = (nibabel.load(one) for one in (source, path))
    assert type(found) is kind
    for field in PLACE:
        np.testing.assert_array_equal(found.header[field], given_image.header[field], field)
    assert found.header.get_xyzt_units() == ("micron", "unknown")
    np.testing.assert_array_equal(found.header["pixdim"][:4], given_image.header["pixdim"][:4])
    np.testing.assert_array_equal(found.affine, given_image.affine)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(given_image.dataobj))
    assert b"Somebody" not in gzip.decompress(path.read_bytes())


def test_itk_puts_it_where_its_input_lies(itk: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.nii.gz"
    nibabel.save(oblique(nibabel.Nifti1Image, (6, 4, 3)), source)
    with open_volume(source) as volume:
        path = write_nifti(tmp_path / "out.nii.gz", volume[:, :, :], like=source)
    before, after = (itk.ReadImage(one) for one in (source, path))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(after, fact)() == getattr(before, fact)()
    assert 0 not in before.GetDirection()[:3]
    np.testing.assert_array_equal(*map(itk.GetArrayFromImage, (before, after)))


def test_the_same_volume_makes_the_same_bytes(tmp_path: Path) -> None:
    paths = [write_nifti(tmp_path / name, noise((3, 4, 5))) for name in ("a.nii.gz", "b.nii.gz")]
    assert len({path.read_bytes() for path in paths}) == 1
    assert sorted(tmp_path.iterdir()) == paths


def test_an_axis_that_nifti_cannot_count_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_nifti(tmp_path / "long.nii", np.zeros((1, 2, 32767), np.uint8))
    with pytest.raises(InputError, match="32768 voxels along an axis, NIfTI counts to 32767; set"):
        write_nifti(tmp_path / "longer.nii", np.zeros((1, 2, 32768), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["long.nii"]


def test_another_shape_than_that_of_the_nifti_is_refused(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "in.nii", noise((3, 4, 5)))
    with pytest.raises(ValueError, match=r"in.nii: shape \(5, 4, 3\).*\(3, 4, 5\)"):
        write_nifti(tmp_path / "out.nii", noise((5, 4, 3)), like=source)
    with pytest.raises(ValueError, match=r"takes \(D, H, W\), got \(4, 5\)"):
        write_nifti(tmp_path / "out.nii", noise((4, 5)))
