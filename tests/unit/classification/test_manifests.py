from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.classification.block_splits import deal_blocks, write_block_splits
from pipeline.classification.class_names import classes_of, read_class_list, sorted_names
from pipeline.data.folds import split_samples
from pipeline.data.lists import read_lists
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.errors import ConfigurationError, InputError, InputErrors

OURS = ("ip102", "split_lists", "image_folders", "image_table", "hymenoptera", "pollen_bees")

Dataset = Callable[[str], Path]


@pytest.fixture
def dataset(lamina_data: Path) -> Dataset:
    def folder(name: str) -> Path:
        path = lamina_data / "classification" / name
        if not path.is_dir():
            pytest.skip(f"{path} is not there")
        return path

    return folder


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize("name", OURS)
def test_a_manifest_of_classes_says_whose_the_data_are(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.classes["of"]
    assert manifest.licence
    assert manifest.notes


# IP102


def test_the_official_lists_of_ip102_are_whole(dataset: Dataset) -> None:
    manifest, root = load_manifest("ip102"), dataset("ip102")
    listed = read_lists(manifest.lists, root, manifest.fields)
    sizes = Counter(one.split for one in listed)
    assert sizes == {"train": 45_095, "val": 7_508, "test": 22_619}
    assert len({one.image for one in listed}) == 75_222  # in one split each
    for split in sizes:
        labels = {int(one.values["label"]) for one in listed if one.split == split}
        assert labels == set(range(102))
    per_class = Counter(one.values["label"] for one in listed)
    assert (min(per_class.values()), max(per_class.values())) == (71, 5740)


def test_label_l_of_ip102_is_line_l_plus_1(dataset: Dataset) -> None:
    manifest, root = load_manifest("ip102"), dataset("ip102")
    classes = classes_of(manifest, root, map(str, range(102)))
    assert len(set(classes.names)) == 102
    assert classes.names[classes.labels["0"]] == "rice leaf roller"  # "1  rice leaf roller"
    assert classes.names[classes.labels["101"]] == "Cicadellidae"  # "102 Cicadellidae"


def test_images_of_ip102_that_are_missing_are_listed(dataset: Dataset) -> None:
    root = dataset("ip102")
    there = len(list((root / "images").glob("*.jpg")))
    with pytest.raises(InputErrors) as caught:
        find_samples(load_manifest("ip102"), root)
    assert len(caught.value.problems) == 75_222 - there
    assert "listed in train.txt:1" in str(caught.value)


def ip102(root: Path, *lines: str) -> Path:
    numbered = "".join(f"{k + 1:<3} pest {k} \t\t\r\n" for k in range(102))
    touch(root, "classes.txt").joinpath("classes.txt").write_text(numbered)
    for split, line in zip(("train", "val", "test"), lines, strict=True):
        (root / f"{split}.txt").write_text(line)
    return root


def test_ip102_with_lines_missing_or_out_of_range_is_refused(tmp_path: Path) -> None:
    root = ip102(tmp_path, "00000.jpg 0\n", "00001.jpg 0\n", "00002.jpg 102\n")
    with pytest.raises(InputError, match=r"train\.txt: 1 lines, but the owner's list has 45095"):
        find_samples(load_manifest("ip102"), root)
    lists = load_manifest("ip102").lists
    bare = [type(one)(one.file, one.image, one.columns, one.split) for one in lists]
    with pytest.raises(InputErrors, match=r"test\.txt:1: label is '102', expected what matches"):
        read_lists(bare, root, load_manifest("ip102").fields)


@pytest.mark.parametrize("above", ["classification/", ""])
def test_ip102_in_folders_counts_numbers_as_numbers(tmp_path: Path, above: str) -> None:
    names = [
        f"{above}{split}/{k}/{k}_{split}.jpg" for split in ("train", "val") for k in range(102)
    ]
    root = touch(tmp_path, *names)
    manifest = load_manifest("ip102")
    samples = find_samples(manifest, root)
    assert Counter(sample.split for sample in samples) == {"train": 102, "val": 102}
    classes = classes_of(manifest, root, [sample.category or "" for sample in samples])
    assert [classes.labels[str(k)] for k in (0, 2, 10, 101)] == [0, 2, 10, 101]


# Folders and tables of anybody


def test_folders_with_and_without_splits_are_found(tmp_path: Path) -> None:
    manifest = load_manifest("image_folders")
    touch(tmp_path / "a", "train/ant/1.jpg", "val/ant/1.PNG", "test/bee/deep/1.tif", "train/x.jpg")
    samples = find_samples(manifest, tmp_path / "a")
    assert {(s.split, s.category, s.id) for s in samples} == {
        ("train", "ant", "train/ant/1"),
        ("val", "ant", "val/ant/1"),
        ("test", "bee", "test/bee/deep/1"),
    }
    touch(
        tmp_path / "b", *(f"{kind}/{n}.jpg" for kind in ("ant", "bee", "tester") for n in range(9))
    )
    plain = find_samples(manifest, tmp_path / "b")
    assert {(s.split, s.category) for s in plain} == {
        ("train", "ant"),
        ("train", "bee"),
        ("train", "tester"),
    }
    split = split_samples(plain, manifest)
    assert Counter(s.category for s in split.val) == {"ant": 2, "bee": 2, "tester": 2}
    again = split_samples(plain, manifest, seed=1)
    assert {s.id for s in again.val} != {s.id for s in split.val}


def test_hymenoptera_is_245_and_153_photographs(dataset: Dataset) -> None:
    for name in ("hymenoptera", "image_folders"):
        samples = find_samples(load_manifest(name), dataset("hymenoptera"))
        counts = Counter((sample.split, sample.category) for sample in samples)
        assert counts == {
            ("train", "ants"): 124,
            ("train", "bees"): 121,
            ("val", "ants"): 70,
            ("val", "bees"): 83,
        }


# Class names


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_before_class_names_are_dropped(tmp_path: Path, first: int) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(f"{first}  rice leaf roller \t\r\n\n{first + 1} 7-spot ladybird\n")
    assert read_class_list(path) == ("rice leaf roller", "7-spot ladybird")


def test_a_plain_class_list_keeps_its_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("bee\n3 spot moth\nant\n")
    assert read_class_list(path) == ("bee", "3 spot moth", "ant")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 ant\n3 bee\n", r"classes\.txt:2: '3 bee', expected number 2"),
        ("5 ant\n6 bee\n", r"classes\.txt:1: '5 ant', expected number 1"),
        ("ant\nbee\nant\n", r"classes\.txt:3: 'ant' stands in line 1 already"),
    ],
)
def test_a_class_list_out_of_order_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_list(tmp_path / "classes.txt")


