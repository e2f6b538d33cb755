from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data.crops import RandCropFromFiled, ScaleByPercentilesd
from pipeline.data.volume_statistics import percentile_cache
from pipeline.data.writers import write_tiff
from pipeline.errors import InputError
from pipeline.vesuvius.transforms import LoadVolumed, ScalePercentilesd


def volume(dtype: Any = np.uint8, shape: tuple[int, ...] = (9, 12, 10)) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def write(folder: Path, array: NDArray[Any], name: str = "v.tif", **settings: Any) -> str:
    write_tiff(folder / name, array, **settings)
    return str(folder / name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_stack_is_read_as_stored_in_z_y_x(tmp_path: Path, dtype: Any) -> None:
    array = volume(dtype)
    case = LoadVolumed()({"image": write(tmp_path, array), "label": None, "name": "v"})
    assert tuple(case["image"].shape) == (1, *array.shape)
    assert np.array_equal(np.asarray(case["image"])[0], array)
    assert case["source_dtype"] == np.dtype(dtype).name
    assert "label" not in case


def test_an_array_is_taken_too() -> None:
    array = volume()
    assert np.array_equal(np.asarray(LoadVolumed()({"image": array})["image"])[0], array)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float16, np.float32, ">u2"])
def test_two_percentiles_become_zero_and_one(dtype: Any) -> None:
    array = volume(dtype)
    low, high = np.percentile(array, (0.5, 99.5))
    expected = np.clip((array.astype(np.float64) - low) / (high - low), 0, 1)
    case = ScalePercentilesd("image")(LoadVolumed()({"image": array}))
    np.testing.assert_allclose(np.asarray(case["image"])[0], expected, atol=1e-6)


def test_a_crop_read_from_the_file_is_the_crop_of_the_prepared_volume(tmp_path: Path) -> None:
    """Training reads crops, validation whole volumes: the network must see the same."""
    path = write(tmp_path, volume(shape=(20, 24, 22)))
    whole = ScalePercentilesd("image")(LoadVolumed()({"image": path}))["image"]
    crop = RandCropFromFiled("image", (8, 8, 8))
    crop.set_random_state(seed=3)
    scale = ScaleByPercentilesd("image", percentile_cache(str(tmp_path / "cache"), 0.5, 99.5))
    case = scale(crop({"image": path}))
    z, y, x = (int(start) for start in case["crop_start"])
    expected = torch.as_tensor(whole)[:, z : z + 8, y : y + 8, x : x + 8]
    assert torch.equal(torch.as_tensor(case["image"]), expected)


@pytest.mark.parametrize("other", [7, 90])
def test_a_volume_without_two_values_to_scale_by_is_refused(tmp_path: Path, other: int) -> None:
    array = np.full((9, 12, 10), 7, np.uint8)
    array[0, 0, :3] = other  # fewer voxels than lie above the upper percentile
    case = LoadVolumed()({"image": write(tmp_path, array)})
    with pytest.raises(InputError, match=r"v\.tif: .*constant: .* 7; leave the file out"):
        ScalePercentilesd("image")(case)


def test_truth_values_are_zero_and_one() -> None:
    array = volume() > 100
    case = ScalePercentilesd("image")(LoadVolumed()({"image": array}))
    assert np.array_equal(np.asarray(case["image"])[0], array)


def test_halves_do_not_overflow() -> None:
    array = (volume(np.float32) * 480 - 60_000).astype(np.float16)
    low, high = np.percentile(array.astype(np.float64), (0.5, 99.5))
    case = ScalePercentilesd("image")(LoadVolumed()({"image": array}))
    expected = np.clip((array.astype(np.float64) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(np.asarray(case["image"])[0], expected, atol=1e-6)


def nan_volume() -> NDArray[Any]:
    array = volume(np.float32)
    array[1, 2, 3] = np.nan
    return array


def test_values_that_are_not_finite_are_counted_and_placed(tmp_path: Path) -> None:
    path = write(tmp_path, nan_volume())
    with pytest.raises(InputError, match=r"v\.tif: 1 values are not finite.* \(1, 2, 3\)"):
        LoadVolumed()({"image": path})


def test_a_flat_picture_is_no_volume(tmp_path: Path) -> None:
    path = write(tmp_path, volume(shape=(12, 10)))
    with pytest.raises(InputError, match=r"v\.tif.*\(D, H, W\)"):
        LoadVolumed()({"image": path})


def test_a_stack_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path, volume(shape=(9, 40, 40))))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"v\.tif"):
        LoadVolumed()({"image": str(path)})


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((9, 12, 10), 255, np.uint8), "values 255; .* divide a mask of 0 and 255 by 255"),
        (np.full((9, 12, 10), 5, np.uint8), "values 5; expected 0, 1 and 2"),
        (np.where(volume() > 99, 1, 255).astype(np.uint8), "values 255; .* write 2 where 255"),
        (np.zeros((9, 12, 11), np.uint8), r"label of \(9, 12, 11\), its image"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(
    tmp_path: Path, label: NDArray[Any], message: str
) -> None:
    case = {"image": write(tmp_path, volume()), "label": write(tmp_path, label, "l.tif")}
    with pytest.raises(InputError, match=message):
        LoadVolumed()(case)


def test_labels_keep_their_three_values(tmp_path: Path) -> None:
    label = np.random.default_rng(1).integers(0, 3, (9, 12, 10)).astype(np.uint8)
    case = {"image": write(tmp_path, volume()), "label": write(tmp_path, label, "l.tif")}
    assert np.array_equal(np.asarray(LoadVolumed()(case)["label"])[0], label)
