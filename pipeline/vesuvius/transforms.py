"""From a volume's file to the network's grey values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ScaleIntensityRange
from numpy.typing import NDArray

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.volume_statistics import intensity_fault, intensity_percentiles
from pipeline.data.volumes import open_volume
from pipeline.errors import InputError

__all__ = ["IGNORE_LABEL", "LoadVolumed", "ScalePercentilesd", "label_fault"]

IGNORE_LABEL = 2
"""Value of voxels that nobody labelled."""

_CLASSES = {0, 1, IGNORE_LABEL}


class LoadVolumed(MapTransform):
    """Read a case's volume and label.

    Takes paths (TIFF, Zarr, HDF5, npy, NIfTI) or arrays `(D, H, W)`. Gives tensors `(1, D, H, W)`
    in the stored type, and of the image `image_path`, `source_shape`, `source_dtype` and `spacing`
    `(3,)`, NaN where it is unknown.

    Args:
        keys: `image`, and `label` with the values 0, 1 and 2 (unlabelled).
        allow_missing_keys: leave out keys that a case does not have, or has as None.
    """

    def __init__(self, keys: KeysCollection = ("image", "label")) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with tensors in place of paths.

        Raises:
            InputError: a file is no volume, has values that are not finite, or a label does not
                fit its image.
        """
        case = {key: value for key, value in data.items() if value is not None}
        image = case["image"]
        for key in self.key_iterator(case):
            array, path, spacing = _read(case[key])
            if key == "label":
                _check_label(array, path)
                if array.shape != tuple(case["source_shape"]):
                    raise InputError(
                        f"{path}: label of {array.shape}, its image {image} has "
                        f"{tuple(case['source_shape'])}; expected one size"
                    )
            else:
                _check_finite(array, path)
                case |= {"source_shape": np.array(array.shape), "source_dtype": str(array.dtype)}
                unknown = (np.nan,) * 3
                case |= {"image_path": str(path), "spacing": np.array(spacing or unknown)}
            case[key] = MetaTensor(_torch_ready(array)[None])
        return case


class ScalePercentilesd(MapTransform):
    """Map two percentiles of a volume to 0 and 1, and clip what lies outside.

    Args:
        keys: volumes `(1, D, H, W)`.
        low, high: percentiles, 0 to 100.
    """

    def __init__(self, keys: KeysCollection, low: float = 0.5, high: float = 99.5) -> None:
        super().__init__(keys)
        self.low = low
        self.high = high

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with float32 volumes.

        Raises:
            InputError: a volume is constant, or nearly: what the network would make of it is noise.
        """
        case = dict(data)
        for key in self.key_iterator(case):
            found = intensity_percentiles(np.asarray(case[key])[0], self.low, self.high)
            if fault := intensity_fault(found):
                raise InputError(f"{case.get('image_path', key)}: {fault}")
            scale = ScaleIntensityRange(found["low"], found["high"], 0.0, 1.0, clip=True)
            case[key] = scale(case[key])
        return case


def label_fault(values: NDArray[Any]) -> str:
    """Return what is wrong with the distinct values of a label, an empty text where nothing is."""
    unknown = sorted({value.item() for value in values} - _CLASSES)
    if not unknown:
        return ""
    shown = ", ".join(f"{value:g}" for value in unknown[:8])
    hint = "correct them"
    if unknown == [255]:
        hint = "divide a mask of 0 and 255 by 255"
        if 1 in values:
            hint = "write 2 where 255 means unlabelled"
    return f"label has the values {shown}; expected 0, 1 and 2 (unlabelled); {hint}"


def _read(source: Any) -> tuple[NDArray[Any], Path | str, Any]:
    """Return a volume `(D, H, W)`, its name and its spacing."""
    if not isinstance(source, str | Path):
        array = np.asarray(source)
        if array.ndim != 3:
            raise InputError(f"array: found shape {array.shape}, expected a volume (D, H, W)")
        return array, "array", None
    with open_volume(source) as volume:
        if volume.channels not in (None, 1):
            raise InputError(f"{source}: {volume.channels} channels, expected one")
        check_decoded_bytes(Path(source), volume.shape, volume.dtype.itemsize)
        array = volume[:, :, :]
        return array.reshape(volume.shape), Path(source), volume.spacing


def _check_finite(array: NDArray[Any], path: Path | str) -> None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    where = np.argwhere(~np.isfinite(array))
    first = ", ".join(map(str, where[0]))
    raise InputError(
        f"{path}: {len(where)} values are not finite, the first at (z, y, x) = ({first}); "
        "set them to a number, or leave the file out"
    )


def _check_label(array: NDArray[Any], path: Path | str) -> None:
    if fault := label_fault(np.unique(array)):
        raise InputError(f"{path}: {fault}")


def _torch_ready(array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` in a type that torch computes with; no value changes.

    It has hardly any 16-bit unsigned integers, subtracts no truth values, and differences of 16-bit
    floats overflow.
    """
    if array.dtype == bool:
        return array.view(np.uint8)
    if array.dtype.itemsize == 2 and array.dtype.kind in "uf":
        return array.astype(np.float32)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
