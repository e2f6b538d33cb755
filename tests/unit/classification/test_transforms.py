from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import CacheDataset
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureTyped,
    NormalizeIntensityd,
    RandFlipd,
    RandRotated,
)
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from pipeline.classification.transforms import (
    LoadRGBd,
    RandColourJitterd,
    RandResizedCropd,
    ResizeShorterSided,
)
from pipeline.data.photographs import read_photograph, rgb_photograph
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import ConfigurationError, InputError
from pipeline.training.ordering import KeyedDataset


def picture(height: int = 10, width: int = 14, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Tensor:
    rows = torch.linspace(0.2, 0.8, height)[:, None].expand(height, width)
    columns = torch.linspace(0.1, 0.9, width).expand(height, width)
    return torch.stack([rows, columns, 0.5 * (rows + columns)])


# Reading


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_a_photograph_stands_upright_as_its_exif_data_say(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture()).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    read = np.rint(read_photograph(path) * 255).astype(np.uint8)
    np.testing.assert_array_equal(read, expected)


def test_a_broken_note_beside_whole_pixels_is_no_reason_to_drop_the_image(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=b"Exif\0\0no such thing")
    assert read_photograph(tmp_path / "a.jpg").shape == (10, 14, 3)


def test_grey_alpha_and_16_bit_images_become_rgb(tmp_path: Path) -> None:
    colour = picture()
    expected = np.float32(colour / 255)
    alpha = np.dstack([colour, np.full(colour.shape[:2], 9, np.uint8)])
    deep = colour.astype(np.uint16) * 257
    for name, array in (("alpha", alpha), ("deep", deep)):
        read = read_photograph(write_png(tmp_path / f"{name}.png", array))
        np.testing.assert_allclose(read, expected, atol=1e-6)
    grey = colour[..., 0]
    for array in (grey, np.dstack([grey, grey[::-1]]), grey.astype(np.uint16) * 257):
        read = read_photograph(write_png(tmp_path / "grey.png", array))
        np.testing.assert_allclose(read, np.float32(grey / 255)[..., None].repeat(3, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"no image at all", "no image"), (None, "damaged, cut short")],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(60, 60)).save(path)
    path.write_bytes(path.read_bytes()[:-900] if content is None else content)
    with pytest.raises(InputError, match=message) as caught:
        LoadRGBd()({"image": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stack_is_no_photograph(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"a\.tif: 4 pages, expected one image"):
        read_photograph(path)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 5), np.uint8), np.zeros((4, 4), np.int32), np.full((4, 4), 1.5), np.zeros(4)],
)
def test_values_of_another_kind_are_refused(pixels: NDArray[Any]) -> None:
    with pytest.raises(InputError, match=r"^x\.png: found"):
        rgb_photograph(pixels, "x.png")


