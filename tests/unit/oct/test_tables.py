from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.oct.heyex_vol import FIRST_BSCAN_NOTES, read_vol, write_vol
from pipeline.oct.tables import (
    etdrs_grid,
    etdrs_means,
    thickness_um,
    write_etdrs,
    write_rows,
    write_thickness,
)
from pipeline.oct.volume import OctVolume

N, H, W = 61, 40, 96
SCALE_Y, SCALE_X, SPACING = 4.0, 70.0, 110.0  # 6.72 mm wide, 6.71 mm high


@dataclass(frozen=True)
class Rows:
    ilm_px: NDArray[np.floating]
    bm_px: NDArray[np.floating]
    ilm_sigma_px: NDArray[np.floating]
    bm_sigma_px: NDArray[np.floating]
    ilm_valid: NDArray[np.bool_]
    bm_valid: NDArray[np.bool_]


def rows(
    thickness_px: float | NDArray[np.floating] = 20.0, shape: tuple[int, int] = (N, W)
) -> Rows:
    ilm = np.full(shape, 5.25)
    valid = np.ones(shape, bool)
    sigma = np.full(shape, 0.5)
    return Rows(ilm, ilm + thickness_px, sigma, 2 * sigma, valid, valid.copy())


def volume(shape: tuple[int, int, int] = (N, H, W), **facts: Any) -> OctVolume:
    known: dict[str, Any] = {
        "path": Path("eye.vol"),
        "source_format": "vol",
        "bscans": np.zeros(shape, np.uint8),
        "layers": {},
        "names": [f"eye_{k}" for k in range(shape[0])],
        "subjects": [""] * shape[0],
        "white": 255.0,
        "scale_x_um": SCALE_X,
        "scale_y_um": SCALE_Y,
        "spacing_um": SPACING,
        "laterality": "OD",
        "scan_pattern": "volume",
        "notes": (FIRST_BSCAN_NOTES["superior"],),
    }
    return OctVolume(**{**known, **facts})


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_table_has_a_line_per_bscan_and_column_in_order(tmp_path: Path) -> None:
    small = volume((2, H, 3))
    found = lines(write_rows(tmp_path / "a.csv", small, rows(shape=(2, 3))))
    assert [(row["bscan"], row["name"], row["column"]) for row in found] == [
        (str(k), f"eye_{k}", str(x)) for k in range(2) for x in range(3)
    ]
    first = found[0]
    assert (first["ILM_px"], first["BM_px"], first["thickness_px"]) == ("5.250", "25.250", "20.000")
    assert (first["ILM_um"], first["BM_um"], first["thickness_um"]) == ("21.00", "101.00", "80.00")
    assert (first["ILM_sigma_px"], first["BM_sigma_px"]) == ("0.500", "1.000")
    assert (first["ILM_valid"], first["BM_valid"]) == ("1", "1")
    assert "ILM_truth_px" not in first


def test_rows_that_are_not_valid_are_empty_and_never_a_number(tmp_path: Path) -> None:
    given = rows(shape=(1, 4))
    given.ilm_valid[0, 1] = False
    given.bm_valid[0, 2] = False
    found = lines(write_rows(tmp_path / "a.csv", volume((1, H, 4)), given))
    assert [row["ILM_px"] == "" for row in found] == [False, True, False, False]
    assert [row["BM_um"] == "" for row in found] == [False, False, True, False]
    assert [row["thickness_um"] == "" for row in found] == [False, True, True, False]
    assert [row["ILM_valid"] for row in found] == ["1", "0", "1", "1"]


def test_without_a_scale_there_are_no_micrometres(tmp_path: Path) -> None:
    plain = volume((1, H, 4), scale_y_um=None)
    found = lines(write_rows(tmp_path / "a.csv", plain, rows(shape=(1, 4))))
    assert {row["thickness_um"] for row in found} == {""}
    assert {row["thickness_px"] for row in found} == {"20.000"}
    assert thickness_um(plain, rows(shape=(1, 4))) is None
    assert write_thickness(tmp_path / "t.csv", plain, rows(shape=(1, 4))) is None
    assert write_etdrs(tmp_path / "e.csv", volume(scale_y_um=None), rows()) is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_annotated_rows_stand_beside_the_predicted(tmp_path: Path) -> None:
    truth = {"ILM": np.array([[4.5, np.nan]]), "BM": np.array([[30.0, 31.0]])}
    found = lines(
        write_rows(tmp_path / "a.csv", volume((1, H, 2), layers=truth), rows(shape=(1, 2)))
    )
    assert [row["ILM_truth_px"] for row in found] == ["4.500", ""]
    assert [row["BM_truth_px"] for row in found] == ["30.000", "31.000"]


def test_rows_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the volume has"):
        write_rows(tmp_path / "a.csv", volume((1, H, 4)), rows(shape=(1, 5)))
    assert list(tmp_path.iterdir()) == []


def test_the_sectors_are_disjoint_and_cover_the_disc_of_six_millimetres() -> None:
    grid = etdrs_grid(volume())
    assert grid is not None
    assert len(grid.sectors) == 9
    count = np.sum(list(grid.sectors.values()), axis=0)
    x = (np.arange(W) - (W - 1) / 2) * SCALE_X / 1000
    y = (np.arange(N) - (N - 1) / 2) * SPACING / 1000
    np.testing.assert_array_equal(count, np.hypot(x[None], y[:, None]) <= 3)


