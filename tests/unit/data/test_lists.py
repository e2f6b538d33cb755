from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.folds import split_samples
from pipeline.data.lists import ImageList, read_lists
from pipeline.data.manifests import Manifest, find_samples, load_manifest, manifest_from_mapping
from pipeline.errors import ConfigurationError, InputError, InputErrors

WORDS = ImageList("train.txt", "images/{image}", ["image", "label"], split="train")
TABLE = ImageList(
    "labels.csv",
    "{image}",
    {"image": "image", "label": "label", "split": "split", "group": "group"},
    optional=["split", "group"],
)


def write(root: Path, name: str, text: str) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, "utf-8")
    return root


def table_manifest(**changes: Any) -> Manifest:
    return manifest_from_mapping(
        {
            "name": "tiny",
            "title": "tiny",
            "task": "classes",
            "licence": "none",
            "source": None,
            "citation": None,
            "labels": {"foreground": None, "allowed": None},
            "classes": {"of": "{label}"},
            "lists": [
                {
                    "file": "labels.csv",
                    "image": "{image}",
                    "columns": dict(TABLE.columns),
                    "optional": ["split", "group"],
                }
            ],
            "subject": "{group}",
            "validation": {"fraction": 0.25, "seed": 0},
            "folds": {"k": 2, "seed": 0},
            **changes,
        }
    )


def test_a_plain_line_is_an_image_and_its_label(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "a.jpg 0\r\n\nmy bee.jpg\t 12\n")
    first, second = read_lists([WORDS], tmp_path)
    assert (first.image, first.values["label"], first.where) == ("images/a.jpg", "0", "train.txt:1")
    assert (second.image, second.values["label"]) == ("images/my bee.jpg", "12")
    assert {first.split, second.split} == {"train"}


def test_every_bad_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "a.jpg 0\nb.jpg\nc.jpg ant\na.jpg 1\n")
    with pytest.raises(InputErrors) as caught:
        read_lists([WORDS], tmp_path, {"label": r"\d+"})
    assert [problem.path for problem in caught.value.problems] == [
        "train.txt:2",
        "train.txt:3",
        "train.txt:4",
    ]
    assert "a.jpg stands in train.txt:1 (train) already" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_in_two_lists_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "a.jpg 0\n")
    write(tmp_path, "val.txt", "b.jpg 0\na.jpg 0\n")
    val = ImageList("val.txt", "images/{image}", ["image", "label"], split="val")
    with pytest.raises(InputErrors, match=r"val\.txt:2: .*train\.txt:1 \(train\)"):
        read_lists([WORDS, val], tmp_path)


def test_a_list_of_another_length_than_its_owners_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "a.jpg 0\n")
    owners = ImageList("train.txt", "{image}", ["image", "label"], split="train", rows=2)
    with pytest.raises(InputError, match=r"train\.txt: 1 lines, but the owner's list has 2"):
        read_lists([owners], tmp_path)


def test_a_list_that_is_needed_and_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.txt: not found"):
        read_lists([WORDS], tmp_path)
    assert read_lists([ImageList("x.txt", "{i}", ["i"], required=False)], tmp_path) == []


def test_a_table_may_say_split_and_group_or_leave_them_out(tmp_path: Path) -> None:
    write(tmp_path, "labels.csv", "label,image,split,note\nant,a.jpg,val,x\nbee,b.jpg,,\n")
    first, second = read_lists([TABLE], tmp_path)
    assert (first.split, second.split) == ("val", "train")
    assert first.values["group"] == "a.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\na.jpg\n", "no column label; found image"),
        ("image,label\na.jpg,\n", r"labels.csv:2: incomplete line"),
        ("image,label,split\na.jpg,ant,dev\n", r"labels.csv:2: split is 'dev', expected one of"),
        ("", "found an empty file"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_lists([TABLE], write(tmp_path, "labels.csv", text))


def test_listed_images_become_samples_and_others_do_not(tmp_path: Path) -> None:
    write(tmp_path, "labels.csv", "image,label\na.jpg,ant\nd/b.jpg,bee\n")
    for name in ("a.jpg", "d/b.jpg", "other.jpg"):
        write(tmp_path, name, name)
    samples = find_samples(table_manifest(), tmp_path)
    assert [(s.id, s.category, s.subject) for s in samples] == [
        ("a", "ant", "a.jpg"),
        ("d/b", "bee", "d/b.jpg"),
    ]


def test_every_listed_image_that_is_missing_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, "labels.csv", "image,label\na.jpg,ant\nb.jpg,bee\nc.jpg,bee\n")
    write(tmp_path, "b.jpg", "b")
    with pytest.raises(InputErrors) as caught:
        find_samples(table_manifest(), tmp_path)
    assert [problem.path for problem in caught.value.problems] == ["a.jpg", "c.jpg"]
    assert "listed in labels.csv:4" in str(caught.value)


@pytest.mark.parametrize("path", ["../out.jpg", "/etc/hostname"])
def test_a_listed_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    write(tmp_path, "out.jpg", "x")
    root = write(tmp_path / "data", "labels.csv", f"image,label\n{path},ant\n")
    with pytest.raises(ConfigurationError, match="leaves dataset_dir"):
        find_samples(table_manifest(), root)


def test_a_listed_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "out.jpg", "x")
    root = write(tmp_path / "data", "labels.csv", "image,label\na.jpg,ant\n")
    (root / "a.jpg").symlink_to(tmp_path / "out.jpg")
    with pytest.raises(ConfigurationError, match="a link that leaves dataset_dir"):
        find_samples(table_manifest(), root)


