"""B-scans and annotated rows in HDF5, in both spellings that are in use, and as exported.

One keeps a dataset per boundary below `/layers`, the other all of them in `/layer_maps`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.data.volume_source import named_errors
from pipeline.errors import InputError
from pipeline.oct.hdf5_bscans import OVERSHOOT, Hdf5BScans, array_at, dataset_at, group_at, texts_at
from pipeline.oct.row_checks import check_rows, in_pixels
from pipeline.oct.volume import OctVolume

__all__ = ["ROW_CONVENTION", "read_hdf5", "stored_volume"]

ROW_CONVENTION = "first row of lower class"  # the attribute by which an export is known

_SAMPLED = 8
_LEAST_OF_255 = 32  # float images that reach less, but more than 1, have been normalised somehow
_NAME = re.compile(r"(?P<subject>.+)_(?P<eye>[A-Za-z]+)_\d+_\d+")
_EYES = {"OD": "OD", "R": "OD", "RIGHT": "OD", "OS": "OS", "L": "OS", "LEFT": "OS"}
_ORDER = ("ILM", "RPEDC", "BM")  # of `/layer_maps` where no names are stored

RowsByLayer = dict[str, NDArray[Any]]


def read_hdf5(path: Path | str) -> OctVolume:
    """Return what an HDF5 file of B-scans holds, in either spelling or as exported.

    Rows stored as fractions of the height are multiplied by it. Rows that leave the frame a little,
    and columns where ILM lies below BM, are counted in the notes and left as they are.

    Raises:
        InputError: the file is damaged or spelled otherwise, takes data from elsewhere, has arrays
            that do not fit its B-scans, or rows that cannot be.
    """
    volume, exported = _read(Path(path))
    layers, notes = dict(volume.layers), list(volume.notes)
    height = volume.bscans.shape[1]
    if layers and not exported:
        layers, scaled = in_pixels(layers, height)
        notes += scaled
    found = check_rows(Path(path), layers, height)
    return replace(volume, layers=layers, notes=(*notes, *(n for n in found if n not in notes)))


def stored_volume(path: Path | str) -> OctVolume:
    """Return the volume in an export as it was handed in, its rows not judged again.

    Raises:
        InputError: the file is damaged, or no such export.
    """
    volume, exported = _read(Path(path))
    if not exported:
        raise InputError(
            f"{path}: no attribute row_convention = {ROW_CONVENTION!r}, so the frame of its "
            "predicted rows is unknown; expected a file written by write_predictions"
        )
    return volume


def _read(path: Path) -> tuple[OctVolume, bool]:
    """Return the volume with its rows as stored, and whether the file is an export of ours."""
    bscans = Hdf5BScans(path, "images")
    with named_errors(path), h5py.File(path, "r") as file:
        exported = file.attrs.get("row_convention") == ROW_CONVENTION
        flat = "layers" not in file and "layer_maps" in file
        layers, notes = (_layer_maps if flat else _layer_group)(path, file, bscans.shape)
        names, subjects, laterality = _names(path, file, len(bscans))
        facts: dict[str, Any] = {"laterality": laterality, **_scales(file.attrs)}
        facts["source_format"] = "hdf5_layer_maps" if flat else "hdf5"
        if exported:  # it says what was found when its source was read
            facts |= _as_handed_in(path, file.attrs)
            notes = facts.pop("notes")
    if not exported:
        facts["white"], found = _white(bscans)
        notes += found
        bscans.white = facts["white"]
    volume = OctVolume(
        path=path,
        bscans=bscans,
        layers=layers,
        names=names,
        subjects=subjects,
        notes=tuple(notes),
        **facts,
    )
    return volume, exported


def _layer_group(
    path: Path, file: Any, size: tuple[int, int, int]
) -> tuple[RowsByLayer, list[str]]:
    """Return the rows of `/layers`; without that group there are none, as before annotation."""
    if "layers" not in file:
        return {}, ["no annotated rows in the file"]
    names = tuple(group_at(path, file, "layers"))
    shape = (size[0], size[2])
    return {name: _floating(array_at(path, file, f"layers/{name}", shape)) for name in names}, []


def _layer_maps(path: Path, file: Any, size: tuple[int, int, int]) -> tuple[RowsByLayer, list[str]]:
    """Return the rows of `/layer_maps`, whose last axis is the boundary."""
    shape = dataset_at(path, file, "layer_maps").shape
    kinds = shape[-1] if len(shape) == 3 else len(_ORDER)
    maps = _floating(array_at(path, file, "layer_maps", (size[0], size[2], kinds)))
    if "layer_names" in file:
        names = texts_at(path, file, "layer_names", kinds)
    elif kinds == len(_ORDER):
        names = _ORDER
    else:
        raise InputError(
            f"{path}: /layer_maps holds {kinds} boundaries without /layer_names; expected their "
            f"names, or the {len(_ORDER)} {', '.join(_ORDER)}"
        )
    notes = ["splits stored in the file are not used"] if "splits" in file else []
    return {name: maps[..., k].copy() for k, name in enumerate(names)}, notes


def _floating(rows: NDArray[Any]) -> NDArray[Any]:
    return rows if rows.dtype.kind == "f" else rows.astype(np.float64)


def _names(path: Path, file: Any, count: int) -> tuple[Sequence[str], Sequence[str], str | None]:
    """Return names, subjects, and the laterality if every name has the same one."""
    names = tuple(f"{path.stem}_{index:04d}" for index in range(count))
    parts: list[re.Match[str] | None] = [None] * count
    if "names" in file:
        names = texts_at(path, file, "names", count)
        parts = [_NAME.fullmatch(name) for name in names]
    if "subjects" in file:
        subjects = texts_at(path, file, "subjects", count)
    elif "patient_indices" in file:
        subjects = tuple(map(str, array_at(path, file, "patient_indices", (count,), "ui").tolist()))
    else:
        subjects = tuple("" if part is None else part["subject"] for part in parts)
    eyes = {None if part is None else _EYES.get(part["eye"].upper()) for part in parts}
    return names, subjects, eyes.pop() if len(eyes) == 1 else None


def _scales(attributes: Any) -> dict[str, float]:
    """Return the sizes that the attributes of a file give, in micrometres."""
    sizes = {}
    for name in ("scale_x_um", "scale_y_um", "spacing_um"):
        value = attributes.get(name)
        if isinstance(value, int | float | np.number) and math.isfinite(value) and value > 0:
            sizes[name] = float(value)
    return sizes


def _as_handed_in(path: Path, attributes: Any) -> dict[str, Any]:
    """Return the rest of what the attributes of an export say of the volume."""
    white, source_format = attributes.get("white"), attributes.get("source_format")
    if not isinstance(white, float) or not isinstance(source_format, str):
        raise InputError(
            f"{path}: an export with white = {white!r} and source_format = {source_format!r}, "
            "expected a number and a word; export it again"
        )
    told = {name: attributes.get(name) for name in ("laterality", "scan_pattern")}
    notes = [str(note) for note in np.atleast_1d(attributes.get("notes", ()))]
    return {**told, "white": float(white), "source_format": source_format, "notes": notes}


def _white(bscans: Hdf5BScans) -> tuple[float, list[str]]:
    """Return which grey value is white, by the type and, where that leaves it open, the values."""
    if bscans.dtype == np.uint8:
        return 255.0, []
    positions = np.unique(np.linspace(0, len(bscans) - 1, _SAMPLED).astype(int)).tolist()
    looked_at = [bscans[position] for position in positions]
    low = min(float(block.min()) for block in looked_at)
    high = max(float(block.max()) for block in looked_at)
    if bscans.dtype == np.uint16:
        dark = [f"uint16 images reach {high:g} of 65535: stored as uint8 they would be brighter"]
        return 65535.0, dark if high <= 255 else []
    scales = [white for white in OVERSHOOT if white > 1 or bscans.dtype.kind == "f"]
    white = next((one for one in scales if high <= OVERSHOOT[one]), None)
    unclear = white == 255 and bscans.dtype.kind == "f" and high < _LEAST_OF_255
    if white is None or unclear or not low >= -0.05 * white:
        raise InputError(
            f"{bscans.path}: {bscans.dtype} images from {low:g} to {high:g}, expected 0..1, 0..255 "
            "or 0..65535; store them as uint8, or as float from 0 to 1"
        )
    if white == 1:
        return white, []
    return white, [f"{bscans.dtype} images reach {high:g}: {white:g} taken for white"]
