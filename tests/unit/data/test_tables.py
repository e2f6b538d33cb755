from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold

from pipeline.data.folds import deal_as_sklearn, split_samples
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.writers import write_tiff
from pipeline.errors import ConfigurationError, InputError, InputErrors


def write_scrolls(root: Path, scrolls: dict[str, str], table: str | None = None) -> Path:
    for number, name in enumerate(scrolls):
        write_tiff(root / "train_images" / f"{name}.tif", np.full((2, 4, 4), number, np.uint8))
        write_tiff(root / "train_labels" / f"{name}.tif", np.zeros((2, 4, 4), np.uint8))
    rows = [f"{name},{scroll}" for name, scroll in scrolls.items()]
    text = "\n".join(["id,scroll_id", *rows]) if table is None else table
    (root / "train.csv").write_text(text, encoding="utf-8")
    return root


SCROLLS = {f"{number}": f"s{number % 3}" for number in range(100, 109)}


def samples(root: Path, name: str = "vesuvius_surface") -> list[Any]:
    return find_samples(load_manifest(name), root)


def test_a_table_says_whose_a_sample_is(tmp_path: Path) -> None:
    found = samples(write_scrolls(tmp_path, SCROLLS))
    assert {sample.image.stem: sample.subject for sample in found} == SCROLLS
    assert {sample.stratum for sample in found} == {"s0", "s1", "s2"}


def test_a_split_keeps_a_scroll_on_one_side(tmp_path: Path) -> None:
    split = split_samples(
        samples(write_scrolls(tmp_path, SCROLLS)), load_manifest("vesuvius_surface")
    )
    sides = [{sample.subject for sample in side} for side in (split.train, split.val)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_without_its_table_every_volume_is_a_scroll_of_its_own(tmp_path: Path) -> None:
    root = write_scrolls(tmp_path, SCROLLS)
    (root / "train.csv").unlink()
    assert {sample.subject for sample in samples(root)} == set(SCROLLS)


def test_a_training_sample_that_the_table_does_not_know_is_listed(tmp_path: Path) -> None:
    root = write_scrolls(tmp_path, SCROLLS, table="id,scroll_id\n100,s0\n")
    with pytest.raises(InputErrors) as caught:
        samples(root)
    assert len(caught.value.problems) == len(SCROLLS) - 1
    assert "id '101' is not in train.csv; add its row" in str(caught.value.problems)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,scroll\n100,s0\n", "no column scroll_id; found id, scroll"),
        ("", "no column id, scroll_id; found an empty file"),
        ("id,scroll_id\n100,s0\n100,s1\n", "id '100' stands twice"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        samples(write_scrolls(tmp_path, SCROLLS, table))


@pytest.mark.parametrize(("count", "k", "seed"), [(786, 5, 42), (23, 4, 0), (5, 5, 7)])
def test_folds_can_be_dealt_as_scikit_learn_does(count: int, k: int, seed: int) -> None:
    ids = [f"{number:04d}" for number in range(count)]
    folds = deal_as_sklearn(ids, k, seed)
    for fold, (_, chosen) in enumerate(KFold(k, shuffle=True, random_state=seed).split(ids)):
        assert sorted(name for name in ids if folds[name] == fold) == [
            ids[i] for i in sorted(chosen)
        ]


def test_the_original_projects_folds_hold_158_then_157_of_786_volumes() -> None:
    folds = deal_as_sklearn([f"{number:04d}" for number in range(786)], 5, 42)
    assert [list(folds.values()).count(fold) for fold in range(5)] == [158, 157, 157, 157, 157]


def test_more_folds_than_samples_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"folds\.k is 5"):
        deal_as_sklearn(["a", "b"], 5, 0)


def test_random_folds_part_the_volumes_of_a_scroll(tmp_path: Path) -> None:
    manifest = load_manifest("vesuvius_surface_random")
    split = split_samples(
        samples(write_scrolls(tmp_path, SCROLLS), manifest.name), manifest, fold=0
    )
    ids = sorted(SCROLLS)
    expected = next(iter(KFold(5, shuffle=True, random_state=42).split(ids)))[1]
    assert sorted(sample.image.stem for sample in split.val) == [ids[i] for i in sorted(expected)]
