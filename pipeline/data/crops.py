"""Crops read from the files themselves, so that a sample costs its crop and not its volume.

For volumes that `open_volume` reads by parts. An image that only decodes whole (PNG, JPEG) gains
nothing here: load it and crop it with MONAI's transforms, behind a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection
from monai.transforms import MapTransform, Randomizable, ScaleIntensityRange
from monai.utils import ensure_tuple_rep
from numpy.typing import NDArray

from pipeline.data.file_constants import FileConstants, file_identity
from pipeline.data.volumes import Volume, open_volume
from pipeline.errors import ConfigurationError, InputError

__all__ = ["RandCropFromFiled", "ScaleByPercentilesd", "read_crop"]

_MOST_OPEN = 64

Place = tuple[int, int, int]
# Of its label values: voxels so far, and where their kept positions begin and end.
_Side = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def read_crop(
    volume: Volume, start: Sequence[int], size: Sequence[int], pad_value: float = 0.0
) -> NDArray[Any]:
    """Return `size` voxels of `volume` from `start` on, in its type, reading no more than that.

    Args:
        volume: `(D, H, W)`.
        start: first voxel on each axis; may be negative.
        size: `(d, h, w)`.
        pad_value: for voxels outside the volume.

    Returns:
        `(C, d, h, w)`.
    """
    region, margins = _region(volume, start, size)
    if any(any(pair) for pair in margins):
        region = np.pad(region, [(0, 0), *margins], constant_values=pad_value)
    return region


class RandCropFromFiled(Randomizable, MapTransform):
    """Draw a crop and read it, the same region of every key, without reading the volumes.

    It stands first in the chain, in place of loading and `RandCropByPosNegLabeld`; give the chain
    to a plain `monai.data.Dataset`, since nothing before it could be cached. Each entry becomes a
    tensor `(C, d, h, w)`; beside it `<key>_file` has the path, for `ScaleByPercentilesd`, and
    `crop_start` `(3,)` where the crop begins in the case, negative where it was padded.

    Where a volume is smaller than the crop it lies in the middle of it, as with `SpatialPadd`.

    Args:
        keys: entries with paths of volumes of one size, such as image and label.
        roi_size: `(d, h, w)`.
        label_key: the label among `keys`, for `positive` and `balance`.
        positive: share of crops around a foreground voxel, the others around background
            (`pos / (pos + neg)` of `RandCropByPosNegLabeld`); None draws places uniformly.
        indices: the label files' `class_index_cache`; needed for `positive`.
        balance: `(low, high)`: draw until the share of foreground among the labelled voxels of the
            crop lies in this range; of `tries` failures the nearest to its middle is taken. Every
            try reads the crop of the label.
        tries: crops drawn at most for `balance`.
        ignore_label: voxels that are neither foreground nor background.
        pad_value: outside the volume, for all keys or each.
        dtype: of the tensors, for all keys or each; None keeps the stored one.
        file_key: the dataset inside files that hold several (HDF5), for all keys or each.
        allow_missing_keys: leave out keys that a case does not have.

    Raises:
        ConfigurationError: settings that do not fit together.
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int],
        label_key: str = "label",
        positive: float | None = None,
        indices: FileConstants | None = None,
        balance: tuple[float, float] | None = None,
        tries: int = 10,
        ignore_label: int | None = None,
        pad_value: float | Sequence[float] = 0.0,
        dtype: DtypeLike | Sequence[DtypeLike] = np.float32,
        file_key: str | Sequence[str | None] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.roi_size: Place = _checked_size(roi_size)
        self.label_key = label_key
        self.positive = positive
        self.indices = indices
        self.balance = balance
        self.tries = tries
        self.ignore_label = ignore_label
        self.pad_value = ensure_tuple_rep(pad_value, len(self.keys))
        self.dtype = ensure_tuple_rep(dtype, len(self.keys))
        self.file_key = ensure_tuple_rep(file_key, len(self.keys))
        self._check()
        self._open: OrderedDict[tuple[str, str | None], tuple[Any, Volume]] = OrderedDict()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with crops in place of paths.

        Raises:
            InputError: a file cannot be read, or the sizes of a case differ.
        """
        case = dict(data)
        settings = list(self.key_iterator(case, self.pad_value, self.dtype, self.file_key))
        volumes = {key: self._volume(case[key], within) for key, *_, within in settings}
        shape = _common_shape(case, volumes)
        start = self._drawn(case, volumes, shape)
        for key, pad_value, dtype, _ in settings:
            crop = read_crop(volumes[key], start, self.roi_size, pad_value)
            case[f"{key}_file"] = str(case[key])
            case[key] = torch.from_numpy(_owned(crop, dtype))
        case["crop_start"] = torch.tensor(start)
        return case

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _check(self) -> None:
        if self.positive is not None and not 0 <= self.positive <= 1:
            raise ConfigurationError(f"positive must be in [0, 1] or null, got {self.positive!r}")
        if self.positive is not None and self.indices is None:
            raise ConfigurationError(
                "positive is set without indices: give a class_index_cache of the label files"
            )
        if self.balance is not None and not 0 <= self.balance[0] <= self.balance[1] <= 1:
            raise ConfigurationError(
                f"balance must be [low, high] within [0, 1], got {self.balance!r}"
            )
        if self.tries < 1:
            raise ConfigurationError(f"tries must be at least 1, got {self.tries!r}")
        steered = self.positive is not None or self.balance is not None
        if steered and self.label_key not in self.keys:
            raise ConfigurationError(
                f"label_key {self.label_key!r} is not among the keys {self.keys}; "
                "positive and balance need the label"
            )

    def _volume(self, path: Any, within: str | None) -> Volume:
        """Return the open volume of `path`; the ones used last are kept open."""
        name = (str(path), within)
        state = None if Path(path).is_dir() else file_identity(path)
        known = self._open.pop(name, None)
        volume = known[1] if known and known[0] == state else open_volume(path, within)
        self._open[name] = (state, volume)
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return volume

    def _drawn(
        self, case: Mapping[Hashable, Any], volumes: Mapping[Hashable, Volume], shape: Place
    ) -> Place:
        """Return where the crop begins."""
        found = None if self.positive is None else self._indices(case)
        if self.balance is None:
            return self._place(shape, found)
        low, high = self.balance
        nearest, best = np.inf, (0, 0, 0)
        for _ in range(self.tries):
            start = self._place(shape, found)
            share = self._foreground_share(volumes[self.label_key], start)
            distance = abs(share - (low + high) / 2)
            if low <= share <= high:
                return start
            if distance < nearest or nearest == np.inf:
                nearest, best = distance, start
        return best

    def _indices(self, case: Mapping[Hashable, Any]) -> tuple[NDArray[np.int64], list[_Side]]:
        """Return positions, and where among them foreground and background are."""
        if self.indices is None:
            raise ConfigurationError("positive is set without indices")
        kept = self.indices(case[self.label_key])
        values, counts, offsets = kept["values"], kept["counts"], kept["offsets"]
        sides = []
        for side in (values > 0, values == 0):
            chosen = np.flatnonzero(side & (values != self.ignore_label))
            sides.append((np.cumsum(counts[chosen]), offsets[chosen], offsets[chosen + 1]))
        if not any(upto.size for upto, _, _ in sides):
            raise InputError(
                f"{case[self.label_key]}: no voxel is labelled; leave the case out, or draw "
                "uniformly (positive: null)"
            )
        return kept["positions"], sides

    def _place(self, shape: Place, found: tuple[NDArray[np.int64], list[_Side]] | None) -> Place:
        room = [max(0, n - d) for n, d in zip(shape, self.roi_size, strict=True)]
        if found is None:
            start = [int(self.R.randint(free + 1)) for free in room]
        else:
            centre = np.unravel_index(self._voxel(*found), shape)
            wanted = [int(c) - d // 2 for c, d in zip(centre, self.roi_size, strict=True)]
            start = [min(max(0, s), free) for s, free in zip(wanted, room, strict=True)]
        small = [max(0, d - n) // 2 for n, d in zip(shape, self.roi_size, strict=True)]
        z, y, x = (s - margin for s, margin in zip(start, small, strict=True))
        return z, y, x

    def _voxel(self, positions: NDArray[np.int64], sides: list[_Side]) -> int:
        """Draw a foreground or background voxel; every voxel of the side is equally likely."""
        drawn = 0 if self.R.rand() < (self.positive or 0.0) else 1
        upto, first, end = sides[drawn] if sides[drawn][0].size else sides[1 - drawn]
        value = int(np.searchsorted(upto, self.R.rand() * upto[-1], side="right"))
        return int(positions[self.R.randint(first[value], end[value])])

    def _foreground_share(self, label: Volume, start: Place) -> float:
        """Return the share of foreground among labelled voxels, infinity where none is labelled."""
        region, _ = _region(label, start, self.roi_size)
        if self.ignore_label is not None:
            region = region[region != self.ignore_label]
        return float((region > 0).mean()) if region.size else np.inf


class ScaleByPercentilesd(MapTransform):
    """Scale crops by the percentiles of the whole files they come from.

    What `ScaleIntensityRangePercentilesd` before the crop would do, without looking at the volume:
    put it after `RandCropFromFiled`.

    Args:
        keys: entries to scale.
        percentiles: what `percentile_cache` returned.
        b_min: what the lower percentile becomes.
        b_max: what the upper percentile becomes.
        clip: hold the result within these two.
        allow_missing_keys: leave out keys that a case does not have.
    """

    def __init__(
        self,
        keys: KeysCollection,
        percentiles: FileConstants,
        b_min: float = 0.0,
        b_max: float = 1.0,
        clip: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.percentiles = percentiles
        self.b_min = b_min
        self.b_max = b_max
        self.clip = clip

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with scaled crops.

        Raises:
            InputError: a file has no two different values to scale by.
        """
        case = dict(data)
        for key in self.key_iterator(case):
            path = case[f"{key}_file"]
            found = self.percentiles(path)
            low, high = found["low"], found["high"]
            if low is None or low == high:
                raise InputError(
                    f"{path}: its percentiles are {low} and {high}, expected two values to scale "
                    "by; choose others or leave the file out"
                )
            case[key] = ScaleIntensityRange(low, high, self.b_min, self.b_max, self.clip)(case[key])
        return case


