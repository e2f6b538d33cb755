from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import cli
from pipeline.data.freeze import freeze
from pipeline.data.integrity import check_samples
from pipeline.data.manifests import find_samples, load_manifest, manifest_from_mapping
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import Problem

MakePairs = Callable[..., Path]
SIZE = (12, 16)


@pytest.fixture
def check(manifest_content: dict[str, Any]) -> Callable[..., list[Problem]]:
    def run(root: Path, *, decode: bool = True, **changes: Any) -> list[Problem]:
        manifest = manifest_from_mapping({**manifest_content, **changes})
        return check_samples(find_samples(manifest, root), manifest, decode=decode)

    return run


Check = Callable[..., list[Problem]]


def test_sound_data_have_no_problem(make_pairs: MakePairs, check: Check) -> None:
    assert check(make_pairs("a", "b", "c")) == []


def test_no_samples_is_a_problem(manifest_content: dict[str, Any]) -> None:
    (problem,) = check_samples([], manifest_from_mapping(manifest_content))
    assert "no samples" in problem.message


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "constant": (np.full((*SIZE, 3), 7, np.uint8), "constant: every pixel is 7"),
    "two channels": (
        np.arange(384, dtype=np.uint16).astype(np.uint8).reshape(*SIZE, 2),
        "2 channels",
    ),
    "smaller": (np.arange(90, dtype=np.uint8).reshape(6, 5, 3), "they must have one size"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_found_and_named(make_pairs: MakePairs, check: Check, name: str) -> None:
    array, message = BAD_IMAGES[name]
    root = make_pairs("a", "b", "c")
    write_png(root / "image" / "b.png", array)
    problems = check(root)
    assert [problem for problem in problems if message in problem.message]
    assert {Path(problem.path).stem for problem in problems} == {"b"}


def test_size_mismatch_names_both_files_and_sizes(make_pairs: MakePairs, check: Check) -> None:
    root = make_pairs("a", "b")
    write_png(root / "label" / "a.png", np.zeros((16, 12), np.uint8))
    (problem,) = check(root, decode=False)
    assert problem.path == "label/a.png"
    assert "12x16 pixels, but its image image/a.png has 16x12" in problem.message


def test_sixteen_bits_are_named_where_eight_are_expected(
    make_pairs: MakePairs, check: Check
) -> None:
    root = make_pairs("a", "b", "c")
    deep = np.random.default_rng(0).integers(0, 65536, (*SIZE, 3), dtype=np.uint16)
    write_png(root / "image" / "b.png", deep)
    problems = check(root, image={"bit_depth": 8})
    assert problems[0].path == "image/b.png"
    assert problems[0].message.startswith("16 bits (uint16), expected 8; convert it or")
    (mixed,) = check(root)
    assert "images of different types: uint8 (image/a.png), uint16 (image/b.png)" in mixed.message


def test_gray_image_is_named_where_rgb_is_expected(make_pairs: MakePairs, check: Check) -> None:
    root = make_pairs("a")
    write_png(root / "image" / "a.png", np.arange(192, dtype=np.uint8).reshape(SIZE))
    assert check(root) == []
    (problem,) = check(root, image={"channels": 3})
    assert problem.message == "gray, expected RGB by the manifest (image.channels)"


def test_rgba_image_is_accepted_with_a_warning_that_names_it(
    make_pairs: MakePairs, check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_pairs("a")
    rgba = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    write_png(root / "image" / "a.png", rgba)
    with caplog.at_level(logging.WARNING):
        assert check(root, image={"channels": 3}) == []
    assert [record.getMessage() for record in caplog.records] == [
        "image/a.png: RGBA; the alpha channel does not count"
    ]


def test_stack_of_pages_is_no_image(
    make_pairs: MakePairs, manifest_content: dict[str, Any]
) -> None:
    root = make_pairs("a")
    (root / "image" / "a.png").unlink()
    write_tiff(root / "image" / "a.tif", np.arange(3 * 192, dtype=np.float32).reshape(3, *SIZE))
    manifest = load_manifest("vessel_pairs")
    (problem,) = check_samples(find_samples(manifest, root), manifest)
    assert problem.message.startswith("3 pages, expected one image")


def test_values_that_are_not_finite_are_counted_and_placed(make_pairs: MakePairs) -> None:
    root = make_pairs("a")
    (root / "image" / "a.png").unlink()
    array = np.ones(SIZE, np.float32)
    array[3, 4] = np.nan
    array[5, 6] = np.inf
    write_tiff(root / "image" / "a.tif", array)
    manifest = load_manifest("vessel_pairs")
    (problem,) = check_samples(find_samples(manifest, root), manifest)
    assert problem.message == "2 values are not finite, the first at (3, 4)"


@pytest.mark.parametrize("decode", [True, False], ids=["decoded", "headers"])
@pytest.mark.parametrize("role", ["image", "label"])
def test_truncated_file_is_named_once(
    make_pairs: MakePairs, check: Check, role: str, decode: bool
) -> None:
    root = make_pairs("a", "b")
    path = root / role / "a.png"
    path.write_bytes(path.read_bytes()[: 30 if not decode else -20])
    (problem,) = check(root, decode=decode)
    assert problem.path == f"{role}/a.png"
    assert not problem.message.startswith("/")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1], "a mask of 0/1: write labels.foreground: '> 0'"),
        ([0, 3, 255], "label values {3} found, [0, 255] allowed"),
    ],
)
def test_unknown_label_values_are_named_with_a_remedy(
    make_pairs: MakePairs, check: Check, values: list[int], message: str
) -> None:
    root = make_pairs("a", "b")
    write_png(root / "label" / "b.png", np.resize(np.uint8(values), SIZE))
    (problem,) = check(root)
    assert problem.path == "label/b.png"
    assert message in problem.message


