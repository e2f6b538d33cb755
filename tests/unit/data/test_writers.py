from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import atomic
from pipeline.data.writers import check_result_paths, result_path, write_png, write_tiff
from pipeline.errors import ConfigurationError, ResourceError

NAMES = st.text("abcÄé -_.1", min_size=1, max_size=8).filter(lambda name: name.strip(". "))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.float32),
        np.zeros((2, 3), np.int64),
        np.zeros((2, 3, 5), np.uint8),
        np.zeros((2, 3, 1), np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros(3, np.uint8),
    ],
    ids=["float", "int64", "five channels", "one channel", "empty", "one axis"],
)
def test_png_refuses_what_it_would_have_to_change(
    tmp_path: Path, array: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(ValueError, match="PNG takes"):
        write_png(tmp_path / "a.png", array)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_bool_becomes_0_and_255(tmp_path: Path, suffix: str) -> None:
    from pipeline.data.images import read_image

    mask = np.eye(4, 6, dtype=bool)
    write = {"png": write_png, "tif": write_tiff}[suffix]
    np.testing.assert_array_equal(read_image(write(tmp_path / f"a.{suffix}", mask)), mask * 255)


def test_tiff_states_its_axes_and_is_compressed(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.zeros((4, 60, 50), np.float32))
    with tifffile.TiffFile(path) as tiff:
        assert tiff.series[0].axes == "ZYX"
        assert len(tiff.pages) == 4
    assert path.stat().st_size < 4 * 60 * 50 * 4 / 10


def test_tiff_refuses_other_axes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TIFF takes"):
        write_tiff(tmp_path / "a.tif", np.zeros((2, 2, 2, 2), np.uint8))


@pytest.mark.parametrize("write", [write_png, write_tiff])
def test_full_disk_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"a\.png: cannot be written: No space left"):
        write(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    assert list(tmp_path.iterdir()) == []


@given(folders=st.lists(NAMES, max_size=3), name=NAMES)
def test_result_keeps_the_folders_and_stays_below_the_output(folders: list[str], name: str) -> None:
    source = Path("root", *folders, f"{name}.png")
    result = result_path(source, "root", "out", "_vessels.png")
    assert result == Path("out", *folders, f"{name}_vessels.png")


def test_equal_names_in_different_folders_do_not_collide() -> None:
    sources = ["in/A/scan.ppm.gz", "in/B/scan.ppm.gz", "in/scan.ppm.gz"]
    check_result_paths(sources, "in")
    assert len({result_path(source, "in", "out", ".png") for source in sources}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [("in/a.png", "in/a.tif"), ("in/a.png", "in/a.png.gz"), ("in/a.png", "in/A.png")],
    ids=["suffix", "gzip", "case"],
)
def test_results_of_one_name_are_refused_with_both_inputs_named(one: str, other: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_result_paths([one, "in/b.png", other], "in")
    assert f"{one} and {other}" in str(caught.value)
    assert "in/b.png" not in str(caught.value)


def test_one_input_named_twice_is_no_clash() -> None:
    check_result_paths(["in/a.png", "in/a.png"], "in")


@pytest.mark.parametrize("source", ["elsewhere/a.png", "in/../a.png", "in/../../a.png"])
def test_input_outside_the_root_is_refused(source: str) -> None:
    with pytest.raises(ConfigurationError, match="not below in"):
        result_path(source, "in", "out", ".png")


def test_windows_reserved_names_are_kept() -> None:
    assert result_path("in/aux.png", "in", "out", "_vessels.png") == Path("out/aux_vessels.png")
