from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import (
    Compose,
    LoadImaged,
    RandCropByPosNegLabeld,
    RandFlipd,
    ScaleIntensityRangePercentilesd,
)
from numpy.typing import NDArray

from pipeline.data.crops import RandCropFromFiled, ScaleByPercentilesd, read_crop
from pipeline.data.volume_statistics import class_index_cache, percentile_cache
from pipeline.data.volumes import Volume, open_volume
from pipeline.errors import ConfigurationError, InputError
from pipeline.training.ordering import KeyedDataset

SHAPE = (20, 24, 28)
ROI = (6, 8, 9)
Case = dict[str, Any]

generator = np.random.default_rng(0)
IMAGE = generator.integers(0, 60_000, SHAPE, dtype=np.uint16)
# Foreground in one corner, ignored voxels at the far end.
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[:6, :7, :8] = 1
LABEL[-5:] = 2


def write(path: Path, array: NDArray[Any]) -> str:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        compression = "lzw" if path.stem.endswith("lzw") else None
        tifffile.imwrite(path, array, photometric="minisblack", compression=compression)
    return str(path)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    image, label = write(tmp_path / "image.tif", IMAGE), write(tmp_path / "label.npy", LABEL)
    return {"image": image, "label": label, "name": "a"}


def crop_of(array: NDArray[Any], start: torch.Tensor, roi: tuple[int, ...] = ROI) -> NDArray[Any]:
    z, y, x = (slice(s, s + d) for s, d in zip(start.tolist(), roi, strict=True))
    return array[z, y, x]


def drawing(keys: Any = ("image", "label"), **settings: Any) -> RandCropFromFiled:
    return RandCropFromFiled(keys, ROI, **settings).set_random_state(seed=0)


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "a_lzw.tif"])
def test_a_crop_is_the_slice_of_the_array(tmp_path: Path, case: Case, name: str) -> None:
    case["image"] = write(tmp_path / name, IMAGE)
    draw = drawing()
    starts = set()
    for _ in range(20):
        found = draw(case)
        for key, array in (("image", IMAGE), ("label", LABEL)):
            assert found[key].shape == (1, *ROI)
            assert found[key].dtype == torch.float32
            np.testing.assert_array_equal(found[key][0], crop_of(array, found["crop_start"]))
        starts.add(tuple(found["crop_start"].tolist()))
    assert len(starts) > 15
    assert case == {"image": str(tmp_path / name), "label": case["label"], "name": "a"}
    assert (found["image_file"], found["name"]) == (case["image"], "a")


def test_only_the_crop_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    whole: Callable[..., NDArray[Any]] = Volume.__getitem__

    def noted(volume: Volume, index: Any) -> NDArray[Any]:
        found = whole(volume, index)
        read.append(found.size)
        return found

    monkeypatch.setattr(Volume, "__getitem__", noted)
    drawing()(case)
    assert read == [6 * 8 * 9] * 2


def test_every_place_is_drawn_to_both_ends(case: Case) -> None:
    draw = drawing("image")
    starts = torch.stack([draw(case)["crop_start"] for _ in range(400)])
    assert starts.amin(0).tolist() == [0, 0, 0]
    assert starts.amax(0).tolist() == [n - d for n, d in zip(SHAPE, ROI, strict=True)]