def test_names_are_sorted_as_text_and_numbers_as_numbers() -> None:
    assert sorted_names(["b", "10", "9"]) == ["10", "9", "b"]
    assert sorted_names(["10", "9", "100"]) == ["9", "10", "100"]


def test_a_class_list_gives_the_labels(tmp_path: Path) -> None:
    manifest, path = load_manifest("image_folders"), tmp_path / "own.txt"
    path.write_text("wasp\nbee\nant\n")
    assert classes_of(manifest, tmp_path, ["ant", "bee"], path).labels == {"ant": 2, "bee": 1}
    path.write_text("wasp\nbee\n")
    assert classes_of(manifest, tmp_path, ["7", "12"], path).labels == {"7": 0, "12": 1}
    with pytest.raises(InputErrors, match=r"class fly: not one of the 2 classes of .*own\.txt"):
        classes_of(manifest, tmp_path, ["fly", "bee"], path)
    with pytest.raises(ConfigurationError, match="2 class names for 3 numbered classes"):
        classes_of(manifest, tmp_path, ["1", "2", "5"], path)


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 classes \(images\), expected two or more"):
        classes_of(load_manifest("image_folders"), tmp_path, ["images"])


def test_another_number_of_names_than_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("1 ant\n2 bee\n")
    with pytest.raises(InputError, match="2 class names, expected 102"):
        classes_of(load_manifest("ip102"), tmp_path, ["0"])


# Pollen


def test_blocks_of_frames_never_part_and_the_shares_are_kept(dataset: Dataset) -> None:
    manifest = load_manifest("pollen_bees")
    samples = find_samples(manifest, dataset("pollen_bees"))
    assert Counter(sample.category for sample in samples) == {"P": 276, "NP": 255}
    for sample in samples:
        frame = int(sample.image.name.lstrip("NP").partition("-")[0])
        assert sample.subject == str(frame // 250)
    tests = []
    for fold in range(3):
        split = split_samples(samples, manifest, fold)
        sides = (split.train, split.val, split.test)
        assert sum(map(len, sides)) == len(samples)
        for one, other in combinations(sides, 2):
            assert not {s.subject for s in one} & {s.subject for s in other}
        for side, share in zip(sides, (0.65, 0.10, 0.25), strict=True):
            assert abs(len(side) / len(samples) - share) < 0.04
            assert 0.4 < sum(s.category == "P" for s in side) / len(side) < 0.6
        tests.append({sample.id for sample in split.test})
    assert len({frozenset(test) for test in tests}) == 3


def test_the_committed_blocks_are_what_the_command_writes(
    dataset: Dataset, tmp_path: Path, repository: Path
) -> None:
    written = write_block_splits("pollen_bees", dataset("pollen_bees"), tmp_path / "blocks.csv")
    committed = repository / "data_manifests" / "pollen_bees_blocks.csv"
    assert written.read_text() == committed.read_text()


def test_the_committed_blocks_place_every_drawn_frame(tmp_path: Path) -> None:
    names = [f"images/{'NP'[n % 2 :]}{137 * n}-{n}r.jpg" for n in range(500)]
    manifest = load_manifest("pollen_bees")
    samples = find_samples(manifest, touch(tmp_path, *names))
    sides = split_samples(samples, manifest, 1)
    assert sum(map(len, (sides.train, sides.val, sides.test))) == 500


@pytest.mark.parametrize("seed", range(4))
def test_dealt_blocks_cover_all_and_keep_the_shares(seed: int) -> None:
    images = {block: 1 + block % 5 for block in range(0, 90, 2)}
    dealt = deal_blocks(images, seed, blocks=100)
    assert sorted(dealt) == list(range(100))
    total = sum(images.values())
    for split, share in zip(("train", "val", "test"), (0.65, 0.1, 0.25), strict=True):
        held = sum(count for block, count in images.items() if dealt[block] == split)
        assert abs(held / total - share) < 5 / total + 0.01
    assert dealt != deal_blocks(images, seed + 1, blocks=100)


def test_a_block_beyond_the_last_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="blocks is 5, but there are images in 7"):
        deal_blocks({7: 1}, 0, blocks=5)
