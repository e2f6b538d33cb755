"""Bad input stops a training before it starts: one line that names the file, and the right code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.fundus.phantom import write_phantom_dataset

IMAGE = "train/image/phantom_001.png"
LABEL = "train/label/phantom_001.png"


@pytest.fixture(scope="session")
def sound_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fundus") / "data"
    return write_phantom_dataset(folder, {"train": 3, "val": 1, "test": 1}, size_px=96)


@pytest.fixture
def data(sound_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_data, tmp_path / "data"))


def _missing_mask(data: Path) -> None:
    (data / LABEL).unlink()


def _another_size(data: Path) -> None:
    Image.fromarray(np.asarray(Image.open(data / LABEL))[:90]).save(data / LABEL)


def _truncated(data: Path) -> None:
    (data / IMAGE).write_bytes((data / IMAGE).read_bytes()[:2000])


def _unknown_ids(data: Path) -> None:
    label = np.asarray(Image.open(data / LABEL)).copy()
    label[:20, :20], label[30:50, 30:50] = 77, 140
    Image.fromarray(label).save(data / LABEL)


def _empty_folder(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def _outside(data: Path) -> None:
    outside = data.parent / "outside.png"
    shutil.move(data / IMAGE, outside)
    (data / IMAGE).symlink_to(outside)


def _two_of_one_name(data: Path) -> None:
    Image.open(data / IMAGE).save((data / IMAGE).with_suffix(".tif"))


def _copy_in_validation(data: Path) -> None:
    for role in ("image", "label", "fov"):
        shutil.copy(data / f"train/{role}/phantom_001.png", data / f"val/{role}/copy.png")


FAULTS = [
    (_missing_mask, 3, f"{IMAGE}: no label"),
    (_another_size, 3, f"{LABEL}: 96x90 pixels, but its image {IMAGE} has 96x96"),
    (_truncated, 3, f"{IMAGE}: cut short"),
    (_unknown_ids, 3, f"{LABEL}: values {{0, 77, 140, 255}} are no mask"),
    (_empty_folder, 3, "no files matching image/{name}{_ext} or"),
    (_outside, 2, f"{IMAGE}: a link that leaves dataset_dir"),
    (_two_of_one_name, 2, f"{IMAGE} and train/image/phantom_001.tif claim the same place"),
    (_copy_in_validation, 3, f"{IMAGE}: the same image as val/image/copy.png"),
]


@pytest.mark.parametrize(
    ("spoil", "code", "message"), FAULTS, ids=[fault[0].__name__.strip("_") for fault in FAULTS]
)
def test_training_refuses_before_it_starts(
    data: Path,
    spoil: Callable[[Path], None],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(data)
    output = data.parent / "run"
    arguments = ["--dataset_dir", str(data), "--output_dir", str(output), "--max_epochs", "1"]
    assert main(["train", "fundus_vessels", *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (output / "checkpoints").exists()


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_inference_takes_a_photograph_with_alpha_or_in_grey(data: Path, mode: str) -> None:
    from pipeline.fundus.transforms import LoadFundusd

    Image.open(data / IMAGE).convert(mode).save(data / IMAGE)
    assert LoadFundusd()({"image": str(data / IMAGE)})["image"].shape[0] == 3


def test_every_depth_gives_the_same_photograph(data: Path) -> None:
    from pipeline.data.photographs import rgb_photograph

    pixels = np.asarray(Image.open(data / IMAGE))
    expected = rgb_photograph(pixels)
    np.testing.assert_array_equal(rgb_photograph(pixels.astype(np.uint16) * 257), expected)
    np.testing.assert_array_equal(rgb_photograph(expected), expected)
