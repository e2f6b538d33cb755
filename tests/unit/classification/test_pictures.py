from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.classification.pictures import captioned_image, write_confusion_picture
from pipeline.data.images import read_image


def test_the_strip_below_an_image_is_green_where_the_class_is_right_and_red_elsewhere() -> None:
    image = np.zeros((3, 8, 8), np.float32)
    for correct, channel in ((True, 1), (False, 0)):
        strip = captioned_image(image, "truth: a", "predicted: b", correct)[-18:].astype(int)
        lit = strip[strip.max(axis=-1) > 60]
        assert len(lit) > 20
        assert (lit.argmax(axis=-1) == channel).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 50, 20), (4, 300, 700), (3, 2, 900)])
def test_any_image_is_shown_whole_within_256_px(shape: tuple[int, ...]) -> None:
    image = np.linspace(-2, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    picture = captioned_image(image, "truth: " + "x" * 300, "predicted: y", False)
    height = max(1, round(256 * shape[1] / max(shape[1:])))
    assert picture.shape == (height + 36, 256, 3)
    assert picture.dtype == np.uint8


def test_grey_levels_span_black_to_white_and_a_flat_image_is_no_error() -> None:
    ramp = np.tile(np.linspace(-1, 3, 256, dtype=np.float32), (3, 256, 1))
    shown = captioned_image(ramp, "", "", True)[:256]
    np.testing.assert_array_equal(shown[0, :, 0], np.arange(256))
    assert captioned_image(np.full((1, 9, 9), 7.0), "", "", True)[:256].max() == 0


@pytest.mark.parametrize("classes", [2, 102])
def test_the_picture_of_a_confusion_matrix_grows_with_the_classes(
    tmp_path: Path, classes: int
) -> None:
    matrix = np.random.default_rng(0).integers(0, 9, (classes, classes))
    matrix[0] = 0  # a class without an image
    names = [f"$species_{number} " + "long " * (number % 12) for number in range(classes)]
    picture = read_image(write_confusion_picture(tmp_path / "matrix.png", matrix, names))
    assert min(picture.shape[:2]) > max(300, 14 * classes)  # a name of 6 pt is 9 px high
    assert max(picture.shape[:2]) < 600 + 20 * classes
