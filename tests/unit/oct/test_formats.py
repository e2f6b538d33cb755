"""Which reader a file goes to: by its first bytes, then by its suffix."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.oct import formats
from pipeline.oct.formats import oct_format, read_oct, write_predictions
from pipeline.oct.prediction_rows import StoredRows

HDF5 = b"\x89HDF\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.h5", HDF5 + b"rest", "hdf5"),
        ("a", HDF5 + b"rest", "hdf5"),
        ("a.mat", HDF5 + b"rest", "mat"),
        ("a.h5", bytes(512) + HDF5 + b"rest", "hdf5"),
        ("a.mat", b"MATLAB 5.0 MAT-file, Platform", "mat"),
        ("a", (b"MATLAB 7.3 MAT-file").ljust(512) + HDF5, "mat"),
        ("a.mat", b"\0\0\0\0version 4", "mat"),
        ("a.vol", b"HSF-OCT-103\0", "vol"),
        ("a.bin", b"HSF-OCT-103\0", "vol"),
        ("a.VOL", b"damaged", "vol"),
        ("a.hdf5", b"damaged", "hdf5"),
        ("a.dcm", bytes(128) + b"DICM", "optional"),
        ("a", bytes(128) + b"DICM", "optional"),
        ("a.E2E", b"CMDb", "optional"),
        ("a.fda", b"FOCT", "optional"),
        ("a.img", b"pixels", "optional"),
        ("a.xml", b"<?xml", "optional"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "images"),
        ("a.TIFF", b"II*\0", "images"),
        ("a.tif.gz", b"\x1f\x8b", "images"),
    ],
)
def test_first_bytes_then_the_suffix_say_what_a_file_is(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert oct_format(tmp_path / name) == kind
    assert oct_format(str(tmp_path / name)) == kind


def test_a_folder_holds_images_unless_heidelberg_exported_it(tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(b"")
    assert oct_format(tmp_path) == "images"
    (tmp_path / "export.XML").write_bytes(b"")
    assert oct_format(tmp_path) == "optional"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.xyz: not found"),
        (b"", "a.xyz: is empty"),
        (b"nothing known", r"a.xyz: begins with b'nothing ' and ends in \.xyz, .*expected HDF5"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "a.xyz").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_oct(tmp_path / "a.xyz")
    assert "\n" not in str(caught.value)


def test_hdf5_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    with h5py.File(tmp_path / "a.data", "w") as file:
        file["images"] = images
    volume = read_oct(tmp_path / "a.data")
    assert volume.source_format == "hdf5"
    np.testing.assert_array_equal(volume.bscans[:], images)


def test_what_is_read_can_be_exported_and_read_again(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
        file["layers/ILM"] = np.float32([[1, 1, 2, np.nan], [2, 2, 2, 2]])
    volume = read_oct(tmp_path / "a.h5")
    rows, valid = np.ones((2, 4), np.float32), np.ones((2, 4), bool)
    predicted = StoredRows(rows, rows + 1, rows, rows, valid, valid)
    again = read_oct(write_predictions(tmp_path / "b.h5", volume, predicted))
    np.testing.assert_array_equal(again.bscans[:], volume.bscans[:])
    np.testing.assert_array_equal(again.layers["ILM"], volume.layers["ILM"])
    assert list(again.names) == ["a_0000", "a_0001"]


def test_every_format_has_its_reader() -> None:
    readers = {kind: formats._reader(kind).__name__ for kind in formats._SUFFIXES}
    assert readers == {
        "hdf5": "read_hdf5",
        "vol": "read_vol",
        "mat": "read_mat",
        "images": "read_images",
        "optional": "read_optional",
    }


def test_real_vol_files_reach_their_reader(lamina_data: Path) -> None:
    paths = sorted(lamina_data.glob("oct/heyex_vol/*.vol"))
    if not paths:
        pytest.skip(f"no oct/heyex_vol below {lamina_data}")
    for path in paths:
        assert read_oct(path).bscans.shape[1:] == (496, 768)