def test_loading_takes_paths_and_arrays(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", picture())
    for given_ in (str(path), path, picture()):
        case = LoadRGBd()({"image": given_, "label": 3})
        assert case["label"] == 3
        assert tuple(case["image"].shape) == (3, 10, 14)
        assert case["image"].dtype == torch.float32
    assert LoadRGBd()({"image": path})["image"].meta["filename_or_obj"] == str(path)


def test_real_photographs_are_read(lamina_data: Path) -> None:
    root = lamina_data / "classification"
    found = sorted(root.glob("*/images/*.jpg")) + sorted(root.glob("hymenoptera/*/*/*.jpg"))
    paths = [path for path in found if path.stat().st_size < 200_000][::60]
    if not paths:
        pytest.skip(f"{root} holds no images")
    for path in paths:
        image = read_photograph(path)
        with Image.open(path) as expected:
            upright = ImageOps.exif_transpose(expected).convert("RGB")
        np.testing.assert_allclose(image * 255, np.asarray(upright), atol=1e-3)


# Size


@given(height=st.integers(3, 60), width=st.integers(3, 60), size=st.integers(3, 40))
def test_the_shorter_side_is_as_asked_and_the_form_stays(
    height: int, width: int, size: int
) -> None:
    image = ResizeShorterSided("image", size)({"image": torch.rand(3, height, width)})["image"]
    assert min(image.shape[-2:]) == size
    longer = max(height, width) * size / min(height, width)
    assert abs(max(image.shape[-2:]) - longer) <= 0.5


def test_a_plane_stays_a_plane_and_a_constant_a_constant() -> None:
    image = ResizeShorterSided("image", 16)({"image": smooth(64, 96)})["image"]
    means = functional.avg_pool2d(smooth(64, 96), 4)
    torch.testing.assert_close(image[:, 2:-2, 2:-2], means[:, 2:-2, 2:-2], atol=2e-3, rtol=0)
    constant = {"image": torch.full((3, 20, 30), 0.25)}
    assert ResizeShorterSided("image", 7)(constant)["image"].allclose(torch.tensor(0.25))


def test_validation_is_deterministic_and_centred() -> None:
    steps = Compose([ResizeShorterSided("image", 8), CenterSpatialCropd("image", [8, 8])])
    first, again = (steps({"image": smooth(16, 32)})["image"] for _ in range(2))
    torch.testing.assert_close(first, again)
    assert tuple(first.shape) == (3, 8, 8)
    assert float(first[1].mean()) == pytest.approx(0.5, abs=1e-3)


# Random crops


@given(height=st.integers(8, 80), width=st.integers(8, 80), seed=st.integers(0, 999))
def test_a_crop_lies_in_the_image_and_keeps_to_its_ranges(
    height: int, width: int, seed: int
) -> None:
    crop = RandResizedCropd("image", 12, scale=(0.3, 0.9), ratio=(0.8, 1.25))
    crop.set_random_state(seed=seed)
    image = crop({"image": torch.rand(3, height, width)})["image"]
    assert tuple(image.shape) == (3, 12, 12)
    top, left, rows, columns = crop.box
    assert 0 <= top <= height - rows
    assert 0 <= left <= width - columns
    if rows == columns == min(height, width):
        return  # no part of this form fits
    assert abs(rows * columns / (height * width) / 0.6 - 1) < 0.5 + 2 * (1 / rows + 1 / columns)
    assert 0.8 - 2 / rows < columns / rows < 1.25 + 4 / rows


def test_crops_reach_all_places_and_the_whole_image() -> None:
    crop = RandResizedCropd("image", 4, scale=(0.2, 1.0))
    crop.set_random_state(seed=0)
    covered = torch.zeros(20, 20)
    areas = []
    for _ in range(200):
        crop({"image": torch.zeros(3, 20, 20)})
        top, left, rows, columns = crop.box
        covered[top : top + rows, left : left + columns] += 1
        areas.append(rows * columns / 400)
    assert covered.min() > 0
    assert min(areas) < 0.3
    assert max(areas) > 0.9


def test_a_crop_of_everything_is_a_resize() -> None:
    crop = RandResizedCropd("image", 8, scale=(1, 1), ratio=(1, 1))
    expected = ResizeShorterSided("image", 8)({"image": smooth(24, 24)})["image"]
    torch.testing.assert_close(crop({"image": smooth(24, 24)})["image"], expected)


def test_keys_share_a_draw() -> None:
    image = smooth(30, 40)
    steps = Compose([RandResizedCropd(["a", "b"], 9), RandColourJitterd(["a", "b"], 0.5, 0.5)])
    case = steps({"a": image, "b": image.clone()})
    torch.testing.assert_close(case["a"], case["b"])


# Colours


def test_jitter_of_nothing_is_the_identity() -> None:
    image = smooth(6, 7)
    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    for jitter in (RandColourJitterd("image", prob=0.0), RandColourJitterd("image", **nothing)):
        torch.testing.assert_close(jitter({"image": image})["image"], image)


@pytest.mark.parametrize("seed", range(5))
def test_grey_has_no_hue_and_no_saturation(seed: int) -> None:
    grey = torch.rand(1, 6, 7).expand(3, 6, 7) * 0.8 + 0.1
    jitter = RandColourJitterd("image", brightness=0, contrast=0, saturation=0.9, hue=0.5)
    jitter.set_random_state(seed=seed)
    torch.testing.assert_close(jitter({"image": grey})["image"], grey)


def jittered(image: Tensor, **drawn: float) -> Tensor:
    jitter = RandColourJitterd("image")
    jitter.drawn = dict.fromkeys(jitter.ranges, 0.0) | drawn
    return jitter._jittered(image)


def test_each_property_changes_as_its_name_says() -> None:
    image = smooth(8, 9) * 0.5 + 0.2
    grey = torch.tensor([0.299, 0.587, 0.114]) @ image.flatten(1)
    torch.testing.assert_close(jittered(image, brightness=0.2), image * 1.2)
    flat = jittered(image, contrast=-1.0)
    torch.testing.assert_close(flat, torch.full_like(flat, float(grey.mean())))
    pale = jittered(image, saturation=-1.0)
    torch.testing.assert_close(pale.flatten(1), grey.expand(3, -1))
    third = jittered(image, hue=1 / 3)  # red becomes green, green blue, blue red
    torch.testing.assert_close(third, image[[2, 0, 1]], atol=1e-5, rtol=0)


def test_colours_stay_between_0_and_1() -> None:
    jitter = RandColourJitterd("image", 1.0, 1.0, 1.0, 0.5)
    jitter.set_random_state(seed=1)
    for _ in range(20):
        image = jitter({"image": torch.rand(3, 5, 5)})["image"]
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1


# The whole way


def training_steps() -> Compose:
    return Compose(
        [
            LoadRGBd(),
            ResizeShorterSided("image", 24),
            RandResizedCropd("image", 16),
            RandFlipd("image", prob=0.5, spatial_axis=1),
            RandRotated("image", range_x=0.3, prob=0.5, padding_mode="reflection"),
            RandColourJitterd("image"),
            NormalizeIntensityd(
                "image", subtrahend=[0.5] * 3, divisor=[0.25] * 3, channel_wise=True
            ),
            EnsureTyped("image", track_meta=False),
        ]
    )


def test_an_item_follows_from_seed_epoch_and_index_alone() -> None:
    data = [{"image": picture(30, 40, seed), "label": 0} for seed in range(3)]

    def items() -> KeyedDataset:
        steps = training_steps()
        return KeyedDataset(CacheDataset(data, steps, progress=False, copy_cache=False), steps, 7)

    first, second = items(), items()
    second[(1, 0)], second[(4, 2)]  # another past
    for key in ((2, 1), (2, 0), (3, 1)):
        torch.testing.assert_close(first[key]["image"], second[key]["image"])
    assert not torch.equal(first[(2, 1)]["image"], first[(3, 1)]["image"])
    assert not torch.equal(first[(2, 1)]["image"], first[(2, 0)]["image"])


def test_training_leaves_the_cached_image_as_it_is() -> None:
    steps = training_steps()
    cached = CacheDataset([{"image": picture(30, 40)}], steps, progress=False, copy_cache=False)
    before = cached._cache[0]["image"].clone()
    for _ in range(5):
        cached[0]
    torch.testing.assert_close(cached._cache[0]["image"], before)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RandResizedCropd, {"size_px": 8, "scale": (0.5, 1.5)}, "shares of the area in"),
        (RandResizedCropd, {"size_px": 0}, "size_px 0"),
        (RandResizedCropd, {"size_px": 8, "ratio": (2, 1)}, "the smaller one first"),
        (RandColourJitterd, {"contrast": 1.5}, r"contrast must be in \[0, 1\], got 1.5"),
        (RandColourJitterd, {"hue": 0.6}, r"hue must be in \[0, 0.5\]"),
        (ResizeShorterSided, {"size_px": 0}, "size_px must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(
    kind: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kind("image", **settings)
