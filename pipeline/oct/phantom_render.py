"""Grey values of a drawn section: bands, choroid, shadows, vitreous and speckle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.oct.phantom_anatomy import ROWS_PX, Eye, Section

__all__ = ["bscan"]

Image = NDArray[np.float64]

# Mean grey values of Spectralis B-scans as the device shows them (the fourth root of its signal).
_FIBRES, _GANGLION, _INNER_NUCLEAR, _OUTER_PLEXIFORM, _OUTER_NUCLEAR = (
    165.0,
    131.0,
    97.0,
    118.0,
    74.0,
)
_MYOID, _ELLIPSOID, _BETWEEN, _PIGMENT, _DRUSE = 92.0, 206.0, 158.0, 209.0, 128.0
_STEEP_PX = 2.2  # from the middle of a sharp boundary to its end
_CHOROID = np.array(  # rows below BM, grey value
    [
        (_STEEP_PX, 131),
        (4, 119),
        (8, 107),
        (15, 82),
        (25, 60),
        (40, 40),
        (60, 24),
        (90, 9),
        (140, 0),
    ]
)
_TISSUE_GRAIN = 0.62  # of the speckle of the vitreous
_FADING = np.array([(0.0, 30.0, 90.0, 160.0), (1.0, 1.0, 0.4, 0.08)])  # rows below BM, share


def bscan(rng: np.random.Generator, eye: Eye, section: Section, height: int) -> Image:
    """Return a B-scan `(H, W)`, grey values 0..255 with fractions."""
    scale = height / ROWS_PX
    row = np.arange(height, dtype=np.float64)[:, None]
    below_bm = (row - (section.bm - 0.5)) / scale
    tissue = np.maximum(_bands(section, scale, height), _choroid(rng, below_bm, scale))
    tissue *= _texture(rng, tissue.shape, scale)
    tissue *= _shading(section, row, scale)
    vitreous = _vitreous(rng, eye, section, row, scale)
    image = np.maximum(tissue * eye.gain, np.where(row < section.ilm, vitreous, 0.0))
    noise = _field(rng, image.shape, 0.85)
    return np.clip(image + eye.grain * noise * _graininess(section, below_bm, row), 0, 255)


def _graininess(section: Section, below_bm: Image, row: Image) -> Image:
    """Return how strong the speckle is: most in the vitreous, hardly any far below the retina."""
    tissue = np.where(row < section.ilm, 1.0, _TISSUE_GRAIN)
    return np.asarray(tissue * np.interp(below_bm, _FADING[0], _FADING[1]))


def _bands(section: Section, scale: float, height: int) -> Image:
    """Return the retina and what fills drusen: straight lines between knots, column by column.

    The middle of the rise at the ILM and of the fall at BM lies half a pixel above the row: between
    the last pixel of the one layer and the first of the other.
    """
    rows, values = zip(*_knots(section, scale), strict=True)
    # Where layers vanish knots fall together: they stay in order.
    knots = np.maximum.accumulate(np.stack(rows) - 0.5, axis=0)
    greys = np.stack(np.broadcast_arrays(*values, section.bm)[:-1])
    row = np.arange(height)
    columns = [
        np.interp(row, knot, grey, 0.0, 0.0) for knot, grey in zip(knots.T, greys.T, strict=True)
    ]
    return np.stack(columns, axis=1)


def _knots(section: Section, scale: float) -> list[tuple[Image, Image | float]]:
    """Return rows `(W,)` and their grey values, from the top down."""
    s, steep, soft = section, _STEEP_PX * scale, 1.3 * scale
    span = s.rpe - s.segments
    druse = np.clip((s.bm - s.rpe) / (3 * steep), 0, 1)
    filling = _PIGMENT - druse * (_PIGMENT - _DRUSE)
    return [
        (s.ilm - steep, 0.0),
        (s.ilm + steep, 0.92 * _FIBRES),
        (np.minimum(s.ilm + 2 * steep, s.nfl), _FIBRES + 12),
        (s.nfl - soft, 0.95 * _FIBRES),
        (s.nfl + soft, _GANGLION + 8),
        (s.ipl - soft, _GANGLION - 4),
        (s.ipl + soft, _INNER_NUCLEAR),
        (s.inl - soft, _INNER_NUCLEAR - 3),
        (s.inl + soft, _OUTER_PLEXIFORM + 6),
        (s.opl - soft, _OUTER_PLEXIFORM),
        (s.opl + 3 * soft, _OUTER_NUCLEAR + 4),
        (s.elm - soft, _OUTER_NUCLEAR - 4),
        (s.elm, _MYOID + 12),
        (s.elm + soft, _MYOID - 2),
        (s.segments - soft, _MYOID + 6),
        (s.segments + soft, _ELLIPSOID),
        (s.segments + 0.22 * span, _ELLIPSOID),
        (s.segments + 0.40 * span, _BETWEEN),
        (s.segments + 0.60 * span, _PIGMENT),
        (s.rpe - steep, _PIGMENT),
        (np.minimum(s.rpe + steep, s.bm - steep), filling),
        (s.bm - steep, filling + 25 * druse),
        (s.bm + steep, _CHOROID[0, 1]),
    ]


def _choroid(rng: np.random.Generator, below: Image, scale: float) -> Image:
    """Return what lies below BM: bright grains, then dark and bright vessels, fading away."""
    width = below.shape[1]
    reach = np.exp(0.25 * _field(rng, (width,), 0.08 * width))
    depth = np.where(below < 15, below, 15 + (below - 15) / reach)
    grey = np.interp(depth, _CHOROID[:, 0], _CHOROID[:, 1], left=0.0)
    fine = _field(rng, below.shape, 1.8 * scale)
    coarse = _field(rng, below.shape, (7 * scale, 10 * scale))
    relief = 0.22 * fine * np.exp(-np.abs(depth - 10) / 20)
    relief += 0.5 * coarse * np.clip((depth - 6) / 20, 0, 1)
    return np.asarray(grey * np.clip(1 + relief, 0.1, 2.0))


def _texture(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Image:
    """Return factors around 1: tissue is not the same everywhere along a layer."""
    patches = _field(rng, shape, (1.2 * scale, 5 * scale))
    return np.asarray(1 + 0.045 * patches)


def _shading(section: Section, row: Image, scale: float) -> Image:
    """Return the light that reaches each pixel: vessels take it from what lies below them."""
    entered = np.clip((row - section.ilm - 9 * scale) / (8 * scale), 0, 1)
    return np.asarray(1 - (1 - section.light) * entered)


def _vitreous(
    rng: np.random.Generator, eye: Eye, section: Section, row: Image, scale: float
) -> Image:
    """Return the vitreous: dark, in some B-scans with haze or the hyaloid's faint line."""
    width = len(section.ilm)
    level = eye.vitreous + 4 * _field(rng, (width,), 0.1 * width)
    grey = np.broadcast_to(level, (len(row), width)).copy()
    if rng.random() < 0.6:
        line = section.ilm.min() * rng.uniform(0.3, 0.8) + rng.uniform(-0.04, 0.04) * (
            np.arange(width) - width / 2
        )
        line = line + 6 * scale * _field(rng, (width,), 0.08 * width)
        patchy = _field(rng, (width,), 0.03 * width).clip(0, 1.5)
        thick = rng.uniform(3, 8) * scale
        grey += rng.uniform(8, 28) * patchy * np.exp(-(((row - line) / thick) ** 2))
    if rng.random() < 0.3:
        middle, half = rng.uniform(0, section.ilm.min()), rng.uniform(8, 40) * scale
        grey += rng.uniform(8, 40) * np.exp(-(((row - middle) / half) ** 2))
    return grey


def _field(
    rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, float]
) -> NDArray[np.float32]:
    """Return smooth random numbers with a mean around 0 and a standard deviation of 1."""
    field = gaussian_filter(rng.standard_normal(shape, np.float32), sigma, truncate=3.0)
    return np.asarray(field / max(float(field.std()), 1e-9), np.float32)
