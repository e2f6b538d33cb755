"""Where the windows stand: their starts along every axis, in a fixed order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigurationError

__all__ = ["Grid", "check_overlap", "make_grid"]

Overlap = float | int | Sequence[float | int]


@dataclass(frozen=True)
class Grid:
    """Windows over an image, in lexicographic order of their starts.

    The order is part of the result: sums of floating-point numbers depend on it.

    Attributes:
        size: of the image, in pixels or voxels per axis; never smaller than `roi`.
        roi: of a window.
        starts: first index of the windows along each axis, ascending. They cover the axis.
    """

    size: tuple[int, ...]
    roi: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(len(starts) for starts in self.starts)

    @property
    def row_count(self) -> int:
        """Number of windows that share a start along the first axis."""
        return math.prod(len(starts) for starts in self.starts[1:])

    def row(self, start: int) -> Iterator[tuple[int, ...]]:
        """Yield the starts of the windows that begin at `start` along the first axis."""
        return ((start, *rest) for rest in itertools.product(*self.starts[1:]))

    def touching(self, low: Sequence[int], high: Sequence[int]) -> Grid:
        """Return the windows that share a voxel with the box from `low` to before `high`."""
        starts = tuple(
            tuple(start for start in axis if start < end and start + length > begin)
            for axis, length, begin, end in zip(self.starts, self.roi, low, high, strict=True)
        )
        return Grid(self.size, self.roi, starts)


def make_grid(
    size: Sequence[int], roi: Sequence[int], overlap: Overlap = 0.25, *, even: bool = False
) -> Grid:
    """Place windows so that they cover an image.

    Args:
        size: of the image, at least `roi` along every axis.
        roi: of a window.
        overlap: share of a window that the next one covers, in [0, 1), or a whole number of voxels
            from 1 on; one for all axes or one per axis.
        even: False steps by a fixed stride and moves the last window inwards, as MONAI does. True
            takes as many windows and spreads them evenly: the same cost, more overlap.

    Raises:
        ConfigurationError: `overlap` is out of range.

    Example:
        >>> make_grid((110,), (64,), 0.5).starts
        ((0, 32, 46),)
        >>> make_grid((110,), (64,), 0.5, even=True).starts
        ((0, 23, 46),)
    """
    overlaps = check_overlap(overlap, roi)
    axes = zip(size, roi, overlaps, strict=True)
    starts = tuple(_starts(n, p, _stride(p, share), even) for n, p, share in axes)
    return Grid(tuple(size), tuple(roi), starts)


def check_overlap(overlap: Overlap, roi: Sequence[int]) -> tuple[float | int, ...]:
    """Return the overlap of every axis.

    Raises:
        ConfigurationError: it is neither a fraction below 1 nor a number of voxels below `roi`.
    """
    overlaps = tuple(overlap) if isinstance(overlap, Sequence) else (overlap,) * len(roi)
    if len(overlaps) != len(roi):
        raise ConfigurationError(
            f"overlap {list(overlaps)} has {len(overlaps)} axes, roi_size {list(roi)} has "
            f"{len(roi)}; give one number, or one per axis"
        )
    for length, share in zip(roi, overlaps, strict=True):
        whole = isinstance(share, int) and not isinstance(share, bool)
        if not (0 <= share < (length if whole else 1)):
            raise ConfigurationError(
                f"overlap must be a fraction in [0, 1) or a number of voxels below the window's "
                f"{length}, got {share!r}; write 0.25 or {max(1, length // 4)}"
            )
    return overlaps


def _stride(length: int, overlap: float | int) -> int:
    if isinstance(overlap, int):
        return length - overlap
    # 100 * (1 - 0.9) is 9.99..., and MONAI takes 9: the same windows matter more than the tenth.
    return max(1, int(length * (1 - overlap)))


def _starts(size: int, length: int, stride: int, even: bool) -> tuple[int, ...]:
    last = size - length
    if last < 0:
        raise ConfigurationError(f"a window of {length} is larger than the image's {size}")
    count = math.ceil(last / stride) + 1
    if even:
        return tuple(round(i * last / max(1, count - 1)) for i in range(count))
    return tuple(min(i * stride, last) for i in range(count))