def test_the_areas_of_the_sectors_are_those_of_the_circles() -> None:
    grid = etdrs_grid(volume())
    assert grid is not None
    areas = {name: mask.sum() * SCALE_X * SPACING / 1e6 for name, mask in grid.sectors.items()}
    assert areas["centre"] == pytest.approx(math.pi / 4, rel=0.05)
    inner = sum(area for name, area in areas.items() if name.startswith("inner"))
    assert inner == pytest.approx(math.pi * 2, rel=0.02)
    assert sum(areas.values()) == pytest.approx(math.pi * 9, rel=0.01)
    assert min(grid.inside.values()) > 0.95


def test_the_mean_of_one_thickness_is_that_thickness() -> None:
    thickness = thickness_um(volume(), rows(62.5))
    assert thickness is not None
    means = etdrs_means(volume(), thickness)
    assert {row["thickness_um"] for row in means} == {250.0}
    assert {row["valid_fraction"] for row in means} == {1.0}
    assert all("not the fovea" in row["grid_centre"] for row in means)


def side_of_the_thick_half(axis: int, **facts: Any) -> str:
    """Return the name of the inner sector towards the end of an axis, where alone it is thick."""
    thickness = np.full((N, W), 200.0)
    if axis == 1:
        thickness[:, W // 2 + 8 :] = 400
    else:
        thickness[N // 2 + 6 :] = 400
    means = etdrs_means(volume(**facts), thickness)
    inner = {row["sector"]: row["thickness_um"] for row in means if "inner" in row["sector"]}
    return max(inner, key=lambda name: inner[name]).removeprefix("inner_")


@pytest.mark.parametrize(
    ("laterality", "side"), [("OD", "nasal"), ("OS", "temporal"), (None, "right")]
)
def test_the_right_of_the_image_is_nasal_in_a_right_eye_only(
    laterality: str | None, side: str
) -> None:
    assert side_of_the_thick_half(1, laterality=laterality) == side


@pytest.mark.parametrize(
    ("notes", "side"),
    [
        ((FIRST_BSCAN_NOTES["superior"],), "inferior"),
        ((FIRST_BSCAN_NOTES["inferior"],), "superior"),
        ((), "last"),
    ],
)
def test_the_last_bscan_is_where_the_file_says(notes: tuple[str, ...], side: str) -> None:
    assert side_of_the_thick_half(0, notes=notes) == side


@pytest.mark.parametrize("first", ["superior", "inferior"])
def test_what_a_vol_file_says_of_its_order_reaches_the_grid(tmp_path: Path, first: str) -> None:
    path = write_vol(
        tmp_path / "a.vol",
        np.zeros((N, 4, W)),
        scale_x_um=SCALE_X,
        spacing_um=SPACING,
        first_bscan=first,
    )
    grid = etdrs_grid(read_vol(path))
    assert grid is not None
    assert grid.sectors[f"outer_{first}"][: N // 3].any()
    assert not grid.sectors[f"outer_{first}"][N // 2 :].any()


def test_columns_that_are_not_valid_do_not_count_in_the_mean() -> None:
    thickness = np.full((N, W), 300.0)
    thickness[:, : W // 2] = np.nan
    means = {row["sector"]: row for row in etdrs_means(volume(), thickness)}
    assert means["centre"]["thickness_um"] == 300
    assert means["centre"]["valid_fraction"] == pytest.approx(0.5, abs=0.02)
    assert math.isnan(means["outer_temporal"]["thickness_um"])
    assert means["outer_temporal"]["valid_fraction"] == 0


def test_a_scan_smaller_than_the_grid_says_how_much_is_missing() -> None:
    narrow = volume((N, H, W // 2))
    grid = etdrs_grid(narrow)
    assert grid is not None
    assert grid.inside["inner_nasal"] > 0.95
    assert grid.inside["outer_nasal"] < 0.25


@pytest.mark.parametrize(
    "facts",
    [
        {"spacing_um": None},
        {"scale_x_um": None},
        {"scan_pattern": "circle"},
        {"scan_pattern": "line"},
    ],
)
def test_without_known_distances_there_is_no_grid(tmp_path: Path, facts: dict[str, Any]) -> None:
    assert etdrs_grid(volume(**facts)) is None
    assert write_etdrs(tmp_path / "e.csv", volume(**facts), rows()) is None
    assert list(tmp_path.iterdir()) == []


def test_one_bscan_has_no_grid() -> None:
    assert etdrs_grid(volume((1, H, W))) is None


def test_the_means_are_written_with_empty_cells_where_there_is_none(tmp_path: Path) -> None:
    given = rows()
    given = replace(given, bm_valid=np.zeros((N, W), bool))
    path = write_etdrs(tmp_path / "e.csv", volume(), given)
    assert path is not None
    found = lines(path)
    assert len(found) == 9
    assert {row["thickness_um"] for row in found} == {""}
    assert {row["valid_fraction"] for row in found} == {"0.0"}


def test_the_map_is_a_line_per_bscan(tmp_path: Path) -> None:
    given = rows(np.linspace(10, 20, W)[None])
    given.ilm_valid[3, 7] = False
    path = write_thickness(tmp_path / "t.csv", volume(), given)
    assert path is not None
    found = lines(path)
    assert [row["name"] for row in found] == [f"eye_{k}" for k in range(N)]
    values = [found[0][str(x)] for x in range(W)]
    np.testing.assert_allclose([float(v) for v in values], np.linspace(40, 80, W), atol=0.006)
    assert found[3]["7"] == ""
