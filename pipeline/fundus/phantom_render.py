"""From vessel trees to pixels: exact masks and a photograph of them.

Geometry is a signed distance: a vessel is the union of round cones between neighbouring points of
its centreline, negative inside. The label asks whether a pixel's centre is inside; the photograph
takes the share of the pixel that is covered, blurred as a lens and a JPEG would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit

from pipeline.fundus.phantom_tree import Anatomy, Vessel

__all__ = ["Frame", "VesselMaps", "photograph", "rasterise"]

_LONGEST_PIECE_PX = 3.0
_THINNEST_PX = 0.55  # radius; below this a vessel would be a dotted line

# Absorption of green light by a wide vein, and the width at which it is 63 % of that, fitted by eye
# to how the contrast of real vessels grows with their width.
_ABSORPTION = {"vein": (0.12, 0.385, 0.21), "artery": (0.05, 0.31, 0.20)}
_HALF_DEPTH = 0.0105

_PALETTES = (  # mean colour of the retina, 0..1
    (0.80, 0.46, 0.29),
    (0.70, 0.35, 0.19),
    (0.84, 0.38, 0.27),
    (0.76, 0.40, 0.22),
    (0.86, 0.50, 0.33),
)


@dataclass(frozen=True)
class Frame:
    """The pixel grid: its size and where the field of view lies on it.

    Args:
        height: rows.
        width: columns.
        centre: x and y of the centre of the field of view in pixels.
        radius: of the field of view in pixels.
        mirrored: the disc lies on the right.
    """

    height: int
    width: int
    centre: tuple[float, float]
    radius: float
    mirrored: bool

    @property
    def scale(self) -> float:
        """Size in relation to a photograph of 512 x 512 pixels."""
        return self.radius / 243.2

    @property
    def margin_px(self) -> float:
        """How far outside of a vessel its signed distance is known."""
        return max(2.0, 1.6 * self.scale)

    def to_pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `(N, 2)` points of the eye in pixels; a pixel's centre is a whole number."""
        sign = np.array([-1.0 if self.mirrored else 1.0, 1.0])
        return np.asarray(points * sign * self.radius + np.array(self.centre))

    def to_eye(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return x `(1, W)` and y `(H, 1)` of the pixel centres in units of the eye."""
        sign = -1.0 if self.mirrored else 1.0
        x = sign * (np.arange(self.width, dtype=np.float64) - self.centre[0]) / self.radius
        y = (np.arange(self.height, dtype=np.float64) - self.centre[1]) / self.radius
        return x[None], y[:, None]

    def fov(self) -> NDArray[np.bool_]:
        """Return the field of view `(H, W)`."""
        x, y = self.to_eye()
        return np.asarray(x**2 + y**2 <= 1, dtype=np.bool_)


@dataclass(frozen=True)
class VesselMaps:
    """What the pixels know about the vessels, each `(H, W)`.

    Args:
        distance: signed distance to the nearest wall in pixels, at most `Frame.margin_px`.
        depth: thickness of vessel behind the pixel, in units of the eye.
        reflex: 1 on the centreline of wide vessels, falling to 0 on either side.
    """

    distance: NDArray[np.float64]
    depth: NDArray[np.float64]
    reflex: NDArray[np.float64]


def rasterise(vessels: Sequence[Vessel], frame: Frame, shift_px: float = 0.0) -> VesselMaps:
    """Draw vessels.

    Args:
        vessels: what to draw.
        frame: where to draw.
        shift_px: displacement of every centreline along both axes.
    """
    shape = (frame.height, frame.width)
    maps = VesselMaps(np.full(shape, frame.margin_px), np.zeros(shape), np.zeros(shape))
    if not vessels:
        return maps
    pieces = [_pieces(vessel, frame) for vessel in vessels]
    starts, ends, radii = (np.concatenate(part) for part in zip(*pieces, strict=True))
    starts, ends = starts + shift_px, ends + shift_px
    windows = np.ceil(radii.max(axis=1) + _LONGEST_PIECE_PX / 2 + frame.margin_px).astype(np.int64)
    for window in np.unique(windows):
        chosen = windows == window
        _draw(maps, frame, int(window), starts[chosen], ends[chosen], radii[chosen])
    return maps


def _pieces(
    vessel: Vessel, frame: Frame
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return starts `(N, 2)`, ends `(N, 2)` and radii `(N, 2)` in pixels, none longer than 3 px."""
    points = frame.to_pixels(vessel.points)
    steps = np.hypot(*np.diff(points, axis=0).T)
    parts = max(1, ceil(float(steps.max()) / _LONGEST_PIECE_PX))
    knots = np.arange(len(points), dtype=np.float64)
    fine = np.linspace(0, len(points) - 1, parts * (len(points) - 1) + 1)
    x, y = (_smooth(fine, knots, column) for column in points.T)
    line = np.stack([x, y], axis=1)
    radius = np.maximum(np.interp(fine, knots, vessel.radius) * frame.radius, _THINNEST_PX)
    return line[:-1], line[1:], np.stack([radius[:-1], radius[1:]], axis=1)


def _smooth(
    fine: NDArray[np.float64], knots: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interpolate by Catmull-Rom, which passes through the values without a kink."""
    padded = np.concatenate([[2 * values[0] - values[1]], values, [2 * values[-1] - values[-2]]])
    left = np.minimum(fine.astype(np.int64), len(knots) - 2)
    t = fine - left
    before, start, end, after = (padded[left + offset] for offset in range(4))
    linear = 0.5 * (end - before)
    square = before - 2.5 * start + 2 * end - 0.5 * after
    cube = 0.5 * (after - before) + 1.5 * (start - end)
    return np.asarray(start + t * (linear + t * (square + t * cube)))


def _draw(
    maps: VesselMaps,
    frame: Frame,
    window: int,
    starts: NDArray[np.float64],
    ends: NDArray[np.float64],
    radii: NDArray[np.float64],
) -> None:
    """Draw pieces that fit in `2 * window + 1` pixels, all of them at once."""
    offsets = np.arange(-window, window + 1)
    middle = np.rint((starts + ends) / 2).astype(np.int64)
    columns = middle[:, 0, None, None] + offsets[None, None]
    rows = middle[:, 1, None, None] + offsets[None, :, None]
    along = (ends - starts)[:, :, None, None]
    x, y = columns - starts[:, 0, None, None], rows - starts[:, 1, None, None]
    squared = np.maximum((along**2).sum(axis=1), 1e-12)
    share = np.clip((x * along[:, 0] + y * along[:, 1]) / squared, 0, 1)
    radius = radii[:, :1, None] + share * (radii[:, 1:, None] - radii[:, :1, None])
    off_axis = np.hypot(x - share * along[:, 0], y - share * along[:, 1])
    inside = (rows >= 0) & (rows < frame.height) & (columns >= 0) & (columns < frame.width)
    inside &= off_axis < radius + frame.margin_px
    index = (rows * frame.width + columns)[inside]
    off_axis, radius = off_axis[inside], radius[inside]
    np.minimum.at(maps.distance.reshape(-1), index, (off_axis - radius))
    chord = np.sqrt(np.maximum((radius + 0.4) ** 2 - off_axis**2, 0)) / frame.radius
    np.maximum.at(maps.depth.reshape(-1), index, (2 * chord))
    wide = np.clip((2 * radius / frame.radius - 0.012) / 0.014, 0, 1)
    ridge = wide * np.exp(-((off_axis / (0.3 * radius)) ** 2))
    np.maximum.at(maps.reflex.reshape(-1), index, ridge)


def photograph(
    rng: np.random.Generator,
    frame: Frame,
    anatomy: Anatomy,
    veins: VesselMaps,
    arteries: VesselMaps,
) -> NDArray[np.uint8]:
    """Render the colour photograph, `(H, W, 3)`."""
    scale = frame.scale
    light = _retina(rng, frame, anatomy)
    for maps, kind, shine in ((veins, "vein", 0.07), (arteries, "artery", 0.20)):
        covered = np.clip(0.5 - maps.distance, 0, 1)
        depth = 1 - np.exp(-maps.depth / _HALF_DEPTH)
        for channel, absorption in enumerate(_ABSORPTION[kind]):
            visible = 1 - absorption * depth * covered
            light[..., channel] *= visible * (1 + shine * maps.reflex * (0.5, 1, 0.9)[channel])
    light = _lens(light, 0.55 * scale)
    light = _rim(rng, light, frame)
    grain = rng.standard_normal(light.shape)
    grain = ndimage.gaussian_filter(grain, (0.5, 0.5, 0)) * 0.016
    light = light + np.where(frame.fov()[..., None], grain, 0.35 * grain)
    return (np.clip(_soft_chroma(light, scale), 0, 1) * 255 + 0.5).astype(np.uint8)


def _lens(light: NDArray[np.float64], sigma_px: float) -> NDArray[np.float64]:
    """Blur each channel; red and blue are a little out of focus."""
    blurred = [
        ndimage.gaussian_filter(light[..., channel], sigma_px * factor)
        for channel, factor in enumerate((1.25, 1.0, 1.35))
    ]
    return np.asarray(np.stack(blurred, axis=-1))


def _soft_chroma(light: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Keep brightness sharp and blur the colour differences, as JPEG does."""
    brightness = light @ np.array([0.3, 0.59, 0.11])
    difference = light - brightness[..., None]
    sigma = max(0.6, 0.8 * scale)
    softened = ndimage.gaussian_filter(difference, (sigma, sigma, 0))
    return np.asarray(brightness[..., None] + softened)


def _noise(rng: np.random.Generator, frame: Frame, size: float) -> NDArray[np.float64]:
    """Return smooth noise of unit standard deviation whose blobs have `size` in units of the eye.

    The grid it is drawn on depends on `size` alone, so that one seed gives one picture at all
    resolutions.
    """
    cells = max(4, round(2.4 / size))
    coarse = rng.standard_normal((cells, cells))
    x, y = frame.to_eye()
    column = (x[0] / 2.4 + 0.5) * (cells - 1)
    row = (y[:, 0] / 2.4 + 0.5) * (cells - 1)
    fine = ndimage.spline_filter(coarse, 3)
    weights = [_spline_matrix(axis, cells) for axis in (row, column)]
    values = weights[0] @ fine @ weights[1].T
    return np.asarray(values / 0.75)


def _spline_matrix(place: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Return the cubic B-spline weights `(N, cells)` of the places on a row of cells."""
    distance = np.abs(np.clip(place, 0, cells - 1)[:, None] - np.arange(cells))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.asarray(np.where(distance < 1, near, far))


def _retina(rng: np.random.Generator, frame: Frame, anatomy: Anatomy) -> NDArray[np.float64]:
    """Return the retina without vessels: colour, uneven light, macula and optic disc."""
    x, y = frame.to_eye()
    colour = np.array(_PALETTES[int(rng.integers(len(_PALETTES)))]) * rng.uniform(0.94, 1.06, 3)
    tilt_x, tilt_y = rng.uniform(-0.25, 0.25, 2)
    fall = float(rng.uniform(0.16, 0.34))
    light = 1.06 - fall * ((x - tilt_x) ** 2 + (y - tilt_y) ** 2)
    for size, amplitude in (
        (0.5, 0.03),
        (0.16, 0.015),
        (0.06, 0.012),
        (0.028, 0.010),
        (0.014, 0.010),
    ):
        light = light + amplitude * _noise(rng, frame, size)
    light = np.maximum(light, 0.1)  # far outside of the disc, where a wide frame has its corners
    hue = 0.024 * _noise(rng, frame, 0.5) + 0.012 * _noise(rng, frame, 0.12)
    pale = 0.05 * _noise(rng, frame, 0.6)
    channels = [
        colour[0] * light**0.8 * (1 + 0.3 * pale),
        colour[1] * light * (1 - hue + pale),
        colour[2] * light * (1 - 0.9 * hue + 0.2 * pale),
    ]
    retina = np.stack(np.broadcast_arrays(*channels), axis=-1)
    retina *= _macula(rng, anatomy, x, y)
    return _with_disc(rng, anatomy, frame, retina)


def _macula(
    rng: np.random.Generator, anatomy: Anatomy, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the factor `(H, W, 3)` by which pigment darkens the macula, most at its centre."""
    squared = (x - anatomy.macula[0]) ** 2 + (1.1 * (y - anatomy.macula[1])) ** 2
    wide = np.exp(-squared / 0.052)[..., None] * np.array([0.10, 0.17, 0.16])
    pit = np.exp(-squared / 0.008)[..., None] * np.array([0.07, 0.16, 0.10])
    return np.asarray(1 - rng.uniform(0.7, 1.15) * (wide + pit))


def _with_disc(
    rng: np.random.Generator, anatomy: Anatomy, frame: Frame, retina: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Lay the optic disc over `retina`: a pale halo, a yellow-pink rim and a bright cup."""
    x, y = frame.to_eye()
    dx, dy = (x - anatomy.disc[0]), (y - anatomy.disc[1]) * float(rng.uniform(0.86, 0.98))
    away = np.hypot(dx, dy) / anatomy.disc_radius + 0.03 * _noise(rng, frame, 0.09)
    cup_x = 0.14 * anatomy.disc_radius
    cup_size = float(rng.uniform(0.36, 0.56)) * anatomy.disc_radius
    cup = expit((1 - np.hypot(dx - cup_x, dy) / cup_size) * 7)
    inside = expit((1 - away) * 22)
    halo = 0.10 * np.exp(-(((away - 1) / 0.45) ** 2)) * (away > 0.8)
    temporal = np.clip(dx / anatomy.disc_radius, -1, 1)
    gain = float(rng.uniform(0.93, 1.07))
    rim = np.stack(
        [0.93 + 0.03 * temporal, 0.61 + 0.10 * temporal, 0.36 + 0.05 * temporal], axis=-1
    )
    bright = np.array([1.0, 0.87, 0.52])
    disc = rim + cup[..., None] * (bright - rim)
    mottled = gain * (1 + 0.02 * _noise(rng, frame, 0.04))[..., None]
    out = retina * (1 + halo[..., None] * np.array([0.6, 1.2, 1.0]))
    out = out + inside[..., None] * (disc * mottled - out)
    return np.asarray(out)


def _rim(rng: np.random.Generator, light: NDArray[np.float64], frame: Frame) -> NDArray[np.float64]:
    """Fade to the dark surround at the rim, each channel by a slightly different circle."""
    x, y = frame.to_eye()
    fringe = rng.uniform(-0.003, 0.003, (3, 2))
    black = np.array([0.012, 0.009, 0.008]) * rng.uniform(0.5, 2.5)
    out = np.empty_like(light)
    for channel in range(3):
        shift_x, shift_y = fringe[channel]
        inwards = (1 - np.hypot(x - shift_x, y - shift_y)) * frame.radius
        soft = np.clip(inwards / 1.8 + 0.35, 0, 1) * (
            1 - 0.3 * np.exp(-np.abs(inwards) / (0.01 * frame.radius))
        )
        out[..., channel] = black[channel] + soft * light[..., channel]
    return out
