"""Rows and retinal thickness as tables: a line per column, and the means of an ETDRS grid."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path, write_csv
from pipeline.oct.heyex_vol import FIRST_BSCAN_NOTES
from pipeline.oct.prediction_rows import PredictedRows
from pipeline.oct.volume import OctVolume

__all__ = [
    "ETDRS_RADII_MM",
    "EtdrsGrid",
    "etdrs_grid",
    "etdrs_means",
    "thickness_um",
    "write_etdrs",
    "write_rows",
    "write_thickness",
]

ETDRS_RADII_MM = (0.5, 1.5, 3.0)  # circles of 1, 3 and 6 mm
CENTRE = "centre of the scan, not the fovea"

_UNKNOWN_SIDES = {"up": "first", "down": "last", "right": "right", "left": "left"}
_RINGS = ("inner", "outer")
_QUARTERS = ("right", "up", "left", "down")  # in steps of 90 degrees against the clock


@dataclass(frozen=True)
class EtdrsGrid:
    """Where the A-scans of a volume lie on the retina.

    Attributes:
        sectors: name -> mask `(N, W)` of the A-scans in it.
        inside: name -> fraction of the sector's area that the scan covers.
    """

    sectors: dict[str, NDArray[np.bool_]]
    inside: dict[str, float]


def thickness_um(volume: OctVolume, rows: PredictedRows) -> NDArray[np.float64] | None:
    """Return the retinal thickness `(N, W)`, NaN where ILM or BM is not valid.

    None where the volume does not know the height of a pixel.
    """
    if volume.scale_y_um is None:
        return None
    both = rows.ilm_valid & rows.bm_valid
    thickness = np.asarray(rows.bm_px, np.float64) - rows.ilm_px
    return np.where(both, thickness * volume.scale_y_um, np.nan)


def write_rows(path: Path | str, volume: OctVolume, rows: PredictedRows) -> Path:
    """Write a CSV with a line per B-scan and column, atomically.

    Rows count from 0 at the top of the original image, in px and, where the scale is known, in
    micrometres; they, and the thickness, are empty where they are not valid. Annotated rows of
    `volume` stand beside them as `ILM_truth_px` and `BM_truth_px`.

    Args:
        path: the file.
        volume: whose rows they are.
        rows: predicted ones, `(N, W)`.

    Returns:
        The path.

    Raises:
        ValueError: `rows` are not of the volume's size.
    """
    count, _, width = volume.bscans.shape
    if np.shape(rows.ilm_px) != (count, width) or np.shape(rows.bm_px) != (count, width):
        raise ValueError(f"rows are {np.shape(rows.ilm_px)}, the volume has {(count, width)}")
    header, columns = _columns(volume, rows)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bscan", "name", "column", *header])
        for number in range(count):
            texts = [_texts(values[number], digits) for values, digits in columns]
            lines = zip(range(width), *texts, strict=True)
            writer.writerows((number, volume.names[number], *line) for line in lines)
    return Path(path)


def _columns(
    volume: OctVolume, rows: PredictedRows
) -> tuple[list[str], list[tuple[NDArray[Any], int]]]:
    """Return the names of the measured columns, and of each its values `(N, W)` and digits."""
    valid = {"ILM": np.asarray(rows.ilm_valid), "BM": np.asarray(rows.bm_valid)}
    found = {"ILM": np.asarray(rows.ilm_px, np.float64), "BM": np.asarray(rows.bm_px, np.float64)}
    sigma = {"ILM": np.asarray(rows.ilm_sigma_px), "BM": np.asarray(rows.bm_sigma_px)}
    kept = {name: np.where(valid[name], found[name], np.nan) for name in found}
    kept["thickness"] = kept["BM"] - kept["ILM"]
    scale = math.nan if volume.scale_y_um is None else volume.scale_y_um
    columns: dict[str, tuple[NDArray[Any], int]] = {}
    for name, values in kept.items():
        columns |= {f"{name}_px": (values, 3), f"{name}_um": (values * scale, 2)}
    columns |= {f"{name}_sigma_px": (values, 3) for name, values in sigma.items()}
    columns |= {f"{name}_valid": (values.astype(int), 0) for name, values in valid.items()}
    for name in found:
        if name in volume.layers:
            columns[f"{name}_truth_px"] = (np.asarray(volume.layers[name]), 3)
    return list(columns), list(columns.values())


def _texts(values: NDArray[Any], digits: int) -> list[str]:
    """Return numbers as text, nothing where there is none."""
    return [f"{value:.{digits}f}" if math.isfinite(value) else "" for value in values.tolist()]


def etdrs_grid(volume: OctVolume) -> EtdrsGrid | None:
    """Return the nine sectors of the ETDRS grid around the centre of a volume.

    Circles of 1, 3 and 6 mm, the rings cut along the diagonals. Sectors are called nasal and
    temporal where the laterality is known, else left and right of the image; superior and inferior
    where the volume's notes say at which end its B-scans begin, else by the first and last B-scan.

    Returns:
        None where the B-scans are no raster with known distances.
    """
    count, _, width = volume.bscans.shape
    if count < 2 or volume.scan_pattern in ("line", "circle"):
        return None
    if volume.scale_x_um is None or volume.spacing_um is None:
        return None
    x_mm = (np.arange(width) - (width - 1) / 2) * volume.scale_x_um / 1000
    y_mm = ((count - 1) / 2 - np.arange(count)) * volume.spacing_um / 1000  # the first one on top
    radius = np.hypot(x_mm[None, :], y_mm[:, None])
    ring = np.digitize(radius, ETDRS_RADII_MM, right=True)
    angle = np.arctan2(y_mm[:, None], x_mm[None, :])
    quarter = np.floor(angle / (math.pi / 2) + 0.5).astype(int) % 4
    sides = _sides(volume)
    sectors, areas_mm2 = {"centre": ring == 0}, {"centre": math.pi * ETDRS_RADII_MM[0] ** 2}
    for number, name in enumerate(_RINGS, start=1):
        low, high = ETDRS_RADII_MM[number - 1 : number + 1]
        for place, side in enumerate(_QUARTERS):
            sectors[f"{name}_{sides[side]}"] = (ring == number) & (quarter == place)
            areas_mm2[f"{name}_{sides[side]}"] = math.pi * (high**2 - low**2) / 4
    scanned_mm2 = {
        name: float(mask.sum()) * volume.scale_x_um * volume.spacing_um / 1e6
        for name, mask in sectors.items()
    }
    inside = {name: min(1.0, area / areas_mm2[name]) for name, area in scanned_mm2.items()}
    return EtdrsGrid(sectors, inside)


def _sides(volume: OctVolume) -> dict[str, str]:
    """Return what lies up, down, left and right where the first B-scan is drawn on top."""
    sides = dict(_UNKNOWN_SIDES)
    if volume.laterality in ("OD", "OS"):
        nasal, temporal = ("right", "left") if volume.laterality == "OD" else ("left", "right")
        sides |= {nasal: "nasal", temporal: "temporal"}
    for first, note in FIRST_BSCAN_NOTES.items():
        if note in volume.notes:
            last = "inferior" if first == "superior" else "superior"
            sides |= {"up": first, "down": last}
    return sides


def etdrs_means(volume: OctVolume, thickness: NDArray[np.floating]) -> list[dict[str, Any]]:
    """Return the mean thickness of each ETDRS sector; nothing where there is no grid.

    Args:
        volume: whose distances, laterality and notes count.
        thickness: `(N, W)` in micrometres, NaN where not valid.

    Returns:
        Per sector `sector`, `thickness_um` (NaN without a valid A-scan), `valid_fraction` of its
        A-scans, `inside_fraction` of its area that was scanned, and `grid_centre`.
    """
    grid = etdrs_grid(volume)
    means = []
    for name, mask in (grid.sectors if grid is not None else {}).items():
        values = thickness[mask]
        valid = values[np.isfinite(values)]
        means.append(
            {
                "sector": name,
                "thickness_um": float(valid.mean()) if valid.size else math.nan,
                "valid_fraction": valid.size / values.size if values.size else 0.0,
                "inside_fraction": grid.inside[name] if grid is not None else 0.0,
                "grid_centre": CENTRE,
            }
        )
    return means


def write_etdrs(path: Path | str, volume: OctVolume, rows: PredictedRows) -> Path | None:
    """Write the ETDRS means of a volume as CSV; None, and no file, where they cannot be had."""
    thickness = thickness_um(volume, rows)
    means = [] if thickness is None else etdrs_means(volume, thickness)
    if not means:
        return None
    for row in means:
        for key in ("thickness_um", "valid_fraction", "inside_fraction"):
            row[key] = round(row[key], 3) if math.isfinite(row[key]) else ""
    return write_csv(path, means)


def write_thickness(path: Path | str, volume: OctVolume, rows: PredictedRows) -> Path | None:
    """Write the thickness map as CSV: a line per B-scan, a number of micrometres per column.

    None, and no file, where the height of a pixel is not known.
    """
    thickness = thickness_um(volume, rows)
    if thickness is None:
        return None
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", *range(thickness.shape[1])])
        for name, line in zip(volume.names, thickness, strict=True):
            writer.writerow([name, *_texts(line, 2)])
    return Path(path)
