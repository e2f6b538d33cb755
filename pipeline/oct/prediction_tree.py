"""Where predicted rows stand in an exported HDF5 file, and how they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.oct.hdf5_files import ROW_CONVENTION
from pipeline.oct.prediction_rows import PredictedRows

__all__ = [
    "BOUNDARIES",
    "CONVENTIONS",
    "MAPS",
    "ROW_GROUPS",
    "expected_array",
    "row_arrays",
    "storage",
]

BOUNDARIES = ("ILM", "BM")
CONVENTIONS = {"frame": "original", "row_convention": ROW_CONVENTION}
# Groups with a dataset per boundary, and the attribute of the predictions that these hold.
ROW_GROUPS = {
    "predicted_layers_raw": "{}_px",
    "column_sigma": "{}_sigma_px",
    "column_valid": "{}_valid",
}
MAPS = {"prediction_masks": "masks", "confidence_maps": "confidence"}

_GZIP_LEVEL = 1  # speed before size


def row_arrays(rows: PredictedRows, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Return the dataset that every array of `rows` belongs to.

    Raises:
        ValueError: one of them is not `shape`, or not of the kind that it should be.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name in BOUNDARIES:
        for group, attribute in ROW_GROUPS.items():
            attribute = attribute.format(name.lower())
            array = expected_array(attribute, getattr(rows, attribute), shape)
            kind = "b" if group == "column_valid" else "f"
            if array.dtype.kind != kind:
                raise ValueError(
                    f"{attribute} is {array.dtype}, expected {'bool' if kind == 'b' else 'float'}"
                )
            arrays[f"{group}/{name}"] = array.astype(np.uint8) if kind == "b" else array
        raw, valid = arrays[f"predicted_layers_raw/{name}"], arrays[f"column_valid/{name}"]
        trusted = np.array(raw)
        trusted[valid == 0] = np.nan
        arrays[f"predicted_layers/{name}"] = trusted
    return arrays


def expected_array(
    name: str, array: Any, shape: Sequence[int], dtype: np.dtype[Any] | None = None
) -> NDArray[Any]:
    """Return `array` as an array of `shape`, and of `dtype` where it is given.

    Raises:
        ValueError: it is another one.
    """
    found: NDArray[Any] = np.asarray(array)
    if found.shape != tuple(shape) or dtype not in (None, found.dtype):
        wanted = f"{tuple(shape)}" + (f" of {dtype}" if dtype is not None else "")
        raise ValueError(f"{name} is {found.shape} of {found.dtype}, expected {wanted}")
    return found


def storage(shape: Sequence[int], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return how h5py is to store arrays `shape` per B-scan: compressed, a chunk for each."""
    return {
        "chunks": (1, *shape),
        "compression": "gzip",
        "compression_opts": _GZIP_LEVEL,
        "shuffle": dtype.itemsize > 1,
    }
