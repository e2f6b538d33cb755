from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from monai.transforms import LoadImaged

from pipeline.data.readers import ImageFileReader
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import InputError, lamina_cause

READER = "pipeline.data.readers.ImageFileReader"
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
STACK = np.random.default_rng(1).integers(0, 256, (8, 16, 12), dtype=np.uint8)


def load(path: Path, **kw: object) -> object:
    transform = LoadImaged(keys="image", reader=READER, ensure_channel_first=True, **kw)
    return transform({"image": path})["image"]


def test_rows_stay_rows_and_channels_come_first(tmp_path: Path) -> None:
    image = load(write_png(tmp_path / "a.png", RGB))
    np.testing.assert_array_equal(image, np.moveaxis(RGB, -1, 0))


def test_gray_image_gets_a_channel_axis(tmp_path: Path) -> None:
    image = load(write_png(tmp_path / "a.png", RGB[..., 0]))
    np.testing.assert_array_equal(image, RGB[None, ..., 0])


@pytest.mark.parametrize("width", [12, 4, 3], ids=["wide", "four wide", "three wide"])
def test_every_page_of_a_stack_is_there_in_order(tmp_path: Path, width: int) -> None:
    image = load(write_tiff(tmp_path / "a.tif", STACK[..., :width]))
    np.testing.assert_array_equal(image, STACK[None, ..., :width])


def test_sixteen_bits_are_kept_and_their_type_is_recorded(tmp_path: Path) -> None:
    deep = RGB[..., 0].astype(np.uint16) * 257
    image = load(write_png(tmp_path / "a.png", deep))
    np.testing.assert_array_equal(image, deep[None])
    assert image.meta["source_dtype"] == "uint16"
    assert image.meta["filename_or_obj"].endswith("a.png")


def test_damaged_stack_is_not_read_by_another_reader_as_its_first_page(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, photometric="minisblack", compression="lzw")
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(Exception, match=r"LoadImaged|a\.tif") as caught:
        load(path)
    cause = lamina_cause(caught.value)
    assert isinstance(cause, InputError)
    assert str(path) in str(cause)


def test_limit_reaches_the_reader(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", RGB)
    with pytest.raises(InputError, match="decoded"):
        ImageFileReader(limit=10).get_data([path])


def test_several_files_become_channels_if_they_agree(tmp_path: Path) -> None:
    paths = [write_png(tmp_path / f"{i}.png", RGB[..., i]) for i in range(2)]
    reader = ImageFileReader()
    array, meta = reader.get_data(reader.read(paths))
    np.testing.assert_array_equal(array, np.moveaxis(RGB[..., :2], -1, 0))
    assert meta["original_channel_dim"] == 0
    paths.append(write_png(tmp_path / "other.png", RGB[:4, :, 0]))
    with pytest.raises(InputError, match=r"other\.png.*must agree"):
        reader.get_data(reader.read(paths))


def test_channel_axis_is_nan_where_there_is_none(tmp_path: Path) -> None:
    _, meta = ImageFileReader().get_data([write_tiff(tmp_path / "a.tif", STACK)])
    assert math.isnan(meta["original_channel_dim"])
    assert meta["spatial_shape"].tolist() == [8, 16, 12]


def test_known_suffixes_are_told_from_others() -> None:
    reader = ImageFileReader()
    assert reader.verify_suffix(["a.PNG", "b.ppm.gz", "c.tiff"])
    assert not reader.verify_suffix(["a.png", "b.nii.gz"])
