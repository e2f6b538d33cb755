from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import InputError
from pipeline.fundus.fov import derive_fov, fov_box


def disc(height: int, width: int, radius: float, centre: tuple[float, float]) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:height, :width]
    return np.asarray((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2)


def iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def photograph(fov: NDArray[np.bool_], level: int = 170, surround: int = 6) -> NDArray[np.uint8]:
    noise = np.random.default_rng(5).integers(-5, 6, fov.shape)
    red = np.where(fov, level, surround) + noise
    return np.stack([red, red // 2, red // 4], axis=-1).clip(0, 255).astype(np.uint8)


ROUND = disc(140, 160, 60, (70, 80))


def test_lit_disc_is_found() -> None:
    assert iou(derive_fov(photograph(ROUND)), ROUND) > 0.995


def test_disc_cut_by_the_frame_keeps_its_corners() -> None:
    cut = disc(120, 200, 80, (60, 100))
    assert iou(derive_fov(photograph(cut)), cut) > 0.99


@pytest.mark.parametrize("level", [230, 90, 40, 20])
def test_exposure_does_not_matter(level: int) -> None:
    assert iou(derive_fov(photograph(ROUND, level, surround=5)), ROUND) > 0.98


def test_scale_and_dtype_do_not_matter() -> None:
    pixels = photograph(ROUND)
    expected = derive_fov(pixels)
    as_float = pixels / 255
    for same in (
        pixels.astype(np.uint16) * 257,
        as_float,
        as_float.astype(np.float32),
        as_float * 255,
    ):
        np.testing.assert_array_equal(derive_fov(same), expected)


def test_twelve_bits_in_sixteen_are_enough() -> None:
    pixels = photograph(ROUND).astype(np.uint16) * 16
    assert iou(derive_fov(pixels), ROUND) > 0.98


def test_turned_image_has_the_turned_field_of_view() -> None:
    pixels = photograph(ROUND)
    np.testing.assert_array_equal(derive_fov(pixels[::-1, ::-1]), derive_fov(pixels)[::-1, ::-1])


def test_dark_lesion_is_inside() -> None:
    pixels = photograph(ROUND)
    pixels[60:80, 70:90] = 0
    assert derive_fov(pixels)[60:80, 70:90].all()


def test_light_leak_with_a_narrow_neck_is_outside() -> None:
    pixels = photograph(ROUND)
    pixels[70, 138:158] = 200
    fov = derive_fov(pixels)
    assert not fov[70, 150:].any()
    assert iou(fov, ROUND) > 0.99


def test_bright_caption_is_outside() -> None:
    pixels = photograph(ROUND)
    pixels[2:10, 2:40] = 255
    assert not derive_fov(pixels)[:12, :42].any()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((40, 50, 3), np.uint8),
        np.full((40, 50, 3), 7, np.uint8),
        np.full((40, 50), 200, np.uint8),
        np.full((40, 50, 3), np.nan),
        np.linspace(90, 250, 2000).reshape(40, 50).astype(np.uint8),
        np.linspace(20, 40, 2000).reshape(40, 50).astype(np.uint8),
        np.pad(np.full((3, 3), 255, np.uint8), 30),
        np.full((1, 1), 3, np.uint8),
    ],
    ids=[
        "black",
        "dark",
        "bright",
        "nan",
        "no surround",
        "dark crop",
        "only a reflection",
        "pixel",
    ],
)
def test_without_a_disc_the_whole_frame_counts(pixels: NDArray[np.uint8]) -> None:
    assert derive_fov(pixels).all()


def test_large_image_agrees_with_the_same_one_small() -> None:
    large = disc(1300, 1300, 600, (650, 650))
    assert iou(derive_fov(large.astype(np.float32) * 0.6), large) > 0.998


@pytest.mark.parametrize("shape", [(10, 10, 4), (10, 10, 2), (3,), (2, 10, 10, 3), (0, 10, 3)])
def test_other_shapes_are_refused_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"image must be .* got shape \(" + str(shape[0])):
        derive_fov(np.zeros(shape, np.uint8))


def test_box_is_the_smallest_that_holds_the_mask() -> None:
    fov = np.zeros((9, 12), np.bool_)
    fov[2:5, 3] = True
    fov[4, 8] = True
    assert fov_box(fov) == (slice(2, 5), slice(3, 9))


def test_box_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no pixel set"):
        fov_box(np.zeros((4, 4), np.bool_))


def read(path: Path) -> NDArray[np.uint8]:
    content = path.read_bytes()
    with Image.open(
        io.BytesIO(gzip.decompress(content) if path.suffix == ".gz" else content)
    ) as image:
        return np.asarray(image.convert("L") if path.suffix == ".gif" else image)


@pytest.mark.parametrize(
    ("images", "masks", "worst", "mean"),
    [
        ("fundus/DRIVE/training/images/*.tif", "fundus/DRIVE/training/mask/*.gif", 0.992, 0.995),
        ("fundus/STARE/images/*.ppm.gz", "fundus/STARE/fov/*.gif", 0.978, 0.996),
    ],
    ids=["DRIVE", "STARE"],
)
def test_derived_agrees_with_given_masks(
    lamina_data: Path, images: str, masks: str, worst: float, mean: float
) -> None:
    pairs = list(
        zip(sorted(lamina_data.glob(images)), sorted(lamina_data.glob(masks)), strict=True)
    )
    if not pairs:
        pytest.skip(f"no {images} below LAMINA_DATA")
    agreement = [iou(derive_fov(read(image)), read(mask) > 127) for image, mask in pairs]
    assert min(agreement) >= worst
    assert np.mean(agreement) >= mean
