"""Percentiles and label positions of volumes larger than memory, one slab after another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.file_constants import FileConstants
from pipeline.data.volume_pieces import SlicedVolume, flat_pieces
from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError, InputError, Problem

__all__ = [
    "class_index_cache",
    "class_indices",
    "intensity_fault",
    "intensity_percentiles",
    "intensity_problems",
    "percentile_cache",
]

_SLAB_BYTES = 1 << 26
_DIGIT_BITS = 16
_MOST_CLASSES = 256


def percentile_cache(
    folder: Path | str, low: float, high: float, key: str | None = None
) -> FileConstants:
    """Return the `intensity_percentiles` of files, computed once each.

    Args:
        folder: where they are kept.
        low: lower percentile.
        high: upper percentile.
        key: the dataset inside files that hold several (HDF5).
    """
    _check_percentiles(low, high)
    settings = {"low": low, "high": high, "key": key}
    return FileConstants(folder, "percentiles", _file_percentiles, settings)


def class_index_cache(
    folder: Path | str, limit: int = 10_000, seed: int = 0, key: str | None = None
) -> FileConstants:
    """Return the `class_indices` of label files, computed once each.

    Args:
        folder: where they are kept.
        limit: most positions kept of a label value; 8 bytes each, in every loader worker.
        seed: of their choice.
        key: the dataset inside files that hold several (HDF5).
    """
    _check_limit(limit)
    settings = {"limit": limit, "seed": seed, "key": key}
    return FileConstants(folder, "class_indices", _file_class_indices, settings)


def intensity_percentiles(
    volume: SlicedVolume, low: float, high: float, slab_bytes: int = _SLAB_BYTES
) -> dict[str, float | int]:
    """Return two percentiles of the finite values, and what else one look at all values tells.

    The values at the ranks are found exactly, by their binary digits: one pass for types of up to
    16 bits, two for 32 bits, four for 64. Between ranks it is `numpy.percentile`'s `linear`.

    Args:
        volume: `(D, H, W)`, of any real type.
        low: lower percentile.
        high: upper percentile.
        slab_bytes: about how much is read at once.

    Returns:
        `low`, `high`, `minimum`, `maximum` (NaN without a finite value), `nan` and `infinite`
        (counts) and `voxels`.

    Raises:
        InputError: the type has no order or the volume is empty.
        ConfigurationError: not 0 <= low < high <= 100.
    """
    _check_percentiles(low, high)
    selection = _Selection(volume, slab_bytes)
    count = selection.count
    found: dict[str, float | int] = dict.fromkeys(("low", "high", "minimum", "maximum"), math.nan)
    if count:
        places = {"low": low / 100 * (count - 1), "high": high / 100 * (count - 1)}
        places |= {"minimum": 0.0, "maximum": float(count - 1)}
        ranks = {rank for place in places.values() for rank in _neighbours(place, count)}
        at_rank = selection.values_at(sorted(ranks))
        for name, place in places.items():
            before, after = (at_rank[rank] for rank in _neighbours(place, count))
            found[name] = _between(before, after, place - math.floor(place))
    counts = {"nan": selection.nan, "infinite": selection.infinite, "voxels": selection.voxels}
    return found | counts


def intensity_fault(found: Mapping[str, Any]) -> str:
    """Return why a volume cannot be scaled by its percentiles, an empty text where it can.

    Args:
        found: what `intensity_percentiles` or a `percentile_cache` returned.
    """
    bad = found["nan"] + found["infinite"]
    if bad:
        return f"{bad} values are not finite; set them to a number, or leave the file out"
    if found["minimum"] == found["maximum"]:
        return f"constant: every voxel is {found['minimum']:g}; leave the file out"
    if found["low"] == found["high"]:
        return f"nearly constant: both percentiles are {found['low']:g}; leave the file out"
    return ""


def intensity_problems(percentiles: FileConstants, paths: Iterable[Path | str]) -> list[Problem]:
    """Return the volumes that would spoil a training: unreadable ones and those with a fault.

    Args:
        percentiles: what `percentile_cache` returned; it is filled.
        paths: the volumes.
    """
    problems = []
    for path in paths:
        try:
            fault = intensity_fault(percentiles(path))
        except InputError as error:
            fault = str(error).removeprefix(f"{path}: ")
        if fault:
            problems.append(Problem(str(path), "intensity", fault))
    return problems


def class_indices(
    label_volume: SlicedVolume, limit: int, seed: int = 0, slab_bytes: int = _SLAB_BYTES
) -> dict[str, NDArray[np.int64]]:
    """Return how often each label value occurs and where, at up to `limit` voxels of each.

    Which voxels are kept follows from their position and `seed` alone, so it is the same for any
    size of slab; every subset of a value's voxels is equally likely.

    Args:
        label_volume: `(D, H, W)` of whole numbers.
        limit: most positions kept of a value.
        seed: of their choice.
        slab_bytes: about how much is read at once.

    Returns:
        `values` `(K,)` ascending, `counts` `(K,)`, `positions` `(N,)`: flat indices, ascending
        within a value, and `offsets` `(K + 1,)`: value `k` has
        `positions[offsets[k]:offsets[k + 1]]`. With no more than `limit` of each they are those of
        MONAI's `FgBgToIndicesd`.

    Raises:
        InputError: values that are no labels.
    """
    _check_limit(limit)
    channels = getattr(label_volume, "channels", None) or 1
    if channels > 1:
        raise InputError(f"a label volume of {channels} channels, expected one")
    kept: dict[int, _Kept] = {}
    for start, piece in flat_pieces(label_volume, slab_bytes):
        for value in _label_values(piece):
            positions = np.flatnonzero(piece == value) + start
            kept.setdefault(int(value), _Kept(limit, seed)).add(positions)
        if len(kept) > _MOST_CLASSES:
            raise InputError(
                f"more than {_MOST_CLASSES} label values; expected a label volume "
                "(is this the image itself?)"
            )
    values = sorted(kept)
    parts = [np.sort(kept[value].positions) for value in values]
    return {
        "values": np.asarray(values, dtype=np.int64),
        "counts": np.asarray([kept[value].count for value in values], dtype=np.int64),
        "positions": np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64),
        "offsets": np.cumsum([0, *map(len, parts)], dtype=np.int64),
    }


def _file_percentiles(path: Path | str, low: float, high: float, key: str | None) -> Any:
    try:
        return intensity_percentiles(open_volume(path, key), low, high)
    except InputError as error:
        raise _named(error, path) from error


def _file_class_indices(path: Path | str, limit: int, seed: int, key: str | None) -> Any:
    try:
        return class_indices(open_volume(path, key), limit, seed)
    except InputError as error:
        raise _named(error, path) from error


def _named(error: InputError, path: Path | str) -> InputError:
    """Return `error` with the file's name, which what looks at values alone does not know."""
    text = str(error)
    return InputError(text if text.startswith(str(path)) else f"{path}: {text}")


