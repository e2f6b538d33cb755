"""The public datasets themselves, where $LAMINA_DATA has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.folds import split_samples
from pipeline.data.freeze import freeze
from pipeline.data.guess import guess_manifest
from pipeline.data.images import read_image
from pipeline.data.integrity import check_samples
from pipeline.data.labels import read_label, read_mask
from pipeline.data.manifests import find_samples, load_manifest

Dataset = Callable[[str], Path]


@pytest.fixture
def dataset(lamina_data: Path) -> Dataset:
    def folder(name: str) -> Path:
        path = lamina_data / "fundus" / name.upper()
        if not path.is_dir():
            pytest.skip(f"{path} is not there")
        return path

    return folder


@pytest.mark.parametrize("name", ["drive", "stare"])
def test_public_data_have_no_problem(dataset: Dataset, name: str) -> None:
    manifest = load_manifest(name)
    samples = find_samples(manifest, dataset(name))
    assert len(samples) == 20
    assert check_samples(samples, manifest) == []


def test_drive_is_cut_as_its_manifest_says(dataset: Dataset) -> None:
    manifest = load_manifest("drive")
    split = split_samples(find_samples(manifest, dataset("drive")), manifest)
    assert [sample.subject for sample in split.val] == ["37", "38", "39", "40"]
    assert [sample.subject for sample in split.train] == [str(n) for n in range(21, 37)]


def test_stare_has_two_observers_and_is_there_to_be_evaluated(dataset: Dataset) -> None:
    manifest = load_manifest("stare")
    samples = find_samples(manifest, dataset("stare"))
    split = split_samples(samples, manifest)
    assert [len(side) for side in (split.train, split.val, split.test)] == [0, 0, 20]
    for sample in samples[:3]:
        assert sample.label is not None
        assert sample.observer2 is not None
        first, second = (read_label(path) for path in (sample.label, sample.observer2))
        overlap = 2 * (first & second).sum() / (int(first.sum()) + int(second.sum()))
        assert 0.5 < overlap < 0.95
    fold = split_samples(samples, manifest, fold=3)
    assert [len(side) for side in (fold.train, fold.val, fold.test)] == [18, 2, 0]


@pytest.mark.parametrize("name", ["drive", "stare"])
def test_intensity_in_the_manifest_is_what_the_images_have(dataset: Dataset, name: str) -> None:
    manifest = load_manifest(name)
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for sample in find_samples(manifest, dataset(name)):
        assert sample.fov is not None
        image = read_image(sample.image)
        assert image.shape == (manifest.image["height"], manifest.image["width"], 3)
        inside = image[read_mask(sample.fov)] / 255
        count, total = count + len(inside), total + inside.sum(0)
        squares += (inside**2).sum(0)
    mean = total / count
    np.testing.assert_allclose(mean, manifest.intensity["mean"], atol=6e-5)
    std = np.sqrt(squares / count - mean**2)
    np.testing.assert_allclose(std, manifest.intensity["std"], atol=6e-5)


@pytest.mark.parametrize("name", ["drive", "stare"])
def test_layout_is_recognised_and_frozen(dataset: Dataset, name: str, tmp_path: Path) -> None:
    root = dataset(name)
    assert guess_manifest(root)["name"] == name
    frozen = load_manifest(freeze(load_manifest(name), root, tmp_path / "frozen.yaml", folds=4))
    assert len(find_samples(frozen, root, verify=True)) == 20
