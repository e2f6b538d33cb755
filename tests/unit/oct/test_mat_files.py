from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from pipeline.errors import InputError
from pipeline.oct.mat_files import read_mat

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 20, 6)).astype(np.float64)  # rows, columns, B-scans
MAPS = np.linspace(4, 28, 6 * 20 * 3).reshape(3, 6, 20).transpose(1, 2, 0)  # B-scans, columns, 3
MAPS[0] = np.nan


def save(path: Path, version: str, **arrays: Any) -> Path:
    if version == "5":
        savemat(path, arrays, do_compression=True)
        return path
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = np.asarray(array).T
    content = bytearray(path.read_bytes())
    content[:19] = b"MATLAB 7.3 MAT-file"
    path.write_bytes(bytes(content))
    return path


def chiu_rows() -> np.ndarray:
    rows = np.full((8, 20, 6), np.nan)
    rows[:, :, 2] = np.arange(1, 9)[:, None] * 3
    return rows


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_duke_volume_is_turned_and_counted_from_zero(tmp_path: Path, version: str) -> None:
    path = save(tmp_path / "Subject_1001.mat", version, images=IMAGES, layerMaps=MAPS, Age=[[70.0]])
    volume = read_mat(path)
    assert volume.source_format == "duke_mat"
    assert volume.bscans.shape == (6, 30, 20)
    assert volume.white == 255.0
    for k in range(6):
        np.testing.assert_array_equal(volume.bscans[k], IMAGES[:, :, k])
    np.testing.assert_array_equal(volume.bscans[1:4], np.moveaxis(IMAGES, 2, 0)[1:4])
    assert list(volume.layers) == ["ILM", "RPEDC", "BM"]
    for k, rows in enumerate(volume.layers.values()):
        np.testing.assert_array_equal(rows, MAPS[:, :, k] - 1)
    assert sum("1 subtracted" in note for note in volume.notes) == 1
    assert set(volume.subjects) == {"Subject_1001"}
    assert not any("70" in note for note in volume.notes)  # the age


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_chiu_volume_takes_the_first_and_last_of_eight_boundaries(
    tmp_path: Path, version: str
) -> None:
    path = save(tmp_path / "Subject_01.mat", version, images=IMAGES, manualLayers1=chiu_rows())
    volume = read_mat(path)
    assert volume.source_format == "chiu_mat"
    np.testing.assert_array_equal(volume.layers["ILM"][2], np.full(20, 2.0))
    np.testing.assert_array_equal(volume.layers["BM"][2], np.full(20, 23.0))
    assert np.isnan(np.delete(volume.layers["ILM"], 2, axis=0)).all()
    assert any("1 of 6 B-scans annotated" in note for note in volume.notes)
    assert volume.scale_x_um is None


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_circle_scan_prefers_the_manual_rows_beside_it(tmp_path: Path, version: str) -> None:
    image, device = RNG.random((30, 20)), np.stack([np.full(20, row) for row in (5.0, 20.0, 8.0)])
    path = save(tmp_path / "circle.mat", version, B0=image, B0seg=device, ScaleZ=[[0.00387]])
    volume = read_mat(path)
    assert volume.bscans.shape == (1, 30, 20)
    np.testing.assert_allclose(volume.bscans[0], image**0.25, rtol=1e-5)
    np.testing.assert_allclose(volume.bscans[:], image[None] ** 0.25, rtol=1e-5)
    np.testing.assert_array_equal(volume.layers["BM"], device[None, 1])  # already from 0
    assert volume.scale_y_um == pytest.approx(3.87)
    manual = np.arange(9)[:, None] * 3 + np.ones((9, 20))
    save(tmp_path / "circle_0_coordinates.mat", version, interpolation=manual)
    rows = read_mat(path).layers
    np.testing.assert_array_equal(rows["ILM"], np.zeros((1, 20)))
    np.testing.assert_array_equal(rows["BM"], np.full((1, 20), 24.0))


@pytest.mark.parametrize(
    ("stored", "given", "white"),
    [
        (IMAGES.astype(np.uint8), np.uint8, 255.0),
        (IMAGES, np.float32, 255.0),
        (IMAGES / 255, np.float32, 1.0),
        (IMAGES.astype(np.int16), np.float32, 255.0),
    ],
)
def test_white_is_told_by_type_and_values(
    tmp_path: Path, stored: np.ndarray, given: type, white: float
) -> None:
    volume = read_mat(save(tmp_path / "a.mat", "5", images=stored, layerMaps=MAPS))
    assert (volume.bscans.dtype, volume.white) == (np.dtype(given), white)
    assert volume.bscans[0].dtype == given


def test_a_row_of_zero_is_no_row_in_matlab(tmp_path: Path) -> None:
    maps = MAPS.copy()
    maps[1, :5] = 0
    rows = read_mat(save(tmp_path / "a.mat", "5", images=IMAGES, layerMaps=maps)).layers["ILM"]
    assert np.isnan(rows[1, :5]).all()
    assert np.isfinite(rows[1, 5:]).all()


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_bscans_are_pickled_as_a_place_and_not_as_pixels(tmp_path: Path, version: str) -> None:
    bscans = read_mat(save(tmp_path / "a.mat", version, images=IMAGES, layerMaps=MAPS)).bscans
    expected = bscans[3]
    packed = pickle.dumps(bscans)
    assert len(packed) < 2000
    np.testing.assert_array_equal(pickle.loads(packed)[3], expected)


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layerMaps": MAPS[:, :-1]}, r"layerMaps has shape \(6, 19, 3\), expected \(6, 20, 3\)"),
        ({"layerMaps": MAPS[:-1]}, "layerMaps has shape"),
        ({"layerMaps": MAPS + 1000}, "outside the image"),
        ({"images": np.zeros((2, 3, 4, 5))}, "images has shape"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, version: str, changes: dict[str, Any], message: str
) -> None:
    arrays = {"images": IMAGES, "layerMaps": MAPS, **changes}
    with pytest.raises(InputError, match=message):
        read_mat(save(tmp_path / "a.mat", version, **arrays))


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_an_unknown_layout_is_answered_with_what_was_found(tmp_path: Path, version: str) -> None:
    path = save(tmp_path / "a.mat", version, volume=np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"holds volume \(2, 3\); expected images and layerMaps"):
        read_mat(path)


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, version: str) -> None:
    path = save(tmp_path / "a.mat", version, images=IMAGES, layerMaps=MAPS)
    content = path.read_bytes()
    for keep in (0, 40, 600, len(content) // 2):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=r"a\.mat: ") as caught:
            read_mat(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_mat(tmp_path / "a.mat")


def test_links_out_of_an_hdf5_file_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "other.mat", "7.3", images=IMAGES)
    path = save(tmp_path / "a.mat", "7.3", layerMaps=MAPS)
    with h5py.File(path, "r+") as file:
        file["images"] = h5py.ExternalLink("other.mat", "images")
    with pytest.raises(InputError, match="holds layerMaps"):
        read_mat(path)


def test_images_over_the_budget_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.mat", "5", images=IMAGES, layerMaps=MAPS)
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "1000")
    with pytest.raises(InputError, match="LAMINA_MAX_DECODED_BYTES"):
        read_mat(path)