def _check_percentiles(low: float, high: float) -> None:
    if not 0 <= low < high <= 100:
        raise ConfigurationError(
            f"percentiles must be 0 <= low < high <= 100, got low={low!r}, high={high!r}"
        )


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ConfigurationError(f"limit must be at least 1 position per label, got {limit!r}")


class _Selection:
    """Values of a volume by rank: a first pass counts leading digits, later ones refine."""

    def __init__(self, volume: SlicedVolume, slab_bytes: int) -> None:
        self.volume = volume
        self.slab_bytes = slab_bytes
        self.dtype = volume.dtype.newbyteorder("=")
        if self.dtype.kind not in "buif" or self.dtype.itemsize > 8:
            raise InputError(f"values of type {self.dtype}, expected real numbers of up to 64 bits")
        self.bits = 8 * self.dtype.itemsize
        self.digit = min(self.bits, _DIGIT_BITS)
        self.nan = self.infinite = self.voxels = 0
        self.leading = np.zeros(1 << self.digit, dtype=np.int64)
        self._count_leading_digits()
        self.count = self.voxels - self.nan - self.infinite

    def _count_leading_digits(self) -> None:
        shift = self.bits - self.digit
        for _, piece in flat_pieces(self.volume, self.slab_bytes):
            self.voxels += piece.size
            if self.dtype.kind == "f":
                self.nan += int(np.isnan(piece).sum())
                self.infinite += int(np.isinf(piece).sum())
            self.leading += self._counted(self._keys(piece) >> shift)

    def values_at(self, ranks: Sequence[int]) -> dict[int, float]:
        """Return the value at each rank among the finite ones in ascending order."""
        state = {rank: _digit_at(self.leading, rank) for rank in ranks}
        for shift in range(self.bits - 2 * self.digit, -1, -self.digit):
            tables = self._tables({prefix for prefix, _ in state.values()}, shift)
            for rank, (prefix, left) in state.items():
                digit, left = _digit_at(tables[prefix], left)
                state[rank] = (prefix << self.digit | digit, left)
        return {rank: self._value(key) for rank, (key, _) in state.items()}

    def _tables(self, prefixes: set[int], shift: int) -> dict[int, NDArray[np.int64]]:
        """Count the digit at `shift` of the keys that begin with each prefix."""
        tables = {prefix: np.zeros(1 << self.digit, dtype=np.int64) for prefix in prefixes}
        last = (1 << self.digit) - 1
        for _, piece in flat_pieces(self.volume, self.slab_bytes):
            keys = self._keys(piece)
            leading = keys >> (shift + self.digit)
            for prefix, table in tables.items():
                table += self._counted(keys[leading == prefix] >> shift & last)
        return tables

    def _counted(self, digits: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount(digits.astype(np.int64), minlength=1 << self.digit)

    def _keys(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the finite values as unsigned numbers in the same order."""
        unsigned = np.dtype(f"u{self.dtype.itemsize}")
        top = 1 << (self.bits - 1)
        values = values.astype(self.dtype, copy=False)
        if self.dtype.kind in "bu":
            return values.view(unsigned)
        if self.dtype.kind == "i":
            return np.asarray(values.view(unsigned) ^ unsigned.type(top))
        raw = values[np.isfinite(values)].view(unsigned)
        # The larger a negative number's bits, the smaller the number.
        return np.asarray(np.where(raw >= top, ~raw, raw | unsigned.type(top)))

    def _value(self, key: int) -> float:
        top = 1 << (self.bits - 1)
        if self.dtype.kind == "b":
            return float(bool(key))
        if self.dtype.kind == "i":
            key ^= top
        if self.dtype.kind == "f":
            key = key ^ top if key >= top else key ^ ((1 << self.bits) - 1)
        raw = np.asarray([key], dtype=f"u{self.dtype.itemsize}")
        return float(raw.view(self.dtype)[0])


def _digit_at(table: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return the digit that holds `rank`, and the rank among the values with that digit."""
    upto = np.cumsum(table)
    digit = int(np.searchsorted(upto, rank, side="right"))
    return digit, rank - int(upto[digit] - table[digit])


def _neighbours(place: float, count: int) -> tuple[int, int]:
    before = min(math.floor(place), count - 1)
    return before, min(before + 1, count - 1)


def _between(before: float, after: float, share: float) -> float:
    """Interpolate as numpy does, to the last bit."""
    step = after - before
    return after - step * (1 - share) if share >= 0.5 else before + step * share


def _label_values(piece: NDArray[Any]) -> NDArray[Any]:
    """Return the distinct values of `piece` after checking that they are labels."""
    if piece.dtype.kind in "bu" and piece.dtype.itemsize <= 2:
        return np.flatnonzero(np.bincount(piece))
    values = np.unique(piece)
    if piece.dtype.kind not in "biuf" or not (values == np.trunc(values)).all():
        shown = ", ".join(map(str, values[:4].tolist()))
        raise InputError(f"values {shown} of type {piece.dtype}, expected labels: whole numbers")
    return values


class _Kept:
    """The voxels of one label value whose mixed positions are smallest."""

    def __init__(self, limit: int, seed: int) -> None:
        self.limit = limit
        self.seed = seed
        self.count = 0
        self.positions = np.zeros(0, dtype=np.int64)
        self._orders = np.zeros(0, dtype=np.uint64)

    def add(self, positions: NDArray[np.int64]) -> None:
        self.count += positions.size
        orders = _mixed(positions, self.seed)
        if self._orders.size == self.limit:  # most newcomers stand no chance
            near = orders < self._orders.max()
            positions, orders = positions[near], orders[near]
        self.positions = np.concatenate([self.positions, positions])
        self._orders = np.concatenate([self._orders, orders])
        if self._orders.size > self.limit:
            first = np.argpartition(self._orders, self.limit - 1)[: self.limit]
            self.positions, self._orders = self.positions[first], self._orders[first]


def _mixed(positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Return a number per position that looks random; no two are alike (splitmix64)."""
    mixed = positions.astype(np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64((seed * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