@pytest.mark.parametrize("shape", [(3, 24, 28), (3, 5, 4), (6, 8, 8)], ids=str)
def test_a_volume_smaller_than_the_crop_lies_in_its_middle(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    z, y, x = (slice(n) for n in shape)
    image = write(tmp_path / "i.npy", IMAGE[z, y, x] + 1)
    label = write(tmp_path / "l.npy", LABEL[z, y, x])
    found = drawing(pad_value=[0, 2])({"image": image, "label": label})
    outside = np.ones(ROI, bool)
    inside = []
    for n, d, start in zip(shape, ROI, found["crop_start"].tolist(), strict=True):
        assert start >= 0 if n >= d else start == -((d - n) // 2)
        inside.append(slice(max(0, -start), min(d, n - start)))
    outside[tuple(inside)] = False
    assert (found["image"][0].numpy()[outside] == 0).all()
    assert (found["label"][0].numpy()[outside] == 2).all()
    place = found["crop_start"].clamp(min=0)
    size = tuple(part.stop - part.start for part in inside)
    np.testing.assert_array_equal(
        found["image"][0].numpy()[tuple(inside)], crop_of(IMAGE[z, y, x] + 1, place, size)
    )


@pytest.mark.parametrize("start", [(-3, -3, -3), (15, 20, 25), (-9, 0, 0), (40, 0, 0)], ids=str)
def test_reading_beyond_the_volume_pads(case: Case, start: tuple[int, int, int]) -> None:
    around = np.pad(IMAGE, 50, constant_values=7)
    moved = torch.tensor(start) + 50
    found = read_crop(open_volume(case["image"]), start, ROI, pad_value=7)
    np.testing.assert_array_equal(found[0], crop_of(around, moved))


def test_channels_come_first(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    two = np.stack([IMAGE, IMAGE // 2])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volume"] = two
        file["label"] = LABEL
    path = str(tmp_path / "a.h5")
    found = drawing(file_key=["volume", "label"])({"image": path, "label": path})
    start = found["crop_start"]
    assert found["image"].shape == (2, *ROI)
    np.testing.assert_array_equal(found["image"][1], crop_of(IMAGE // 2, start))


def positive(tmp_path: Path, share: float, **settings: Any) -> RandCropFromFiled:
    indices = class_index_cache(tmp_path / "cache", limit=100)
    return drawing(positive=share, indices=indices, **settings)


@pytest.mark.parametrize(("share", "wanted"), [(1.0, 1), (0.0, 0)])
def test_the_centre_is_of_the_wanted_side(tmp_path: Path, share: float, wanted: int) -> None:
    # Away from the borders, where a crop is moved inside and its centre with it.
    label = np.zeros(SHAPE, np.uint8)
    label[8:12, 8:12, 8:12] = 1
    path = write(tmp_path / "label.npy", label)
    draw = positive(tmp_path, share, keys="label")
    for _ in range(50):
        found = draw({"label": path})
        start = found["crop_start"].tolist()
        room = [n - d for n, d in zip(SHAPE, ROI, strict=True)]
        if all(0 < s < free for s, free in zip(start, room, strict=True)):
            assert found["label"][0, ROI[0] // 2, ROI[1] // 2, ROI[2] // 2] == wanted


def test_ignored_voxels_are_neither_side(tmp_path: Path, case: Case) -> None:
    draw = positive(tmp_path, 1.0, ignore_label=2)
    assert all((draw(case)["label"] == 1).any() for _ in range(50))
    assert all(draw(case)["crop_start"][0] <= 3 for _ in range(50))


def test_the_share_of_positive_crops_is_the_wanted_one(tmp_path: Path, case: Case) -> None:
    draw = positive(tmp_path, 0.75, ignore_label=2)
    # Crops around a voxel of the corner all begin there or next to it; hardly any other does.
    low = [bool((draw(case)["crop_start"] <= 3).all()) for _ in range(400)]
    assert 0.70 < np.mean(low) < 0.86


def test_places_spread_as_those_of_monai(tmp_path: Path) -> None:
    label = (np.random.default_rng(1).random(SHAPE) < 0.01).astype(np.uint8)
    path = write(tmp_path / "label.npy", label)
    ours = drawing(
        "label", positive=0.5, indices=class_index_cache(tmp_path / "cache", limit=10**6)
    )
    keys = ["label", "place"]
    monai = RandCropByPosNegLabeld(keys, "label", ROI, num_samples=1500).set_random_state(seed=1)
    volume = {"label": torch.as_tensor(label)[None], "place": torch.as_tensor(np.indices(SHAPE))}
    expected = torch.stack([crop["place"][:, 0, 0, 0].as_tensor() for crop in monai(volume)])
    found = torch.stack([ours({"label": path})["crop_start"] for _ in range(1500)])
    error = 2**0.5 * expected.double().std(0) / 1500**0.5
    assert ((found.double().mean(0) - expected.double().mean(0)).abs() < 4 * error).all()
    for axis, (n, d) in enumerate(zip(SHAPE, ROI, strict=True)):
        counts = torch.bincount(found[:, axis], minlength=n - d + 1)
        wanted = torch.bincount(expected[:, axis], minlength=n - d + 1)
        assert ((counts - wanted).abs() < 5 * (counts + wanted + 1) ** 0.5).all()


def test_a_label_of_one_side_gives_that_side(tmp_path: Path) -> None:
    path = write(tmp_path / "label.npy", np.zeros(SHAPE, np.uint8))
    found = positive(tmp_path, 1.0, keys="label")({"label": path})
    assert found["label"].shape == (1, *ROI)


def test_a_label_without_a_labelled_voxel_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "label.npy", np.full(SHAPE, 2, np.uint8))
    with pytest.raises(InputError, match=r"label\.npy: no voxel is labelled"):
        positive(tmp_path, 0.5, keys="label", ignore_label=2)({"label": path})


def share_of(label: torch.Tensor) -> float:
    return float((label == 1).sum() / (label != 2).sum())


def test_a_balanced_share_holds_where_it_can(tmp_path: Path) -> None:
    label = (np.indices(SHAPE)[2] < 14).astype(np.uint8)
    label[:, :12] = 2
    path = write(tmp_path / "label.npy", label)
    draw = drawing("label", balance=(0.3, 0.7), tries=200, ignore_label=2)
    assert all(0.3 <= share_of(draw({"label": path})["label"]) <= 0.7 for _ in range(50))


def test_of_failures_the_nearest_share_is_kept(tmp_path: Path) -> None:
    label = (np.random.default_rng(1).random(SHAPE) < 0.02).astype(np.uint8)
    path = write(tmp_path / "label.npy", label)
    for seed in range(5):
        plain = drawing("label").set_random_state(seed=seed)
        shares = [share_of(plain({"label": path})["label"]) for _ in range(10)]
        balanced = drawing("label", balance=(0.3, 0.7), tries=10).set_random_state(seed=seed)
        assert share_of(balanced({"label": path})["label"]) == max(shares) < 0.3


def test_crops_of_ignored_voxels_alone_are_the_last_choice(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[8:] = 2
    path = write(tmp_path / "label.npy", label)
    plain, draw = drawing("label"), drawing("label", balance=(0.9, 1.0), ignore_label=2)
    assert not all((plain({"label": path})["label"] != 2).any() for _ in range(50))
    assert all((draw({"label": path})["label"] != 2).any() for _ in range(50))


def keyed(case: Case, tmp_path: Path, workers: int) -> list[torch.Tensor]:
    draw = RandCropFromFiled(
        ("image", "label"),
        ROI,
        positive=0.5,
        indices=class_index_cache(tmp_path / "cache", limit=100),
        balance=(0.1, 0.9),
        tries=3,
    )
    scale = ScaleByPercentilesd("image", percentile_cache(tmp_path / "cache", 1, 99))
    chain = Compose([draw, scale, RandFlipd(["image", "label"], prob=0.5)])
    loader = DataLoader(
        KeyedDataset(Dataset([case] * 4, chain), chain, seed=5),
        sampler=[(epoch, index) for epoch in (1, 2) for index in range(4)],
        batch_size=2,
        num_workers=workers,
    )
    return [part for b in loader for part in (b["image"], b["label"], b["crop_start"])]


def test_one_seed_gives_one_crop_for_any_number_of_workers(tmp_path: Path, case: Case) -> None:
    expected = keyed(case, tmp_path, 0)
    assert not torch.equal(expected[2][0], expected[2][1])
    for workers in (1, 2):
        for mine, other in zip(keyed(case, tmp_path, workers), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_pickled_transform_draws_the_same(tmp_path: Path, case: Case) -> None:
    draw = positive(tmp_path, 0.5)
    draw(case)
    copy = pickle.loads(pickle.dumps(draw))
    assert torch.equal(copy(case)["image"], draw(case)["image"])


def test_a_file_that_is_replaced_is_opened_again(tmp_path: Path, case: Case) -> None:
    draw = drawing("image")
    draw(case)
    write(tmp_path / "new.tif", IMAGE + 5000)
    os.replace(tmp_path / "new.tif", case["image"])  # noqa: PTH105
    found = draw(case)
    np.testing.assert_array_equal(found["image"][0], crop_of(IMAGE + 5000, found["crop_start"]))


def test_scaled_crops_are_the_crops_of_the_scaled_volume(tmp_path: Path, case: Case) -> None:
    monai = ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True)
    whole = monai({"image": torch.as_tensor(IMAGE.astype(np.float32))[None]})["image"]
    draw = drawing()
    scale = ScaleByPercentilesd("image", percentile_cache(tmp_path / "cache", 0.5, 99.5))
    found = scale(draw(case))
    expected = crop_of(np.asarray(whole)[0], found["crop_start"])
    np.testing.assert_allclose(found["image"][0], expected, atol=1e-6)
    assert found["image"].dtype == torch.float32


def test_a_constant_volume_cannot_be_scaled(tmp_path: Path) -> None:
    path = write(tmp_path / "flat.npy", np.full(SHAPE, 3, np.uint8))
    scale = ScaleByPercentilesd("image", percentile_cache(tmp_path / "cache", 1, 99))
    with pytest.raises(InputError, match=r"flat\.npy: its percentiles are 3\.0 and 3\.0"):
        scale(drawing("image")({"image": path}))


def test_a_stored_type_can_be_kept(case: Case) -> None:
    found = drawing(dtype=[np.float32, None])(case)
    assert (found["image"].dtype, found["label"].dtype) == (torch.float32, torch.uint8)


def test_files_of_other_sizes_are_refused(tmp_path: Path, case: Case) -> None:
    case["label"] = write(tmp_path / "small.npy", LABEL[1:])
    with pytest.raises(InputError, match=r"small\.npy: shape \(19, 24, 28\), but .*image\.tif"):
        drawing()(case)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive": 1.5}, r"positive must be in \[0, 1\]"),
        ({"positive": 0.5}, "positive is set without indices"),
        ({"balance": (0.7, 0.3)}, "balance must be"),
        ({"balance": (0.3, 0.7), "tries": 0}, "tries must be at least 1"),
        ({"balance": (0.3, 0.7), "label_key": "truth"}, "label_key 'truth' is not among"),
        ({"roi_size": (4, 4)}, "roi_size must be three lengths"),
    ],
    ids=["share", "indices", "order", "tries", "key", "size"],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RandCropFromFiled(**{"keys": ["image", "label"], "roi_size": ROI, **settings})


def test_an_image_that_only_decodes_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(InputError, match=r"a\.png: no volume"):
        drawing("image")({"image": str(path)})


def test_monai_loads_what_is_cropped(case: Case) -> None:
    """The array of `LoadImaged` and the one cropped here have the same axes."""
    loaded = LoadImaged("label", ensure_channel_first=True)({"label": case["label"]})["label"]
    found = drawing()(case)
    np.testing.assert_array_equal(
        found["label"][0], crop_of(np.asarray(loaded)[0], found["crop_start"])
    )
