"""A level of a pyramid made of the finer one, a piece at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError

__all__ = ["Reduction", "check_reduction", "fill_level", "halved", "reduced"]

Reduction = Literal["mean", "nearest", "max"]


def check_reduction(path: Path, reduce: str, dtype: np.dtype[Any]) -> Reduction:
    """Return `reduce` if it is known and has a meaning for `dtype`.

    Raises:
        ConfigurationError: it has not.
    """
    known: tuple[Reduction, ...] = get_args(Reduction)
    for one in known:
        if one == reduce:
            if one == "mean" and (dtype.kind == "b" or (dtype.kind in "iu" and dtype.itemsize > 4)):
                raise ConfigurationError(
                    f"{path}: no mean of {dtype}, which are labels; set reduce to nearest or max"
                )
            return one
    raise ConfigurationError(f"reduce must be one of {', '.join(known)}, got {reduce!r}")


def halved(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the next level and the factor per axis: 2 where there is an extent.

    Example:
        >>> halved((3, 1, 7, 8))
        ((3, 1, 4, 4), (1, 1, 2, 2))
    """
    lead = len(shape) - 3
    factors = tuple(2 if axis >= lead and length > 1 else 1 for axis, length in enumerate(shape))
    lengths = tuple(-(-length // factor) for length, factor in zip(shape, factors, strict=True))
    return lengths, factors


def fill_level(target: Any, finer: Any, factors: Sequence[int], reduce: Reduction) -> None:
    """Write all of `target` from `finer`.

    Args:
        target: the zarr array to write, whole files at a time.
        finer: the array `factors` times as fine.
        factors: per axis 1 or 2.
        reduce: how voxels become one.
    """
    unit = target.shards or target.chunks
    for region in _pieces([range(0, length) for length in target.shape], unit):
        buffer = np.empty([part.stop - part.start for part in region], target.dtype)
        for piece in _pieces([range(part.start, part.stop) for part in region], target.chunks):
            source = tuple(
                slice(part.start * factor, part.stop * factor)  # at an odd end one less is there
                for part, factor in zip(piece, factors, strict=True)
            )
            inside = tuple(
                slice(part.start - outer.start, part.stop - outer.start)
                for part, outer in zip(piece, region, strict=True)
            )
            buffer[inside] = reduced(finer[source], factors, reduce)
        target[region] = buffer


def reduced(block: NDArray[Any], factors: Sequence[int], reduce: Reduction) -> NDArray[Any]:
    """Return `block` with each axis divided by its factor of 1 or 2; an odd end stands alone.

    Args:
        block: voxels whose first one is the first of a pair along every axis.
        factors: per axis.
        reduce: `mean` (whole numbers rounded to even), `nearest` or `max`.

    Example:
        >>> reduced(np.uint8([[[0, 2, 9]], [[2, 4, 8]]]), (2, 1, 2), "mean")
        array([[[2, 8]]], dtype=uint8)
    """
    halves = [axis for axis, factor in enumerate(factors) if factor == 2]
    result = block
    for axis in halves:
        whole = (slice(None),) * axis
        first = result[(*whole, slice(0, None, 2))]
        if reduce != "nearest":
            second = result[(*whole, slice(1, None, 2))]
            paired = (*whole, slice(0, second.shape[axis]))
            first = first.astype(np.float64 if reduce == "mean" else block.dtype)
            if reduce == "max":
                np.maximum(first[paired], second, out=first[paired])
            else:
                with np.errstate(invalid="ignore"):  # opposite infinities: their mean is NaN
                    first[paired] += second
                first[paired] /= 2
        result = first
    if halves and reduce == "mean" and block.dtype.kind in "iu":
        np.rint(result, out=result)
    return result.astype(block.dtype, copy=False)


def _pieces(bounds: Sequence[range], lengths: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield the slices that divide `bounds` into pieces of `lengths`, the last ones shorter."""
    axes = [
        [slice(start, min(start + length, bound.stop)) for start in bound[::length]]
        for bound, length in zip(bounds, lengths, strict=True)
    ]
    yield from itertools.product(*axes)
