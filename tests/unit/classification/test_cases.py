from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset

from pipeline.classification.cases import ClassCases, training_cases
from pipeline.classification.phantom import write_phantom_dataset
from pipeline.data.cases import inputs_below
from pipeline.errors import ConfigurationError, InputErrors

SMALL = {"counts": {"train": 12, "val": 6, "test": 6}, "classes": 3, "imbalance": 2.0}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("listed") / "data"
    return write_phantom_dataset(root, size_px=32, **SMALL)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("ant", 12), ("bee", 6)):
        for n in range(count):
            path = tmp_path / "folders" / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 9, 3), np.uint8)).save(path)
    return tmp_path / "folders"


def sides(cases: ClassCases) -> list[set[str]]:
    return [{case["image"] for case in side} for side in (cases.train, cases.val, cases.test)]


def test_a_case_is_an_image_with_its_label(listed: Path) -> None:
    cases = training_cases(str(listed), "split_lists", "unused")
    assert [len(side) for side in (cases.train, cases.val, cases.test)] == [12, 6, 6]
    first = cases.train[0]
    assert set(first) == {"image", "label", "name", "subject", "stratum"}
    assert isinstance(first["label"], int)
    assert first["name"] == Path(first["image"]).relative_to(listed).as_posix()
    assert cases.class_names[0] == "brown plain beetle"


def test_labels_are_those_of_the_lists(listed: Path) -> None:
    cases = training_cases(str(listed), "split_lists", "unused")
    written = dict(line.split() for line in (listed / "train.txt").read_text().splitlines())
    assert {Path(c["image"]).name: str(c["label"]) for c in cases.train} == written
    assert cases.train_labels == [case["label"] for case in cases.train]
    assert cases.class_counts == [cases.train_labels.count(k) for k in range(3)]


def test_the_first_lines_say_how_unequal_the_classes_are(listed: Path) -> None:
    cases = training_cases(str(listed), "split_lists", "unused")
    smallest, largest = min(cases.class_counts), max(cases.class_counts)
    facts = " / ".join(cases.facts)
    assert "train / val / test 12 / 6 / 6 images" in facts
    assert f"3 classes; training images of a class: {smallest} to {largest}" in facts
    assert f"(imbalance {largest / smallest:.1f})" in facts
    name = cases.class_names[cases.class_counts.index(largest)]
    share = sum(c["label"] == cases.class_names.index(name) for c in cases.val) / 6
    assert f"always answering {name!r}, the largest class, is right for {share:.1%}" in facts


def test_a_class_without_training_images_is_named(listed: Path, tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path / "data", size_px=32, **SMALL)
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "train.txt").write_text("".join(line for line in lines if not line.endswith(" 1\n")))
    cases = training_cases(str(root), "split_lists", "unused")
    assert cases.class_counts[1] == 0
    assert any("no training image of blue banded moth" in fact for fact in cases.facts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fold", [None, 1])
def test_no_image_is_on_two_sides_and_none_is_lost(
    folders: Path, seed: int, fold: int | None
) -> None:
    cases = training_cases(str(folders), "image_folders", "unused", fold=fold, seed=seed)
    train, val, test = sides(cases)
    assert not (train & val) | (train & test) | (val & test)
    assert len(train | val | test) == 18


def test_a_wrapped_side_does_not_lead_to_the_other(folders: Path) -> None:
    """The sides are lists of their own: what unwraps a Subset finds its side and no more."""
    cases = training_cases(str(folders), "image_folders", "unused", val_split=0.5)
    wrapped = Subset(cases.train, range(3))  # type: ignore[arg-type]
    unwrapped: Any = wrapped.dataset
    assert not {case["image"] for case in unwrapped} & sides(cases)[1]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_val_split_is_a_share_of_each_class(folders: Path, share: float) -> None:
    cases = training_cases(str(folders), "image_folders", "unused", val_split=share)
    labels = [case["label"] for case in cases.val]
    assert [labels.count(k) for k in (0, 1)] == [round(12 * share), round(6 * share)]
    again = training_cases(str(folders), "image_folders", "unused", val_split=share)
    assert cases.val == again.val


def test_val_split_keeps_groups_together(folders: Path) -> None:
    rows = [
        {"image": f"{name}/{n}.png", "label": name, "group": f"day{n % 3}"}
        for name, count in (("ant", 12), ("bee", 6))
        for n in range(count)
    ]
    with (folders / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "label", "group"])
        writer.writeheader()
        writer.writerows(rows)
    cases = training_cases(str(folders), "image_table", "unused", val_split=0.3)
    train, val = ({case["subject"] for case in side} for side in (cases.train, cases.val))
    assert len(val) == 1
    assert not train & val


