"""The retina of a drawn eye, and the section through it that a B-scan shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

__all__ = ["ROWS_PX", "WIDTH_MM", "Bump", "Eye", "Section", "Vessel", "cut_section", "draw_eye"]

Rows = NDArray[np.float64]
Laterality = Literal["OD", "OS"]

ROWS_PX = 496.0  # the lengths below, in rows, are those of a B-scan of so many
WIDTH_MM = 8.8
_OUTER_PX = 16.0  # from the inner segments to BM
_BAND_PX = 22.0  # of that and the outer limiting membrane
_RANGE_SHARE = 0.32  # of the height, that BM may rise and fall
_TOP_SHARE = 0.09
_BOTTOM_SHARE = 0.16


@dataclass(frozen=True)
class Bump:
    """A druse: `at_mm` from the fovea, in both directions, so high and so wide."""

    at_mm: tuple[float, float]
    height_px: float
    radius_mm: float


@dataclass(frozen=True)
class Vessel:
    """A vessel that crosses the sections: where, with what slant, and what light passes it."""

    at_mm: float
    slant: float
    width_mm: float
    passes: float


@dataclass(frozen=True)
class Eye:
    """What all B-scans of an eye share; lengths in rows of a B-scan of 496.

    Attributes:
        laterality: tells where the nose is: right of the fovea in `OD`, left in `OS`.
        thickness_px, rim_px, pit_px: of the retina far from the fovea, what the rim around the
            fovea adds, and what the pit takes away.
        nerve_fibres_px: thickness of the nerve fibre layer, which grows towards the nose.
        curvature: how far BM rises, in rows per square millimetre from the fovea.
        drusen: below the retinal pigment epithelium.
        vessels: in the inner retina.
        gain: brightness of the whole.
        grain: of the speckle, in grey values.
        vitreous: its mean grey value.
    """

    laterality: Laterality
    thickness_px: float
    rim_px: float
    pit_px: float
    nerve_fibres_px: float
    curvature: float
    drusen: tuple[Bump, ...]
    vessels: tuple[Vessel, ...]
    gain: float
    grain: float
    vitreous: float


@dataclass(frozen=True)
class Section:
    """The boundaries of the layers in a B-scan, as rows `(W,)`, from the top down.

    A row is that of the first pixel of the layer below. No boundary lies above its predecessor.

    Attributes:
        ilm: inner limiting membrane.
        nfl: end of the nerve fibres.
        ipl: end of ganglion cells and inner plexiform layer.
        inl: end of the inner nuclear layer.
        opl: end of the outer plexiform layer.
        elm: outer limiting membrane.
        segments: beginning of the photoreceptors' segments.
        rpe: end of the retinal pigment epithelium, above BM where there are drusen.
        bm: Bruch's membrane.
        light: share of the light that passes the vessels.
        place_mm: distance of each column from the fovea's, along the B-scan.
    """

    ilm: Rows
    nfl: Rows
    ipl: Rows
    inl: Rows
    opl: Rows
    elm: Rows
    segments: Rows
    rpe: Rows
    bm: Rows
    light: Rows
    place_mm: Rows


def draw_eye(rng: np.random.Generator, laterality: Laterality) -> Eye:
    """Draw an eye: healthy, or in a quarter of cases with drusen."""
    many = int(rng.integers(3, 12)) if rng.random() < 0.25 else 0
    return Eye(
        laterality=laterality,
        thickness_px=rng.uniform(68, 78),
        rim_px=rng.uniform(20, 32),
        pit_px=rng.uniform(42, 54),
        nerve_fibres_px=rng.uniform(9, 15),
        curvature=rng.uniform(0.3, 3.0),
        drusen=tuple(
            Bump(
                (rng.uniform(-3.5, 3.5), rng.uniform(-1.5, 1.5)),
                rng.uniform(5, 22),
                rng.uniform(0.1, 0.35),
            )
            for _ in range(many)
        ),
        vessels=tuple(
            Vessel(
                rng.uniform(-4.6, 4.6),
                rng.uniform(-1, 1),
                rng.uniform(0.03, 0.11),
                rng.uniform(0.5, 0.92),
            )
            for _ in range(int(rng.integers(6, 15)))
        ),
        gain=rng.uniform(0.82, 1.06),
        grain=rng.uniform(15, 21),
        vitreous=rng.uniform(0, 18),
    )


def cut_section(
    rng: np.random.Generator, eye: Eye, offset_mm: float, height: int, width: int
) -> Section:
    """Cut an eye `offset_mm` above the fovea, tilted and placed at random inside the frame."""
    scale = height / ROWS_PX
    place = (np.arange(width) - (width - 1) / 2) / width * WIDTH_MM + rng.uniform(-1.2, 1.2)
    radius = np.hypot(place, offset_mm)
    nasal = place if eye.laterality == "OD" else -place
    pit = np.exp(-((radius / 0.55) ** 2))
    retina = eye.thickness_px + eye.rim_px * np.exp(-((radius / 1.7) ** 2)) - eye.pit_px * pit
    retina += _wander(rng, width, 0.05, 0.8)
    lift = _lift(eye, place, offset_mm)
    outer = np.minimum(_BAND_PX + 16 + 9 * pit + lift, 0.9 * retina)  # photoreceptors whole
    inner = retina - outer
    fibres = eye.nerve_fibres_px * (1 - pit) * np.clip(0.75 + 0.2 * nasal, 0.35, 2.4)
    fibres = np.minimum(fibres + _wander(rng, width, 0.02, 0.4), 0.5 * inner).clip(min=0)
    rest = inner - fibres
    bm = _placed(rng, eye, place, retina * scale, height)
    ilm = bm - retina * scale
    rpe = bm - lift * scale
    return Section(
        ilm=ilm,
        nfl=ilm + fibres * scale,
        ipl=ilm + (fibres + 0.5 * rest) * scale,
        inl=ilm + (fibres + 0.76 * rest) * scale,
        opl=ilm + inner * scale,
        elm=np.maximum(rpe - _BAND_PX * scale, ilm + inner * scale),
        segments=np.maximum(rpe - (_OUTER_PX + 2 * pit) * scale, ilm + inner * scale),
        rpe=rpe,
        bm=bm,
        light=_light(rng, eye, place, offset_mm),
        place_mm=place,
    )


def _wander(rng: np.random.Generator, width: int, share: float, deviation: float) -> Rows:
    """Return a smooth random curve; `share` of the width is how far it remembers."""
    sigma = max(share * width, 1.0)
    curve = gaussian_filter1d(rng.standard_normal(width), sigma, mode="reflect")
    return np.asarray(curve * deviation / max(float(curve.std()), 1e-6))


def _lift(eye: Eye, place: Rows, offset_mm: float) -> Rows:
    """Return how far drusen lift the retinal pigment epithelium, in rows."""
    lift = np.zeros_like(place)
    for druse in eye.drusen:
        away = np.hypot(place - druse.at_mm[0], offset_mm - druse.at_mm[1])
        lift = np.maximum(lift, druse.height_px * np.exp(-((away / druse.radius_mm) ** 2)))
    return np.where(lift > 0.3, lift, 0.0)


def _placed(rng: np.random.Generator, eye: Eye, place: Rows, retina: Rows, height: int) -> Rows:
    """Return BM as a curved and tilted line, such that all of the retina lies in the frame."""
    scale = height / ROWS_PX
    shape = -eye.curvature * place**2 + rng.uniform(-10, 10) * place
    shape += _wander(rng, len(place), 0.12, 2.5) + _wander(rng, len(place), 0.02, 0.35)
    shape *= scale
    shape *= min(1.0, _RANGE_SHARE * height / max(float(np.ptp(shape)), 1e-6))
    low = _TOP_SHARE * height - float((shape - retina).min())
    high = (1 - _BOTTOM_SHARE) * height - float(shape.max())
    return np.asarray(shape + rng.uniform(low, max(low + 1, min(high, low + 0.35 * height))))


def _light(rng: np.random.Generator, eye: Eye, place: Rows, offset_mm: float) -> Rows:
    light = 1 + _wander(rng, len(place), 0.06, 0.05)
    for vessel in eye.vessels:
        away = np.abs(place - vessel.at_mm - vessel.slant * offset_mm) / (vessel.width_mm / 2)
        light *= 1 - (1 - vessel.passes) / (1 + away**6)
    return np.asarray(light)
