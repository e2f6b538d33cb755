"""What a tomograph makes of a wound sheet: density of papyrus, blur, rings, noise, grey values.

Papyrus is two layers of strips: on the recto side, which faces the axis, they run around the
scroll, on the verso side along it. A voxel that a face of the sheet cuts gets its share of both
sides.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.vesuvius.phantom_difficulty import Difficulty
from pipeline.vesuvius.phantom_sheets import (
    RECTO_VX,
    Chart,
    Windings,
    cut_into_turns,
    smooth_noise,
)

__all__ = ["tomogram"]

Floats = NDArray[np.float32]

_FIBRE_LONG_VX, _FIBRE_WIDE_VX = 14.0, 1.2


def tomogram(
    rng: np.random.Generator,
    chart: Chart,
    windings: Windings,
    turn: NDArray[np.intp],
    difficulty: Difficulty,
) -> NDArray[np.uint8]:
    """Scan the sheets.

    Args:
        rng: of the texture, noise and artefacts.
        chart: coordinates of the voxels.
        windings: where the sheets lie.
        turn: winding of each voxel, as `place` gives it.
        difficulty: of the phantom.

    Returns:
        Grey values `(D, H, W)`.
    """
    shape = chart.height.shape
    density = _density(rng, chart, windings, turn, difficulty)
    density = ndimage.gaussian_filter(density, difficulty.blur_vx)
    density *= 1 + difficulty.brightness * _drift(rng, shape)
    level = difficulty.air + float(rng.normal(0, 5))
    grey = level + difficulty.contrast * float(rng.uniform(0.93, 1.07)) * density
    grey += difficulty.dust * np.maximum(_drift(rng, shape, 5.0), 0) * np.maximum(1 - density, 0)
    grey += difficulty.ring * _rings(rng, shape)
    grey += difficulty.noise * _grain(rng, shape)
    return np.asarray(np.clip(np.rint(grey), 0, 255), np.uint8)


def _density(
    rng: np.random.Generator,
    chart: Chart,
    windings: Windings,
    turn: NDArray[np.intp],
    difficulty: Difficulty,
) -> Floats:
    """Return the share of papyrus in each voxel times its density."""
    sheets = _Papyrus(rng, chart, windings, difficulty)
    density: Floats = np.zeros(turn.size, np.float32)
    top = turn.reshape(-1)
    # From below upwards: a recto surface that cuts a voxel covers what lies under it.
    for below in (1, 0):
        voxels = np.flatnonzero((top >= below) & chart.valid.reshape(-1))
        covered, own = sheets.at(voxels, top[voxels] - below)
        density[voxels] = covered * own + (1 - covered) * density[voxels]
    density = density.reshape(turn.shape)
    _add_grains(rng, density)
    return density


class _Papyrus:
    """Density of the papyrus at any voxel of a winding."""

    def __init__(
        self, rng: np.random.Generator, chart: Chart, windings: Windings, difficulty: Difficulty
    ) -> None:
        count, columns, rows = len(windings.height), *chart.shape_px
        shape = (count * columns, rows)
        along, across = (_FIBRE_LONG_VX, _FIBRE_WIDE_VX), (_FIBRE_WIDE_VX, _FIBRE_LONG_VX)
        patches = 0.5 * smooth_noise(rng, shape, 6.0)

        def layer(gain: float, sigma: tuple[float, float]) -> Floats:
            fibres = smooth_noise(rng, shape, sigma) + patches
            texture = np.maximum((1 + gain) * (1 + difficulty.fibre * fibres), 0.2)
            return cut_into_turns(texture, columns).astype(np.float32)

        self._recto = layer(difficulty.recto_gain, along)
        self._verso = layer(-difficulty.recto_gain, across)
        # Fibres stand out of the verso side, so that it is rougher than the recto side.
        thickness = 0.45 * smooth_noise(rng, shape, across) + 0.5 * smooth_noise(rng, shape, 9.0)
        thickness = np.maximum(difficulty.thickness_vx + thickness, RECTO_VX + 1)
        self._thickness = cut_into_turns(thickness, columns).astype(np.float32)
        self._chart, self._windings = chart, windings

    def at(self, voxels: NDArray[np.intp], turn: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Return the covered share and the density `(N,)` of voxels of the given windings."""
        covered, own = np.zeros((2, len(voxels)), np.float32)
        chart, windings = self._chart, self._windings
        rise = chart.height.reshape(-1)[voxels] - chart.at(voxels, windings.height, turn)
        near = np.flatnonzero(rise < 14)  # beyond that no papyrus reaches, on no slope
        voxels, turn = voxels[near], turn[near]
        depth = rise[near] * chart.at(voxels, windings.cosine, turn)
        edge = chart.at(voxels, windings.edge, turn)
        # Edges of holes are frayed: thinner than the sheet.
        thickness = chart.at(voxels, self._thickness, turn) * np.clip(0.55 + 0.15 * edge, 0, 1)
        recto = np.clip(RECTO_VX + 0.5 - depth, 0, 1)
        own[near] = recto * chart.at(voxels, self._recto, turn)
        own[near] += (1 - recto) * chart.at(voxels, self._verso, turn)
        thickness = np.maximum(thickness, RECTO_VX)
        covered[near] = np.clip(0.5 + depth, 0, 1) * np.clip(thickness + 0.5 - depth, 0, 1)
        covered[near] *= np.clip(0.5 + edge, 0, 1)
        return covered, own