@pytest.mark.parametrize(
    ("manifest", "settings", "message"),
    [
        ("split_lists", {"val_split": 0.2}, "has 6 images of its own to validate on"),
        ("image_folders", {"val_split": 1.5}, "val_split is 1.5, expected a share"),
        ("image_folders", {"val_split": 0.2, "fold": 1}, "has folds that say so"),
        ("images", {}, "says of no image which class it has; choose one with `classes`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    listed: Path, folders: Path, manifest: str, settings: dict[str, Any], message: str
) -> None:
    root = listed if manifest == "split_lists" else folders
    with pytest.raises(ConfigurationError, match=message):
        training_cases(str(root), manifest, "unused", **settings)


def test_a_class_list_decides_the_labels(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("bee\nwasp\nant\n")
    cases = training_cases(
        str(folders), "image_folders", "unused", class_list=str(tmp_path / "own.txt")
    )
    assert cases.class_names == ("bee", "wasp", "ant")
    assert {(Path(c["image"]).parent.name, c["label"]) for c in cases.train} == {
        ("ant", 2),
        ("bee", 0),
    }


def test_every_bad_image_is_listed_before_training(folders: Path) -> None:
    (folders / "ant" / "0.png").write_bytes(b"no image")
    whole = (folders / "bee" / "1.png").read_bytes()
    (folders / "bee" / "1.png").write_bytes(whole[:-20])
    with pytest.raises(InputErrors) as caught:
        training_cases(str(folders), "image_folders", "unused")
    assert [problem.path for problem in caught.value.problems] == ["ant/0.png", "bee/1.png"]
    assert "\n" not in str(caught.value)
    assert len(training_cases(str(folders), "image_folders", "unused", check=False).train)


def test_without_a_data_folder_the_phantom_is_drawn_and_said_so(tmp_path: Path) -> None:
    phantom = {**SMALL, "size_px": 32}
    cases = training_cases(None, "ip102", str(tmp_path / "phantom"), phantom=phantom)
    assert "PHANTOM" in cases.facts[0]
    assert len(cases.train) == 12
    assert len(cases.class_names) == 3


def test_a_split_without_labels_is_told_apart_from_label_0(listed: Path) -> None:
    cases = training_cases(str(listed), "split_lists", "unused")
    assert len(cases.split("all")) == 24
    assert any(case["label"] == 0 for case in cases.split("train"))


def test_a_folder_of_images_is_the_input_of_inference(folders: Path, tmp_path: Path) -> None:
    inputs = inputs_below(str(folders), "images", str(tmp_path / "out"))
    assert len(inputs) == 18
    assert inputs[0]["name"] == "ant/0.png"
    assert all(case["label"] is None for case in inputs)


@pytest.mark.parametrize(("fold", "sizes"), [(None, (347, 52, 132)), (2, (349, 53, 129))])
def test_pollen_is_cut_by_blocks(
    lamina_data: Path, fold: int | None, sizes: tuple[int, int, int]
) -> None:
    root = lamina_data / "classification" / "pollen_bees"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    cases = training_cases(str(root), "pollen_bees", "unused", fold=fold, check=False)
    assert (len(cases.train), len(cases.val), len(cases.test)) == sizes
    assert cases.class_names == ("no_pollen", "pollen")
    for case in cases.train:
        assert case["label"] == int(Path(case["image"]).name.startswith("P"))
