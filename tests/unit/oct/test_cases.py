from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import InputErrors
from pipeline.oct.cases import training_cases
from pipeline.oct.phantom import write_phantom_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"train": 4, "val": 1, "test": 1}
    root = tmp_path_factory.mktemp("oct") / "data"
    return write_phantom_dataset(root, counts, bscans=2, size_px=(128, 160))


def found(folder: Path | None, **settings: object) -> object:
    return training_cases(None if folder is None else str(folder), "oct_hdf5", "unused", **settings)


def test_a_case_is_a_bscan_with_its_place_in_the_file(folder: Path) -> None:
    cases = found(folder)
    assert [len(side) for side in (cases.train, cases.val, cases.test)] == [16, 4, 4]
    first = cases.train[0]
    assert first["image"] == first["label"] == str(folder / "train.h5")
    assert [case["index"] for case in cases.train] == list(range(16))
    names = [case["name"] for side in (cases.train, cases.val, cases.test) for case in side]
    assert len(set(names)) == 24


@pytest.mark.parametrize("fold", range(5))
def test_people_of_one_file_are_never_separated(folder: Path, fold: int) -> None:
    cases = found(folder, fold=fold)
    train, val, test = ({c["subject"] for c in s} for s in (cases.train, cases.val, cases.test))
    assert train
    assert val
    assert not (train & val) | (train & test) | (val & test)


def test_a_bscan_that_nobody_annotated_has_no_label(folder: Path, tmp_path: Path) -> None:
    data = write_phantom_dataset(
        tmp_path / "data", {"train": 2, "val": 1}, bscans=1, size_px=(128, 160)
    )
    with h5py.File(data / "train.h5", "r+") as file:
        file["layers/BM"][1] = np.nan
    labelled = [case["label"] is not None for case in found(data).train]
    assert labelled == [True, False, True, True]


def test_every_bad_file_is_listed(folder: Path, tmp_path: Path) -> None:
    for name in ("one.h5", "two.h5"):
        (tmp_path / name).write_bytes((folder / "train.h5").read_bytes()[:500])
    with h5py.File(tmp_path / "three.h5", "w") as file:
        file["images"] = np.zeros((1, 64, 64), np.uint8)
        file["layers/ILM"] = np.full((1, 64), 10.0)
    with pytest.raises(InputErrors) as caught:
        found(tmp_path)
    assert [problem.path for problem in caught.value.problems] == ["one.h5", "three.h5", "two.h5"]
    assert "no rows of BM" in str(caught.value)


def test_without_a_data_folder_the_phantom_is_drawn_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(directory: Path, seed: int) -> Path:
        counts = {"train": 1, "val": 1}
        return write_phantom_dataset(directory, counts, bscans=1, size_px=(128, 160), seed=seed)

    monkeypatch.setattr("pipeline.oct.cases.write_phantom_dataset", small)
    cases = training_cases(None, "octlayers", str(tmp_path / "phantom"))
    assert "PHANTOM" in cases.facts[0]
    assert len(cases.train) == len(cases.val) == 2
