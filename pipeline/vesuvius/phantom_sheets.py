"""A wound sheet as maps: where each winding lies, where it is torn, and which voxels it takes.

A voxel has a height (distance from the axis of the scroll, or from a traced surface) and two
coordinates on the sheet. A winding is a map of heights over these coordinates, so that waves, tears
and fibres are drawn on flat maps and follow the sheet through the volume. The windings of a spiral
are one long map cut into turns: the last column of a turn is the first of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, pi

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.vesuvius.phantom_difficulty import Difficulty

__all__ = [
    "RECTO_VX", "Chart", "Windings", "coil", "place", "smooth_noise", "spiral_chart", "stack",
    "truth",
]  # fmt: skip

Floats = NDArray[np.float32]

RECTO_VX = 2.0  # thickness of the recto layer, which is what the label marks
_SHARE = (0.028, 0.068)  # of labelled voxels, well inside of the 2 to 8 % of real volumes
_SOFT_VX = 1.5  # rounding where a winding comes to lie on its neighbour
_SMALLEST_ISLAND_PX, _SMALLEST_HOLE_PX = 60, 5


@dataclass(frozen=True)
class Chart:
    """Coordinates of the voxels, each `(D, H, W)`.

    Args:
        height: distance along the direction in which the sheets follow each other.
        along: column on the maps, along the winding.
        across: row on the maps, along the axis.
        valid: where the coordinates mean anything.
        shape_px: columns and rows of the maps; column `shape_px[0]` is the first of the next turn.
        arc_px: columns per voxel at height 1 of a spiral; 0 where columns are voxels everywhere.
        closed: the chart goes once around, and turns continue into each other.
    """

    height: Floats
    along: Floats
    across: Floats
    valid: NDArray[np.bool_]
    shape_px: tuple[int, int]
    arc_px: float = 0.0
    closed: bool = False

    def every(self, step: int) -> Chart:
        """Return the coordinates of every `step`-th voxel along each axis, `step` off the faces."""
        part = (slice(step + step // 2, -step, step),) * 3
        fields = (self.height[part], self.along[part], self.across[part], self.valid[part])
        return Chart(*fields, self.shape_px, self.arc_px, self.closed)

    def sample(self, maps: NDArray[np.floating], turn: NDArray[np.intp] | int) -> Floats:
        """Return what `maps` `(K, A + 1, B)` hold for the voxels, by linear interpolation."""
        turns = turn if isinstance(turn, int) else turn.reshape(-1)
        return self.at(slice(None), maps, turns).reshape(self.height.shape)

    def at(
        self,
        voxels: NDArray[np.intp] | slice,
        maps: NDArray[np.floating],
        turn: NDArray[np.intp] | int,
    ) -> Floats:
        """Return what `maps` hold for some voxels, given by their place in the flat volume."""
        columns, rows = maps.shape[1:]
        flat = maps.reshape(-1)
        along, across = self.along.reshape(-1)[voxels], self.across.reshape(-1)[voxels]
        column = np.clip(along.astype(np.intp), 0, columns - 2)
        row = np.clip(across.astype(np.intp), 0, rows - 1)
        right, up = np.clip(along - column, 0, 1), np.clip(across - row, 0, 1)
        first = (turn * columns + column) * rows + row
        low = flat[first] * (1 - right) + flat[first + rows] * right
        if not up.any():  # rows are planes of the volume in a spiral
            return np.asarray(low, np.float32)
        first = first + (row < rows - 1)
        high = flat[first] * (1 - right) + flat[first + rows] * right
        return np.asarray(low * (1 - up) + high * up, np.float32)


@dataclass(frozen=True)
class Windings:
    """Maps of the windings, each `(K, A + 1, B)`, ordered by height.

    Args:
        height: of the recto surface; the papyrus lies above it.
        cosine: of the slope, which turns a difference in height into a distance.
        edge: distance to the nearest hole in voxels, negative in the hole.
    """

    height: Floats
    cosine: Floats
    edge: Floats


def spiral_chart(rng: np.random.Generator, size_vx: tuple[int, int, int]) -> Chart:
    """Put the axis of a scroll roughly along z, inside of the box or beside it."""
    depth, height, width = size_vx
    closed = bool(rng.random() < 0.25)
    side = max(height, width)
    far = float(rng.uniform(0.05, 0.3) if closed else rng.uniform(0.75, 1.7)) * side
    direction = float(rng.uniform(-pi, pi))
    tilt_y, tilt_x = (float(slope) for slope in rng.uniform(-0.08, 0.08, 2))
    z = np.arange(depth)[:, None, None] - depth / 2
    sine, cosine = float(np.sin(direction)), float(np.cos(direction))
    y = np.arange(height)[None, :, None] - height / 2 + far * sine - tilt_y * z
    x = np.arange(width)[None, None] - width / 2 + far * cosine - tilt_x * z
    radius = np.sqrt(y**2 + x**2)
    # Counted from the direction of the box, so that the cut lies behind the axis.
    angle = np.arctan2(y * cosine - x * sine, x * cosine + y * sine)
    low, high = (-pi, pi) if closed else (float(angle.min()), float(angle.max()))
    middle = 0.5 * float(radius.min() + radius.max())
    columns = ceil((high - low) * middle)
    along = (angle - low) / (high - low) * columns
    across = np.broadcast_to(np.arange(depth, dtype=np.float32)[:, None, None], size_vx)
    return Chart(
        radius.astype(np.float32),
        along.astype(np.float32),
        across,
        np.ones(size_vx, np.bool_),
        (columns, depth),
        columns / (high - low),
        closed,
    )


def coil(rng: np.random.Generator, chart: Chart, difficulty: Difficulty) -> Windings:
    """Wind a sheet around the axis of a spiral chart."""
    lowest, highest = float(chart.height.min()), float(chart.height.max())
    start = float(rng.uniform(0.3, 1.0))
    spacing = difficulty.spacing_vx
    inner = start * 0.7 * spacing if chart.closed else lowest - (start + 0.5) * spacing
    count = ceil((highest - inner) / (0.6 * spacing)) + 2
    wave, wander = _unevenness(rng, chart, difficulty, count)
    columns = chart.shape_px[0]
    turns = (np.arange(columns + 1) / columns)[None, :, None] + np.arange(count)[:, None, None]
    if chart.closed:  # the innermost turn has no neighbour to rest on, and joins the next evenly
        wander = wander * np.clip(turns / 2, 0, 1)
    else:
        turns = np.floor(turns[:, :1])
    turns = turns + _bunching(rng, difficulty, turns)
    edge = _edges(rng, chart, difficulty, count)

    def windings(spacing_vx: float) -> Windings:
        raw = inner + wave + wander + spacing_vx * turns
        height = _pressed(raw, difficulty.least_spacing_vx)
        return Windings(height, _cosine(chart, height), edge)

    return _settled(chart, windings, spacing)


def stack(rng: np.random.Generator, chart: Chart, difficulty: Difficulty) -> Windings:
    """Lay windings on both sides of a traced surface, which itself stays where it is."""
    reach = float(np.abs(chart.height[chart.valid]).max(initial=0.0))
    spacing = difficulty.spacing_vx
    each = ceil(reach / (0.6 * spacing)) + 1
    wander = _unevenness(rng, chart, difficulty, 2 * each + 1)[1]
    wander[each] = 0
    edge = _edges(rng, chart, difficulty, 2 * each + 1)
    turns = np.arange(-each, each + 1.0)[:, None, None]
    bunching = _bunching(rng, difficulty, turns)
    turns += bunching - bunching[each]

    def windings(spacing_vx: float) -> Windings:
        raw = spacing_vx * turns + wander
        above = _pressed(raw[each:], difficulty.least_spacing_vx)
        below = -_pressed(-raw[each::-1], difficulty.least_spacing_vx)
        height = np.concatenate([below[:0:-1], above])
        return Windings(height, _cosine(chart, height), edge)

    return _settled(chart, windings, spacing)


def place(chart: Chart, windings: Windings) -> NDArray[np.intp]:
    """Return for each voxel the winding on whose recto surface it lies or stands, -1 below all."""
    turn = np.full(chart.height.shape, -1, np.intp)
    for number in range(len(windings.height)):
        turn += chart.height >= chart.sample(windings.height, number) - 0.5
    return turn


def truth(chart: Chart, windings: Windings, turn: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return the recto layer `(D, H, W)`; no two windings touch, not even at a corner.

    A step from a voxel to a neighbour on the same sheet is short on the maps, a step to another
    winding is a whole turn long. A voxel with such a neighbour in the next winding is left out.
    """
    mask = _recto(chart, windings, turn)
    columns = chart.shape_px[0]
    place_on_sheet = np.where(mask, chart.along + columns * turn.astype(np.float32), -np.inf)
    furthest = ndimage.maximum_filter(place_on_sheet, 3)
    return np.asarray(mask & ~(furthest > place_on_sheet + 0.5 * columns))


