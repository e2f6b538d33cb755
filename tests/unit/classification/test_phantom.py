from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.classification import phantom
from pipeline.classification.phantom import class_sizes, insect_phantom, write_phantom_dataset
from pipeline.classification.phantom_body import BODIES
from pipeline.classification.phantom_traits import MOST_CLASSES, traits_of
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.errors import ConfigurationError

COUNTS = {"train": 7, "val": 3}


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_the_same_seed_draws_the_same_insect_and_another_one_another() -> None:
    first, again = (insect_phantom(3, 5, 48) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.label, first.name) == (5, traits_of(5).name)
    assert not np.array_equal(first.image, insect_phantom(4, 5, 48).image)


@pytest.mark.parametrize("label", range(len(BODIES)))
@pytest.mark.parametrize("size_px", [32, 75])
def test_every_build_is_drawn_at_every_size(label: int, size_px: int) -> None:
    image = insect_phantom(label, label, size_px).image
    assert (image.shape, image.dtype) == ((size_px, size_px, 3), np.uint8)
    assert image.std() > 8


def test_no_two_classes_share_all_marks() -> None:
    names = [traits_of(label).name for label in range(MOST_CLASSES)]
    assert len(set(names)) == MOST_CLASSES == 640


def test_the_first_classes_are_easy_and_later_ones_share_marks() -> None:
    first = [traits_of(label) for label in range(8)]
    assert len({traits.build for traits in first}) == 8

    def marks(one: Any, other: Any) -> int:
        names = ("build", "pattern", "colour", "long_legs")
        return sum(getattr(one, name) == getattr(other, name) for name in names)

    hundred = [traits_of(label) for label in range(102)]
    assert max(marks(*pair) for pair in combinations(hundred, 2)) == 3