def test_a_number_is_cut_into_blocks(tmp_path: Path) -> None:
    rows = [f"v{n}.jpg,ant,,{n}" for n in (0, 249, 250, 999)]
    write(tmp_path, "labels.csv", "\n".join(["image,label,split,group", *rows]))
    for n in (0, 249, 250, 999):
        write(tmp_path, f"v{n}.jpg", str(n))
    manifest = table_manifest(blocks={"block": {"field": "group", "size": 250}}, subject="{block}")
    subjects = {s.id: s.subject for s in find_samples(manifest, tmp_path)}
    assert subjects == {"v0": "0", "v249": "0", "v250": "1", "v999": "3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": {"of": "{kind}"}}, "classes.of: unknown field 'kind'"),
        ({"blocks": {"b": {"field": "frame", "size": 2}}}, "blocks.b: unknown field 'frame'"),
        ({"lists": [{"file": "a.csv", "image": "{x}", "columns": ["a", "b"]}]}, "unknown field"),
        (
            {"lists": [{"file": "a", "image": "x/../{a}", "columns": ["a", "group", "label"]}]},
            "leaves dataset_dir",
        ),
        ({"folds": {"k": 2, "seed": 0, "dealt": "by_table"}}, "'table' is a required property"),
        ({"folds": {"k": 2, "seed": 0, "dealt": "by_table", "table": "../a.csv"}}, "folds.table"),
    ],
)
def test_what_is_wrong_in_the_manifest_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        table_manifest(**changes)


def listed(root: Path, classes: dict[str, int], groups: int = 0) -> Path:
    rows = []
    for name, count in classes.items():
        for n in range(count):
            path = f"{name}{n:02d}.jpg"
            write(root, path, path)
            rows.append(f"{path},{name},{f'g{n % groups}' if groups else ''}")
    return write(root, "labels.csv", "\n".join(["image,label,group", *rows]))


@pytest.mark.parametrize("seed", range(5))
def test_validation_takes_its_share_of_every_class(tmp_path: Path, seed: int) -> None:
    root = listed(tmp_path, {"ant": 40, "bee": 8, "fly": 2, "one": 1})
    manifest = table_manifest()
    split = split_samples(find_samples(manifest, root), manifest, seed=seed)
    val = [sample.category for sample in split.val]
    assert {name: val.count(name) for name in ("ant", "bee", "fly", "one")} == {
        "ant": 10,
        "bee": 2,
        "fly": 1,
        "one": 0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_on_one_side_though_it_has_several_classes(tmp_path: Path, seed: int) -> None:
    root = listed(tmp_path, {"ant": 20, "bee": 20}, groups=8)
    manifest = table_manifest()
    split = split_samples(find_samples(manifest, root), manifest, seed=seed)
    train, val = ({sample.subject for sample in side} for side in (split.train, split.val))
    assert val
    assert not train & val
    assert len(split.train) + len(split.val) == 40


def table_folds(tmp_path: Path, splits: str) -> Manifest:
    write(tmp_path, "parts.csv", "subject,split_0,split_1\n" + splits)
    content = {
        key: getattr(table_manifest(), key)
        for key in ("name", "title", "task", "licence", "source", "citation", "labels", "subject")
    }
    content |= {
        "classes": {"of": "{label}"},
        "lists": [{"file": "labels.csv", "image": "{image}", "columns": dict(TABLE.columns),
                   "optional": ["split", "group"]}],
        "validation": None,
        "folds": {"k": 2, "seed": 0, "dealt": "by_table", "table": "parts.csv"},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_manifest(path)


def test_a_table_deals_train_val_and_test(tmp_path: Path) -> None:
    root = listed(tmp_path / "data", {"ant": 6}, groups=3)
    manifest = table_folds(tmp_path, "g0,train,test\ng1,val,train\ng2,test,val\n")
    samples = find_samples(manifest, root)
    for fold, order in ((None, "g0 g1 g2"), (0, "g0 g1 g2"), (1, "g1 g2 g0")):
        split = split_samples(samples, manifest, fold)
        sides = (split.train, split.val, split.test)
        assert [{s.subject for s in side} for side in sides] == [{g} for g in order.split()]


@pytest.mark.parametrize(
    "rows", ["g0,train,test\ng1,val,val\n", "g0,a,b\ng1,val,val\ng2,val,val\n"]
)
def test_a_subject_the_table_does_not_place_is_named(tmp_path: Path, rows: str) -> None:
    root = listed(tmp_path / "data", {"ant": 3}, groups=3)
    manifest = table_folds(tmp_path, rows)
    with pytest.raises(ConfigurationError, match=r"parts\.csv: split_0 of subject 'g[02]' .* is"):
        split_samples(find_samples(manifest, root), manifest, 0)
    with pytest.raises(ConfigurationError, match="fold is 2, expected 0 to 1"):
        split_samples(find_samples(manifest, root), manifest, 2)


def test_copies_on_two_sides_are_refused_or_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "labels.csv", "image,label,split\na.jpg,ant,train\nb.jpg,ant,val\n")
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path, name, "same")
    with pytest.raises(InputErrors, match="the same image as"):
        split_samples(find_samples(table_manifest(), tmp_path), table_manifest())
    lenient = table_manifest(copies="report")
    split = split_samples(find_samples(lenient, tmp_path), lenient)
    assert (len(split.train), len(split.val)) == (1, 1)
    assert "1 images stand on two sides: a.jpg" in caplog.text
