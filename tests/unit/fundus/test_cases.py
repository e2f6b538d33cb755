from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.data.freeze import freeze
from pipeline.data.images import read_image
from pipeline.data.manifests import load_manifest
from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError, InputErrors
from pipeline.fundus.cases import training_cases
from pipeline.fundus.phantom import write_phantom_dataset

IMAGE = "train/image/phantom_000.png"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(write_phantom_dataset(tmp_path / "data", {"train": 2, "val": 1}, size_px=96))


def train_count(data: Path, manifest: str = "vessel_pairs", **settings: bool) -> int:
    return len(training_cases(str(data), manifest, "unused", **settings).train)


def test_a_file_that_is_not_the_recorded_one_is_trained_on_only_where_allowed(data: Path) -> None:
    frozen = str(freeze(load_manifest("vessel_pairs"), data, data.with_name("f.yaml"), folds=2))
    assert train_count(data, frozen) == 2
    pixels = read_image(data / IMAGE).copy()
    pixels[40, 40] ^= 1
    write_png(data / IMAGE, pixels)
    with pytest.raises(InputErrors, match=rf"verify: false .*{IMAGE}: changed"):
        train_count(data, frozen)
    assert train_count(data, frozen, verify=False) == 2


def test_a_link_out_of_the_folder_is_trained_on_only_where_allowed(data: Path) -> None:
    outside = shutil.move(data / IMAGE, data.with_name("outside.png"))
    (data / IMAGE).symlink_to(outside)
    with pytest.raises(ConfigurationError, match="follow_symlinks"):
        train_count(data)
    assert train_count(data, follow_symlinks=True) == 2
