from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.guess import guess_manifest
from pipeline.data.manifests import find_samples, manifest_from_mapping
from pipeline.data.writers import write_png
from pipeline.errors import InputError

LAYOUTS = {
    "drive": ["training/images/21_training.tif", "training/1st_manual/21_manual1.gif"],
    "chase_db1": ["Image_01L.jpg", "Image_01L_1stHO.png"],
    "stare": ["images/im0001.ppm.gz", "labels-ah/im0001.ah.ppm.gz"],
    "hrf": ["images/01_h.JPG", "manual1/01_h.tif", "mask/01_h_mask.tif"],
    "les_av": ["images/12.png", "vessel-segmentations/12.png"],
    "fives": ["train/Original/1_A.png", "train/Ground truth/1_A.png"],
    "vessel_pairs": ["train/image/x.png", "train/label/x.png", "test/image/y.png"],
    "image_folders": ["train/ant/x.png", "train/bee/y.png", "val/ant/z.png"],
    "images": ["a/x.png", "b/y.tif"],
}
PAIRS = {
    "own folders": (["photos/a.jpg", "photos/b.jpg", "Masks/a_mask.png", "Masks/b_mask.png"], 2),
    "in splits": (
        ["training/img/a.png", "training/gt/a.png", "Test/img/b.png", "Test/gt/b.png"],
        2,
    ),
    "a class folder": (["x/input/a.png", "x/vessels/a.png"], 1),
}


def make(root: Path, names: list[str]) -> Path:
    for name in names:
        write_png(root / name, np.zeros((2, 2), np.uint8))
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layout_is_recognised_and_its_guess_works(tmp_path: Path, name: str) -> None:
    root = make(tmp_path, LAYOUTS[name])
    content = guess_manifest(root)
    assert content["name"] == name
    assert find_samples(manifest_from_mapping(content), root)


@pytest.mark.parametrize("name", PAIRS)
def test_folder_pair_of_other_names_is_recognised(tmp_path: Path, name: str) -> None:
    names, count = PAIRS[name]
    root = make(tmp_path, names)
    content = guess_manifest(root)
    samples = find_samples(manifest_from_mapping(content), root)
    assert content["name"] == "my_data"
    assert [sample.label is not None for sample in samples] == [True] * count


def test_splits_are_told_from_folder_names(tmp_path: Path) -> None:
    root = make(tmp_path, PAIRS["in splits"][0])
    samples = find_samples(manifest_from_mapping(guess_manifest(root)), root)
    assert {sample.image.parts[-3]: sample.split for sample in samples} == {
        "training": "train",
        "Test": "test",
    }


def test_known_layout_with_missing_labels_is_still_recognised(tmp_path: Path) -> None:
    names = [*LAYOUTS["fives"], "train/Original/2_D.png"]
    assert guess_manifest(make(tmp_path, names))["name"] == "fives"


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_images_is_an_input_error(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no images found"):
        guess_manifest(tmp_path if exists else tmp_path / "none")