def test_empty_field_of_view_is_a_problem(make_pairs: MakePairs) -> None:
    root = make_pairs("a")
    write_png(root / "fov" / "a.png", np.zeros(SIZE, np.uint8))
    manifest = load_manifest("vessel_pairs")
    (problem,) = check_samples(find_samples(manifest, root), manifest)
    assert (problem.path, problem.message) == ("fov/a.png", "an empty field of view")


def test_field_of_view_that_few_lack_is_a_problem_and_that_none_have_is_not(
    make_pairs: MakePairs,
) -> None:
    root = make_pairs("a", "b", "c")
    manifest = load_manifest("vessel_pairs")
    for name in "ab":
        write_png(root / "fov" / f"{name}.png", np.full(SIZE, 255, np.uint8))
    (problem,) = check_samples(find_samples(manifest, root), manifest)
    assert (problem.path, problem.message) == ("image/c.png", "no fov; 2 other images have one")


def test_copy_across_splits_is_a_problem(make_pairs: MakePairs) -> None:
    make_pairs("a", "b", split="train")
    root = make_pairs("c", split="test")
    shutil.copy(root / "train/image/a.png", root / "test/image/c.png")
    manifest = load_manifest("vessel_pairs")
    (problem,) = check_samples(find_samples(manifest, root), manifest)
    assert problem.path == "train/image/a.png"
    assert "test/image/c.png" in problem.message


def test_two_files_of_one_result_name_are_a_configuration_problem(
    make_pairs: MakePairs, manifest_content: dict[str, Any]
) -> None:
    root = make_pairs("a", "A")
    if len(list((root / "image").iterdir())) < 2:
        pytest.skip("the file system does not tell case")
    manifest = manifest_from_mapping(manifest_content)
    (problem,) = check_samples(find_samples(manifest, root), manifest)
    assert problem.code == 2
    assert "one name" in problem.message


def test_label_that_vanished_is_a_problem(
    make_pairs: MakePairs, manifest_content: dict[str, Any]
) -> None:
    manifest = manifest_from_mapping(manifest_content)
    samples = [replace(s, label=None) for s in find_samples(manifest, make_pairs("a"))]
    assert check_samples(samples, manifest)[0].message == "no label"


def test_shape_that_is_not_the_recorded_one_is_a_problem(
    make_pairs: MakePairs, manifest_content: dict[str, Any], tmp_path: Path
) -> None:
    root = make_pairs("a", "b")
    frozen = load_manifest(
        freeze(manifest_from_mapping(manifest_content), root, tmp_path / "f.yaml", folds=2)
    )
    for role in ("image", "label"):
        write_png(root / role / "a.png", np.resize(np.uint8([0, 255]), (4, 5)))
    problems = check_samples(find_samples(frozen, root), frozen)
    assert "shape (4, 5) found, (12, 16, 3) recorded in the manifest" in problems[0].message


def test_every_problem_is_found_in_one_go(make_pairs: MakePairs, check: Check) -> None:
    root = make_pairs("a", "b", "c", "d")
    (root / "image" / "a.png").write_bytes(b"no image")
    write_png(root / "label" / "b.png", np.resize(np.uint8([0, 1]), SIZE))
    write_png(root / "label" / "c.png", np.zeros((3, 3), np.uint8))
    write_png(root / "image" / "d.png", np.zeros((*SIZE, 3), np.uint8))
    assert [problem.path for problem in check(root)] == [
        "image/a.png",
        "label/b.png",
        "label/c.png",
        "image/d.png",
    ]


def test_an_image_without_label_does_not_hide_what_is_wrong_with_the_others(
    make_pairs: Any, manifest_content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_pairs("a", "b", "c")
    (root / "label" / "b.png").unlink()
    (root / "image" / "c.png").write_bytes(b"no image")
    manifest = root.parent / "tiny.yaml"
    manifest.write_text(yaml.safe_dump(manifest_content))
    assert cli.main(["data", "check", str(manifest), str(root)]) == 3
    found = capsys.readouterr()
    assert "b.png" in found.err
    assert "c.png" in found.err
    assert "2 samples, 2 problems" in found.out