def describe(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the histogram of the colours near the middle, where the insect is."""
    side = image.shape[0]
    middle = image[side // 4 : -side // 4, side // 4 : -side // 4].reshape(-1, 3) // 43
    codes = middle[:, 0].astype(int) * 36 + middle[:, 1] * 6 + middle[:, 2]
    return np.sqrt(np.bincount(codes, minlength=216) / len(codes))


def test_classes_can_be_told_apart_and_not_by_colour_alone() -> None:
    """The nearest neighbour by colours is right far more often than chance and far from always."""
    labels = np.repeat(np.arange(8), 12)
    seeds = np.tile(np.arange(12), 8)
    features = np.stack(
        [
            describe(insect_phantom(int(s), int(k), 40).image)
            for k, s in zip(labels, seeds, strict=True)
        ]
    )
    distance = ((features[:, None] - features[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    right = np.mean(labels[distance.argmin(1)] == labels)
    assert 2 / 8 < right < 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 31), "insect phantom of 31 pixels"),
        ((-1, 0), "seed -1"),
        ((0, -1), "label -1 of an insect phantom; expected 0 to 639"),
        ((0, 640), "label 640"),
    ],
)
def test_impossible_insects_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        insect_phantom(*arguments)


@given(
    classes=st.integers(2, 120),
    more=st.integers(0, 3000),
    imbalance=st.floats(1, 100),
    seed=st.integers(0, 9),
)
def test_class_sizes_add_up_and_leave_no_class_out(
    classes: int, more: int, imbalance: float, seed: int
) -> None:
    sizes = class_sizes(classes + more, classes, imbalance, seed)
    assert sum(sizes) == classes + more
    assert len(sizes) == classes
    assert min(sizes) >= 1


def test_enough_images_can_be_as_unequal_as_ip102() -> None:
    sizes = class_sizes(40_000, 102, 80)
    assert max(sizes) / min(sizes) == pytest.approx(80, rel=0.05)
    assert sizes != sorted(sizes)
    assert sizes != class_sizes(40_000, 102, 80, seed=1)


@pytest.mark.parametrize("arguments", [(5, 6, 2.0), (9, 1, 2.0), (9, 3, 0.5)])
def test_impossible_class_sizes_are_refused(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigurationError, match="expected 2 to 640 classes"):
        class_sizes(*arguments)


def test_the_data_set_has_the_layout_of_ip102(tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path / "data", COUNTS, 3, 2.0, 32, seed=1)
    listed = {s: (root / f"{s}.txt").read_text().splitlines() for s in COUNTS}
    assert {split: len(lines) for split, lines in listed.items()} == COUNTS
    names = sorted(line.split()[0] for lines in listed.values() for line in lines)
    assert names == [f"{n:05d}.jpg" for n in range(10)]
    classes = (root / "classes.txt").read_text().splitlines()
    assert classes[0].split(maxsplit=1) == ["1", traits_of(0).name]
    with Image.open(root / "images" / "00000.jpg") as image:
        assert image.size == (32, 32)
    samples = find_samples(load_manifest("split_lists"), root)
    assert {sample.category for sample in samples} == {"0", "1", "2"}


def test_the_data_set_may_have_folders(tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path / "data", COUNTS, 3, 2.0, 32, layout="folders")
    samples = find_samples(load_manifest("image_folders"), root)
    assert len(samples) == 10
    expected = {traits_of(label).name.replace(" ", "_") for label in range(3)}
    assert {sample.category for sample in samples} == expected


def test_no_two_pictures_of_a_data_set_are_the_same(tmp_path: Path) -> None:
    files = files_of(write_phantom_dataset(tmp_path / "data", COUNTS, 3, 2.0, 32))
    pictures = [content for name, content in files.items() if name.endswith(".jpg")]
    assert len(set(pictures)) == 10


def test_finished_data_set_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_phantom_dataset(tmp_path, COUNTS, 3, 2.0, 32)
    before = files_of(root)
    monkeypatch.setattr(phantom, "insect_phantom", None)  # drawing would fail
    assert write_phantom_dataset(tmp_path, COUNTS, 3, 2.0, 32) == root
    assert files_of(root) == before


def test_incomplete_data_set_is_written_again(tmp_path: Path) -> None:
    before = files_of(write_phantom_dataset(tmp_path, COUNTS, 3, 2.0, 32))
    (tmp_path / "images" / "00001.jpg").unlink()
    (tmp_path / "val.txt").write_text("cut")
    assert files_of(write_phantom_dataset(tmp_path, COUNTS, 3, 2.0, 32)) == before


@pytest.mark.parametrize("layout", ["ip102", "folders"])
def test_other_settings_leave_no_picture_behind(tmp_path: Path, layout: Any) -> None:
    write_phantom_dataset(tmp_path, {"train": 9, "test": 9}, 3, 1.0, 32)
    write_phantom_dataset(tmp_path, COUNTS, 2, 1.0, 32, layout=layout)
    pictures = [name for name in files_of(tmp_path) if name.endswith(".jpg")]
    assert len(pictures) == 10
    assert (tmp_path / "train.txt").is_file() == (layout == "ip102")
    assert not (tmp_path / "test.txt").exists()


def test_counts_do_not_change_a_picture(tmp_path: Path) -> None:
    few, many = (
        files_of(write_phantom_dataset(tmp_path / str(n), {"train": n}, 2, 1.0, 32, 0, "folders"))
        for n in (4, 8)
    )
    kept = [name for name in few if name.endswith(".jpg")]
    assert len(kept) == 4
    assert all(few[name] == many[name] for name in kept)


def test_marker_tells_what_was_drawn(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path, COUNTS, 3, 2.0, 32, seed=4)
    settings = json.loads((tmp_path / "phantom.json").read_text())["settings"]
    assert settings["counts"] == COUNTS
    assert (settings["classes"], settings["imbalance"], settings["seed"]) == (3, 2.0, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"counts": {"train": -1}},
        {"counts": {"dev": 4}},
        {"counts": {"train": 0}},
        {"counts": {"train": 200_000}},
        {"seed": -1},
        {"layout": "tree"},
    ],
)
def test_impossible_data_sets_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="phantom data set of layout"):
        write_phantom_dataset(tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()


def test_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match="choose another folder"):
        write_phantom_dataset(tmp_path, COUNTS, 3, 2.0, 32)
    assert files_of(tmp_path) == {"photo.jpg": b"mine"}