def _region(
    volume: Volume, start: Sequence[int], size: Sequence[int]
) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """Return the part `(C, ...)` of a crop that lies in the volume, and the margins around it."""
    low, high, margins = [], [], []
    for length, first, count in zip(volume.shape, start, size, strict=True):
        begin = min(max(0, first), length)
        end = min(max(begin, first + count), length)
        low.append(begin)
        high.append(end)
        # A crop that misses the volume is all margin.
        before = min(count, begin - first) if end > begin else count
        margins.append((before, count - before - (end - begin)))
    z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
    region = np.asarray(volume[z, y, x])
    return (region[None] if volume.channels is None else region), margins


def _checked_size(roi_size: Sequence[int]) -> Place:
    sizes = [int(size) for size in roi_size]
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigurationError(f"roi_size must be three lengths of at least 1, got {roi_size!r}")
    return sizes[0], sizes[1], sizes[2]


def _common_shape(case: Mapping[Hashable, Any], volumes: Mapping[Hashable, Volume]) -> Place:
    shapes = {key: volume.shape for key, volume in volumes.items()}
    (first, expected), *others = shapes.items()
    for key, shape in others:
        if shape != expected:
            raise InputError(
                f"{case[key]}: shape {shape}, but {case[first]} has {expected}; "
                "the files of a case must have one size"
            )
    return expected


def _owned(crop: NDArray[Any], dtype: DtypeLike) -> NDArray[Any]:
    """Return a copy that torch can take: writable, contiguous and in the machine's byte order."""
    wanted = crop.dtype.newbyteorder("=") if dtype is None else np.dtype(dtype)
    return np.array(crop, dtype=wanted, order="C", copy=True)
