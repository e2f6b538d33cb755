"""How much a voxel of a window counts, and the sum of these weights at every voxel of an image.

A result is the sum of weight times prediction over the windows that cover a voxel, divided by the
sum of their weights: no epsilon, no clamp, and float32 or better whatever the input's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.inference.windows import Grid

__all__ = ["WEIGHTS", "Blending", "Weights"]

Weights = Literal["gaussian", "separable", "constant"]
WEIGHTS: tuple[Weights, ...] = ("gaussian", "separable", "constant")

_SIGMA = 0.125  # of a window's length, MONAI's
_FLOOR = 1e-2  # per axis: a corner of a volume's window counts 1e-6 of its middle
_SLAB_ELEMENTS = 2**17  # divided at once: they stay in the cache


class Blending:
    """The weights of a window and of a grid.

    Args:
        grid: the windows.
        weights: `gaussian`: MONAI's, clamped from below, which is no product of axes.
            `separable`: the product of one Gaussian per axis, each with its own floor, so that the
            sum over all windows is a product too and takes no memory. `constant`: all alike.
        device, dtype: where and in what the sums are made.

    Attributes:
        window: weight of a window's voxels `(*roi)`.
    """

    def __init__(
        self,
        grid: Grid,
        weights: Weights = "gaussian",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if weights not in WEIGHTS:
            raise ConfigurationError(
                f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}"
            )
        self.grid = grid
        self.weights = weights
        self._pattern: Tensor | None = None
        if weights == "gaussian":
            self.window = compute_importance_map(grid.roi, "gaussian", _SIGMA, device, dtype)
            return
        axes = [_axis_weights(length, weights) for length in grid.roi]
        self.window = _outer(axes).to(device, dtype)
        places = zip(grid.size, grid.starts, axes, strict=True)
        first, *rest = (1 / _axis_sum(*place) for place in places)
        self._inverse_first = first.to(device, dtype)
        self._inverse_rest = _outer(rest).to(device, dtype) if rest else None

    def normalise(self, total: Tensor, first: int = 0) -> None:
        """Divide sums of weighted predictions by the sums of weights, in place.

        Args:
            total: `(C, planes, *rest)`: planes of the image, whole.
            first: index of the first one along the image's first axis.
        """
        step = max(1, _SLAB_ELEMENTS // max(1, math.prod(self.grid.size[1:])))
        for low in range(0, total.shape[1], step):
            part = total[:, low : low + step]
            if self.weights == "gaussian":
                part /= self._sum(first + low, first + low + part.shape[1])
            else:
                self._scale(part, first + low)

    def _scale(self, part: Tensor, first: int) -> None:
        along = self._inverse_first[first : first + part.shape[1]]
        part *= along.view(-1, *[1] * (part.ndim - 2))
        if self._inverse_rest is not None:
            part *= self._inverse_rest

    def _sum(self, low: int, high: int) -> Tensor:
        """Return the sum of all windows' weights in the planes from `low` to before `high`."""
        if self._pattern is None:
            self._pattern = self._row_pattern()
        depth = self.grid.roi[0]
        total = self._pattern.new_zeros((high - low, *self._pattern.shape[1:]))
        for start in self.grid.starts[0]:
            a, b = max(start, low), min(start + depth, high)
            if a < b:
                total[a - low : b - low] += self._pattern[a - start : b - start]
        return total

    def _row_pattern(self) -> Tensor:
        """Return the summed weights of the windows with one start along the first axis."""
        shape = (self.grid.roi[0], *self.grid.size[1:])
        pattern = self.window.new_zeros(shape)
        for _, *starts in self.grid.row(0):
            box = (slice(s, s + p) for s, p in zip(starts, self.grid.roi[1:], strict=True))
            pattern[(slice(None), *box)] += self.window
        return pattern


def _axis_weights(length: int, weights: Weights) -> Tensor:
    if weights == "constant":
        return torch.ones(length, dtype=torch.float64)
    x = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    return torch.exp(-(x**2) / (2 * (_SIGMA * length) ** 2)).clamp_(min=_FLOOR)


def _axis_sum(size: int, starts: Sequence[int], axis: Tensor) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + len(axis)] += axis
    return total


def _outer(axes: Sequence[Tensor]) -> Tensor:
    product = axes[0]
    for axis in axes[1:]:
        product = product.unsqueeze(-1) * axis
    return product
