from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.folds import split_samples
from pipeline.data.freeze import freeze
from pipeline.data.manifests import Manifest, find_samples, load_manifest, manifest_from_mapping
from pipeline.errors import ConfigurationError, InputErrors

MakePairs = Callable[..., Path]


@pytest.fixture
def manifest(manifest_content: dict[str, Any]) -> Manifest:
    return manifest_from_mapping(manifest_content)


def test_frozen_manifest_finds_the_same_samples(
    make_pairs: MakePairs, manifest: Manifest, tmp_path: Path
) -> None:
    root = make_pairs("a", "b", "c", "d")
    frozen = load_manifest(freeze(manifest, root, tmp_path / "f.yaml", folds=2))
    original = find_samples(manifest, root)
    again = find_samples(frozen, root, verify=True)
    for one, other in zip(original, again, strict=True):
        assert (one.id, one.roles, one.subject, one.split) == (
            other.id,
            other.roles,
            other.subject,
            other.split,
        )
    assert {sample.fold for sample in again} == {0, 1}


def test_record_states_path_content_shape_and_type(
    make_pairs: MakePairs, manifest: Manifest, tmp_path: Path
) -> None:
    root = make_pairs("a", "b")
    content = yaml.safe_load(freeze(manifest, root, tmp_path / "f.yaml", folds=2).read_text())
    data = (root / "image" / "a.png").read_bytes()
    assert content["records"][0]["files"]["image"] == {
        "path": "image/a.png",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "shape": [12, 16, 3],
        "dtype": "uint8",
    }
    assert str(tmp_path) not in (tmp_path / "f.yaml").read_text()


def test_recorded_folds_are_used_as_they_are(
    make_pairs: MakePairs, manifest: Manifest, tmp_path: Path
) -> None:
    root = make_pairs(*"abcdef")
    frozen = load_manifest(freeze(manifest, root, tmp_path / "f.yaml", folds=3, seed=5))
    samples = find_samples(frozen, root)
    for fold in range(3):
        for seed in (None, 9):
            split = split_samples(samples, frozen, fold=fold, seed=seed)
            assert {sample.fold for sample in split.val} == {fold}


@pytest.mark.parametrize("change", ["content", "length"])
def test_changed_file_is_found_by_its_checksum_only_if_asked(
    make_pairs: MakePairs, manifest: Manifest, tmp_path: Path, change: str
) -> None:
    root = make_pairs("a", "b")
    frozen = load_manifest(freeze(manifest, root, tmp_path / "f.yaml", folds=2))
    path = root / "label" / "a.png"
    data = path.read_bytes()
    path.write_bytes(data + b"x" if change == "length" else data[:-1] + b"x")
    assert len(find_samples(frozen, root)) == 2
    with pytest.raises(InputErrors, match=r"label/a\.png: changed") as caught:
        find_samples(frozen, root, verify=True)
    assert len(caught.value.problems) == 1
    assert caught.value.exit_code == 3


def test_more_folds_than_subjects_are_refused(
    make_pairs: MakePairs, manifest: Manifest, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"folds\.k is 5"):
        freeze(manifest, make_pairs("a", "b"), tmp_path / "f.yaml")
    assert not (tmp_path / "f.yaml").exists()


def test_freezing_without_folds_keeps_none(
    make_pairs: MakePairs, manifest: Manifest, tmp_path: Path
) -> None:
    frozen = load_manifest(freeze(manifest, make_pairs("a"), tmp_path / "f.yaml", folds=0))
    assert not frozen.folds
    assert frozen.records[0].fold is None


def test_folds_of_a_table_are_not_dealt_anew(
    make_pairs: MakePairs, manifest_content: dict[str, Any], tmp_path: Path
) -> None:
    by_table = {"k": 3, "seed": 0, "dealt": "by_table", "table": "blocks.csv"}
    manifest = manifest_from_mapping({**manifest_content, "folds": by_table})
    root = make_pairs("a", "b", "c")
    with pytest.raises(ConfigurationError, match=r"in the table blocks.csv; freeze it without"):
        freeze(manifest, root, tmp_path / "f.yaml", folds=3)
    assert not (tmp_path / "f.yaml").exists()
    freeze(manifest, root, tmp_path / "f.yaml", folds=0)