def smooth_noise(
    rng: np.random.Generator, shape: Sequence[int], sigma: float | Sequence[float]
) -> NDArray[np.float64]:
    """Return periodic noise of mean 0 and standard deviation 1 that is alike over `sigma` cells."""
    noise = ndimage.gaussian_filter(rng.standard_normal(tuple(shape)), sigma, mode="wrap")
    noise -= noise.mean()
    return np.asarray(noise / max(float(noise.std()), 1e-12))


def cut_into_turns(long_map: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Cut `(K * A, B)` into turns `(K, A + 1, B)` that share a column with the next one."""
    turns = long_map.reshape(-1, columns, long_map.shape[1])
    following = np.roll(turns[:, :1], -1, axis=0)
    return np.concatenate([turns, following], axis=1)


def _unevenness(
    rng: np.random.Generator, chart: Chart, difficulty: Difficulty, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the waves `(1, A + 1, B)` of all windings and the wander `(K, A + 1, B)` of each."""
    columns, rows = chart.shape_px
    length = difficulty.wave_length_vx
    wave = difficulty.wave_vx * smooth_noise(rng, (columns, rows), length)
    # Finer ripples, as dried papyrus has.
    wave += 0.12 * difficulty.wave_vx * smooth_noise(rng, (columns, rows), 0.3 * length)
    wander = smooth_noise(rng, (count * columns, rows), 28.0)
    wander = difficulty.wander_vx * cut_into_turns(wander, columns)
    return np.concatenate([wave, wave[:1]])[None], wander


def _bunching(
    rng: np.random.Generator, difficulty: Difficulty, turns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return by how many turns each winding is nearer to its neighbour, in pairs."""
    phase = float(rng.uniform(0.3, 0.7)) * pi * (1 if rng.random() < 0.5 else -1)
    return np.asarray(0.5 * difficulty.bunching * np.sin(pi * turns + phase))


def _edges(rng: np.random.Generator, chart: Chart, difficulty: Difficulty, count: int) -> Floats:
    """Return the signed distance to holes and tears with ragged edges."""
    columns, rows = chart.shape_px
    shape = (count * columns, rows)
    away = np.full(shape, 40.0)
    area = columns * rows * count / 1e4
    for narrow, number in ((False, difficulty.holes), (True, difficulty.tears)):
        for _ in range(int(rng.poisson(number * area))):
            _punch(rng, away, difficulty.hole_radius_vx, narrow)
    away += difficulty.raggedness_vx * smooth_noise(rng, shape, 1.3)
    sheet = away > 0
    sheet = _without_small(sheet, _SMALLEST_ISLAND_PX)
    sheet = ~_without_small(~sheet, _SMALLEST_HOLE_PX)
    magnitude = np.maximum(np.abs(away), 0.05)
    edge = np.where(sheet, magnitude, -magnitude)
    return cut_into_turns(edge, columns).astype(np.float32)


def _punch(
    rng: np.random.Generator, away: NDArray[np.float64], radius_vx: float, narrow: bool
) -> None:
    """Lower `away` to the distance from one elliptic hole where that is nearer."""
    columns, rows = away.shape
    middle = rng.uniform(0, 1, 2) * (columns, rows)
    radius = radius_vx * float(rng.uniform(0.6, 1.6))
    long, short = (radius * float(rng.uniform(3, 6)), 0.45 * radius) if narrow else (radius, radius)
    # Papyrus tears along its fibres, which run along and across the winding.
    turn = (0.0 if rng.random() < 0.5 else pi / 2) + float(rng.normal(0, 0.2))
    reach = ceil(long + 6)
    left, right = max(int(middle[0]) - reach, 0), min(int(middle[0]) + reach + 1, columns)
    low, high = max(int(middle[1]) - reach, 0), min(int(middle[1]) + reach + 1, rows)
    x = np.arange(left, right)[:, None] - middle[0]
    y = np.arange(low, high)[None] - middle[1]
    u = (x * np.cos(turn) + y * np.sin(turn)) / long
    v = (y * np.cos(turn) - x * np.sin(turn)) / short
    distance = (np.sqrt(u**2 + v**2) - 1) * short
    window = away[left:right, low:high]
    np.minimum(window, distance, out=window)


def _without_small(mask: NDArray[np.bool_], least_px: int) -> NDArray[np.bool_]:
    labels, _ = ndimage.label(mask)
    keep = np.bincount(labels.ravel()) >= least_px
    keep[0] = False
    return np.asarray(keep[labels])


def _pressed(raw: NDArray[np.float64], least_vx: float) -> Floats:
    """Let each winding rest on the one below it instead of cutting through it."""
    height = np.empty_like(raw)
    height[0] = raw[0]
    for number in range(1, len(raw)):
        rest = height[number - 1] + least_vx
        above = raw[number] - rest
        height[number] = rest + 0.5 * (above + np.sqrt(above**2 + _SOFT_VX**2))
    # A grid far coarser than rounding errors gives one geometry on every machine.
    return (np.round(height * 4096) / 4096).astype(np.float32)


def _cosine(chart: Chart, height: Floats) -> Floats:
    """Return the cosine of the slope of the windings."""
    per_voxel = chart.arc_px / np.maximum(height, 4.0) if chart.arc_px else np.float32(1.0)
    along = np.gradient(height, axis=1) * per_voxel
    across = np.gradient(height, axis=2)
    return np.asarray(1 / np.sqrt(1 + along**2 + across**2), np.float32)


def _recto(chart: Chart, windings: Windings, turn: NDArray[np.intp]) -> NDArray[np.bool_]:
    own = np.maximum(turn, 0)
    rise = chart.height - chart.sample(windings.height, own)
    depth = rise * chart.sample(windings.cosine, own)
    whole = chart.sample(windings.edge, own) > 0
    return np.asarray((depth >= 0) & (depth < RECTO_VX) & whole & chart.valid & (turn >= 0))


def _settled(chart: Chart, windings: Callable[[float], Windings], spacing_vx: float) -> Windings:
    """Space the windings so that their share of the volume is that of real volumes."""
    coarse = chart.every(3)  # which also leaves out the frame without labels
    for _ in range(8):
        wound = windings(spacing_vx)
        share = float(_recto(coarse, wound, place(coarse, wound)).mean())
        if _SHARE[0] <= share <= _SHARE[1]:
            break
        wanted = float(np.clip(share, *_SHARE)) / max(share, _SHARE[0] / 2)
        spacing_vx = spacing_vx / wanted**0.8 * (1.01 if share > _SHARE[1] else 0.99)
    return wound
