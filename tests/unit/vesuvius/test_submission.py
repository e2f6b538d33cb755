from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pipeline.data.writers import write_tiff
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.batch import BatchRun
from pipeline.vesuvius.submission import (
    check_submission,
    check_submission_ids,
    write_submission,
)

SHAPES = {"a/one.tif": (4, 5, 6), "b/two.tif": (3, 7, 5)}


def mask_of(name: str) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(len(name)).random(SHAPES[name]) < 0.3).astype(np.uint8)


def finished_run(folder: Path, reject: str = "", streamed: str = "") -> BatchRun:
    """A run that wrote a mask for each of its inputs but those rejected or streamed."""
    cases = []
    for name, shape in SHAPES.items():
        path = write_tiff(folder / "in" / name, np.zeros(shape, np.uint8))
        cases.append({"name": name, "image": str(path)})
    batch = BatchRun(cases, str(folder / "out"), {}, None, "vesuvius_surface")

    def work() -> None:
        for case in batch.pending:
            name = case["name"]
            with batch.attempt(name):
                if name == reject:
                    raise InputError("spoiled")
                batch.begin({name: batch.origins(case)})
                path = batch.path(name, "_surface.zarr" if name == streamed else ".tif")
                write_tiff(path, mask_of(name))
                batch.record(name, [path], {}, {"shape": list(SHAPES[name])})

    batch.run(work)
    return batch


def test_a_submission_holds_the_mask_of_every_volume(tmp_path: Path) -> None:
    path = write_submission(finished_run(tmp_path))
    assert path == tmp_path / "out" / "submission.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["one.tif", "two.tif"]
        archive.extractall(tmp_path / "back")
    for name in SHAPES:
        found = tifffile.imread(tmp_path / "back" / Path(name).name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, mask_of(name))


def test_the_same_masks_make_the_same_bytes(tmp_path: Path) -> None:
    paths = [write_submission(finished_run(tmp_path / name)) for name in "ab"]
    first, second = (path.read_bytes() for path in paths if path is not None)
    assert first == second


@pytest.mark.parametrize("left_out", ["reject", "streamed"])
def test_what_has_no_mask_is_left_out_and_said(
    tmp_path: Path, left_out: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_submission(finished_run(tmp_path, **{left_out: "a/one.tif"}))
    assert path is not None
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["two.tif"]
    assert any(record.getMessage().startswith("submission: ") for record in caplog.records)


def test_without_a_sound_volume_nothing_is_written(tmp_path: Path) -> None:
    batch = finished_run(tmp_path)
    batch.rows.clear()
    assert write_submission(batch) is None
    assert not (tmp_path / "out" / "submission.zip").exists()


def test_what_is_not_asked_for_is_not_written(tmp_path: Path) -> None:
    assert write_submission(finished_run(tmp_path), enabled=False) is None
    assert not (tmp_path / "out" / "submission.zip").exists()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 5, 7), np.uint8), np.zeros((4, 5, 6), np.uint16), np.full((4, 5, 6), 255, "u1")],
    ids=["shape", "type", "values"],
)
def test_a_mask_that_is_not_what_its_sidecar_says_makes_no_submission(
    tmp_path: Path, wrong: np.ndarray[Any, Any]
) -> None:
    batch = finished_run(tmp_path)
    write_tiff(batch.path("a/one.tif", ".tif"), wrong)
    with pytest.raises(InputError, match=r"one\.tif is .* expected \(4, 5, 6\) of uint8"):
        write_submission(batch)
    assert [path.name for path in (tmp_path / "out").glob("*.zip")] == []


def test_a_mask_cut_short_makes_no_submission(tmp_path: Path) -> None:
    batch = finished_run(tmp_path)
    path = batch.path("b/two.tif", ".tif")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"two\.tif"):
        write_submission(batch)


def test_a_missing_volume_is_named(tmp_path: Path) -> None:
    path = write_submission(finished_run(tmp_path))
    assert path is not None
    with pytest.raises(InputError, match=r"missing or unasked for: three\.tif"):
        check_submission(path, {"one": (4, 5, 6), "two": (3, 7, 5), "three": (1, 1, 1)})


def test_two_volumes_of_one_id_are_refused_before_any_work() -> None:
    cases = [{"name": name} for name in ("a/one.tif", "b/one.tiff", "two.tif")]
    with pytest.raises(ConfigurationError, match=r"one: a/one\.tif and b/one\.tiff; rename"):
        check_submission_ids(cases)
    check_submission_ids(cases, enabled=False)
    check_submission_ids(cases[1:])