def _add_grains(rng: np.random.Generator, density: Floats) -> None:
    """Strew dense grains of sand and mineral, as every scan of a buried scroll has."""
    for _ in range(int(rng.poisson(density.size / 6e4))):
        middle = rng.uniform(0, 1, 3) * density.shape
        radius, gain = float(rng.uniform(0.6, 1.6)), float(rng.uniform(0.3, 1.1))
        window = tuple(
            slice(max(int(m) - 3, 0), min(int(m) + 4, n))
            for m, n in zip(middle, density.shape, strict=True)
        )
        z, y, x = np.ogrid[window]
        squared = (z - middle[0]) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2
        density[window] += np.asarray(gain * np.clip(radius + 0.5 - np.sqrt(squared), 0, 1))


def _drift(
    rng: np.random.Generator, shape: tuple[int, ...], cell_vx: float | None = None
) -> Floats:
    """Return smooth noise of mean 0 and deviation 1 over about a third of the box, or a cell."""
    cell = max(shape) / 3 if cell_vx is None else cell_vx
    counts = [ceil(length / cell) + 4 for length in shape]
    drift = rng.standard_normal(counts)
    for axis, (length, count) in enumerate(zip(shape, counts, strict=True)):
        drift = _stretched(drift, axis, length, length / cell, count)
    return np.asarray(drift / max(float(drift.std()), 1e-12), np.float32)


def _stretched(
    values: NDArray[np.float64], axis: int, length: int, cells: float, count: int
) -> NDArray[np.float64]:
    """Interpolate along one axis by cubic B-splines, which are smooth and never overshoot."""
    at = np.arange(length) * (cells / length)
    first = np.minimum(at.astype(np.intp), count - 4)
    t = at - first
    shape = [1] * values.ndim
    shape[axis] = length
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    parts = (
        np.take(values, first + offset, axis) * weight.reshape(shape)
        for offset, weight in enumerate(weights)
    )
    return np.asarray(sum(parts))


def _rings(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Return rings around the axis of the tomograph, which change slowly along it."""
    depth, height, width = shape
    middle = rng.uniform(-0.6, 1.6, 2) * (height, width)
    y, x = np.arange(height)[:, None] - middle[0], np.arange(width)[None] - middle[1]
    radius = np.sqrt(y**2 + x**2)
    count = ceil(float(radius.max())) + 2
    ring = smooth_noise(rng, (depth, count), (max(depth / 8, 4.0), 0.6))
    strength = 0.4 + 0.6 * np.abs(smooth_noise(rng, (1, count), (0, 6.0)))
    ring = (ring * strength).astype(np.float32)
    inner = radius.astype(np.intp)
    share = (radius - inner).astype(np.float32)
    return np.asarray(ring[:, inner] * (1 - share) + ring[:, inner + 1] * share)


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Return noise of deviation 1 with the short correlation that reconstruction leaves."""
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), 0.55, mode="wrap")
    return np.asarray(grain / max(float(grain.std()), 1e-12), np.float32)
