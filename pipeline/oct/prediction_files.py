"""Predictions to an HDF5 file and back.

The tree is that of the OCT project this one follows, with additions; all rows are in the frame of
the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.data.volume_source import named_errors
from pipeline.errors import InputError
from pipeline.oct.hdf5_bscans import Hdf5BScans, array_at, group_at
from pipeline.oct.hdf5_files import stored_volume
from pipeline.oct.prediction_rows import PredictedRows, StoredRows, part_of
from pipeline.oct.prediction_tree import BOUNDARIES, MAPS, ROW_GROUPS, expected_array
from pipeline.oct.prediction_writer import PredictionWriter
from pipeline.oct.volume import BScans, OctVolume

__all__ = [
    "StoredPredictions",
    "read_predictions",
    "write_predictions",
]

_BLOCK = 8  # B-scans held at a time


@dataclass(frozen=True)
class StoredPredictions:
    """What an export holds; all of it can be handed to `write_predictions` again.

    Attributes:
        volume: B-scans, truth and names as they were handed in, but for the path.
        rows: what was predicted, before anything was declared invalid.
        masks: classes `(N, h, w)` in the network's frame; None where not exported.
        confidence: largest probability `(N, h, w)`, likewise.
        metadata: split, architecture, time and whatever else was handed in.
        dataset_info: size, date and model.
    """

    volume: OctVolume
    rows: StoredRows
    masks: BScans | None = None
    confidence: BScans | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dataset_info: Mapping[str, Any] = field(default_factory=dict)


def write_predictions(
    path: Path | str,
    volume: OctVolume,
    prediction: PredictedRows,
    *,
    masks: BScans | NDArray[np.generic] | None = None,
    confidence: BScans | NDArray[np.generic] | None = None,
    **settings: Any,
) -> Path:
    """Write the predictions for a whole volume, a few B-scans at a time.

    Args:
        path: the HDF5 file.
        volume: what the predictions are for.
        prediction: `(N, W)` each, in the frame of the volume's B-scans.
        masks: classes 0, 1, 2 `(N, h, w)` in the network's frame, if they are to be written.
        confidence: largest probability `(N, h, w)`, likewise.
        settings: further arguments of `PredictionWriter`.

    Returns:
        The path.

    Raises:
        ConfigurationError: `path` is the file that the volume is read from.
        ValueError: shapes or types do not fit the volume.
    """
    count, _, width = volume.bscans.shape
    expected_array(f"{path}: ilm_px", prediction.ilm_px, (count, width))
    with PredictionWriter(path, volume, **settings) as writer:
        for start in range(0, count, _BLOCK):
            block = slice(start, min(start + _BLOCK, count))
            writer.append(
                part_of(prediction, block),
                masks=None if masks is None else masks[block],
                confidence=None if confidence is None else confidence[block],
            )
    return Path(path)


def read_predictions(path: Path | str) -> StoredPredictions:
    """Return what `write_predictions` wrote, every bit of it; B-scans and maps are read lazily.

    Raises:
        InputError: the file is damaged, or no such export.
    """
    path = Path(path)
    volume = stored_volume(path)
    count, _, width = volume.bscans.shape
    with named_errors(path), h5py.File(path, "r") as file:
        rows = _rows(path, file, (count, width))
        metadata, info = (_attributes(path, file, name) for name in ("metadata", "dataset_info"))
        names = {attribute: name for name, attribute in MAPS.items() if name in file}
    maps = {attribute: Hdf5BScans(path, name) for attribute, name in names.items()}
    for attribute, stored in maps.items():
        if len(stored) != count:
            raise InputError(
                f"{path}: /{names[attribute]} holds {len(stored)} B-scans, expected the {count} of "
                "/images; export it again"
            )
    return StoredPredictions(volume, rows, metadata=metadata, dataset_info=info, **maps)


def _rows(path: Path, file: Any, shape: tuple[int, int]) -> StoredRows:
    arrays: dict[str, NDArray[Any]] = {}
    for name in BOUNDARIES:
        for group, attribute in ROW_GROUPS.items():
            array = array_at(path, file, f"{group}/{name}", shape)
            valid = group == "column_valid"
            arrays[attribute.format(name.lower())] = array.astype(bool) if valid else array
    return StoredRows(**arrays)


def _attributes(path: Path, file: Any, name: str) -> dict[str, Any]:
    """Return the attributes of a group in the types of Python."""
    values = dict(group_at(path, file, name).attrs)
    return {key: value.item() if isinstance(value, np.generic) else value
            for key, value in values.items()}  # fmt: skip
