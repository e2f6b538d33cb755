"""The outlines of drawn insects: parts, legs and wings in a frame of their own.

The head points along x, the length from head to tail is about 1, the middle lies at the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.classification.phantom_traits import Build

__all__ = ["BODIES", "Body", "Part", "legs_of"]

Points = NDArray[np.float64]  # (N, 2), x and y
_Profile = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _oval(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.clip(1 - x**2, 0, None))


def _drop(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a width that is largest before the tip, as of a wing or a bee's abdomen."""
    return _oval(x) * (0.62 + 0.38 * x)


def _worm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.clip(1 - x**8, 0, 1))


def _wedge(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(x + 1, 0, None) / 2


def _shield(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the width of a stink bug: broad shoulders, straight sides to a round tail."""
    before = np.sqrt(np.clip((1 - x) / 0.55, 0, None))
    return np.minimum(before, (0.58 + 0.29 * (x + 1)) * np.clip((x + 1) / 0.35, 0, 1) ** 0.5)


@dataclass(frozen=True)
class Part:
    """A part of a body: an axis, and a half-width along it.

    Args:
        start, end: of the axis, `(x, y)`.
        width: largest half-width.
        profile: half-width over the largest, along the axis from -1 to 1.
        tone: brightness over that of the body's colour.
        patterned: whether the class's pattern is on it.
        opacity: 1, less for the wings of flies.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    width: float
    profile: _Profile = _oval
    tone: float = 1.0
    patterned: bool = False
    opacity: float = 1.0

    def points(self, along: NDArray[np.float64], across: NDArray[np.float64]) -> Points:
        """Return points given along the axis (-1 to 1) and across it, in shares of the width."""
        start, end = np.asarray(self.start), np.asarray(self.end)
        axis = (end - start) / 2
        normal = np.array([-axis[1], axis[0]]) / max(float(np.hypot(*axis)), 1e-9)
        half = self.width * self.profile(along) * across
        return np.asarray((start + end) / 2 + along[:, None] * axis + half[:, None] * normal)

    def outline(
        self, first: float = -1.0, last: float = 1.0, low: float = -1.0, high: float = 1.0
    ) -> Points:
        """Return the outline between two places along the axis, and two shares of the width."""
        along = np.linspace(first, last, 25)
        upper = self.points(along, np.full(25, high))
        lower = self.points(along[::-1], np.full(25, low))
        return np.concatenate([upper, lower])


@dataclass(frozen=True)
class Body:
    """An insect's build.

    Args:
        parts: from below to above.
        legs: places along the body where a pair begins.
        leg_length: of a leg, hind legs longer by `hind`.
        hind: length of the hind legs over that of the others.
        antennae: their length; 0 for none.
        half_width: where legs begin.
        bend: how far the body may curve.
        seam: whether a line divides the wing cases.
        segments: dark rings along the patterned parts.
    """

    parts: tuple[Part, ...]
    legs: tuple[float, ...] = (0.22, 0.08, -0.06)
    leg_length: float = 0.34
    hind: float = 1.2
    antennae: float = 0.25
    half_width: float = 0.08
    bend: float = 0.04
    seam: bool = False
    segments: int = 0
    head: float = field(default=0.45)


def legs_of(body: Body, side: int, length: float, sway: NDArray[np.float64]) -> list[Points]:
    """Return the legs of one side as lines of four points.

    Args:
        body: the build.
        side: 1 or -1.
        length: over the usual one.
        sway: turn of each leg in radians.
    """
    lines = []
    middle = (len(body.legs) - 1) / 2
    for index, place in enumerate(body.legs):
        last = index == len(body.legs) - 1
        reach = body.leg_length * length * (body.hind if last else 1.0)
        spread = 0.75 * (middle - index) / max(middle, 1) + float(sway[index])
        root = np.array([place, side * body.half_width])
        knee = root + 0.5 * reach * np.array([np.sin(spread), side * np.cos(spread)])
        lower = spread * 1.5 + (-0.35 if index > middle else 0.2)
        foot = knee + 0.6 * reach * np.array([np.sin(lower), side * np.cos(lower) * 0.8])
        toe = foot + 0.12 * reach * np.array([np.sign(spread or 1), 0.3 * side])
        lines.append(np.stack([root, knee, foot, toe]))
    return lines


def _wings(
    root: float, tip: tuple[float, float], width: float, **settings: float | bool
) -> tuple[Part, Part]:
    """Return a pair of wings from the middle line outwards."""
    return tuple(  # type: ignore[return-value]
        Part((root, 0.03 * s), (tip[0], s * tip[1]), width, _drop, **settings)  # type: ignore[arg-type]
        for s in (1, -1)
    )


BODIES: dict[Build, Body] = {
    "beetle": Body(
        parts=(
            Part((0.3, 0), (0.5, 0), 0.1, tone=0.6),
            Part((0.1, 0), (0.4, 0), 0.2, tone=0.75),
            Part((-0.5, 0), (0.28, 0), 0.28, patterned=True),
        ),
        legs=(0.26, 0.08, -0.14), half_width=0.18, seam=True, head=0.48,
    ),
    "moth": Body(
        parts=(
            *_wings(-0.05, (-0.52, 0.42), 0.23, tone=0.85, patterned=True),
            *_wings(0.14, (0.14, 0.74), 0.29, patterned=True),
            Part((-0.5, 0), (0.12, 0), 0.075, tone=0.6),
            Part((0.0, 0), (0.3, 0), 0.09, tone=0.7),
            Part((0.26, 0), (0.4, 0), 0.06, tone=0.55),
        ),
        legs=(), antennae=0.34, head=0.38,
    ),
    "wasp": Body(
        parts=(
            *_wings(0.14, (-0.42, 0.42), 0.1, tone=1.6, opacity=0.45),
            *_wings(0.1, (-0.28, 0.26), 0.07, tone=1.6, opacity=0.45),
            Part((-0.55, 0), (-0.02, 0), 0.14, _drop, patterned=True),
            Part((-0.06, 0), (0.06, 0), 0.025, tone=0.5),
            Part((0.02, 0), (0.3, 0), 0.11, tone=0.65),
            Part((0.28, 0), (0.46, 0), 0.1, tone=0.8),
        ),
        leg_length=0.3, hind=1.35, antennae=0.24, head=0.44,
    ),
    "caterpillar": Body(
        parts=(
            Part((-0.55, 0), (0.5, 0), 0.12, _worm, patterned=True),
            Part((0.4, 0), (0.58, 0), 0.095, tone=0.6),
        ),
        legs=(0.34, 0.26, 0.18, -0.05, -0.17, -0.29, -0.46), leg_length=0.1, hind=1.0,
        antennae=0.05, half_width=0.1, bend=0.5, segments=9, head=0.56,
    ),
    "bug": Body(
        parts=(
            Part((0.3, 0), (0.5, 0), 0.09, tone=0.8),
            Part((-0.48, 0), (0.4, 0), 0.32, _shield, patterned=True),
            Part((-0.06, 0), (0.2, 0), 0.16, _wedge, tone=0.7),
        ),
        legs=(0.22, 0.06, -0.1), half_width=0.24, antennae=0.32, head=0.47,
    ),
    "grasshopper": Body(
        parts=(
            Part((-0.6, 0), (0.2, 0), 0.09, _drop, tone=0.8),
            Part((-0.62, 0.035), (0.16, 0.035), 0.07, patterned=True),
            Part((-0.62, -0.035), (0.16, -0.035), 0.07, patterned=True),
            Part((0.08, 0), (0.36, 0), 0.1, tone=0.9),
            Part((0.32, 0), (0.52, 0), 0.085, tone=0.75),
        ),
        legs=(0.3, 0.16, 0.04), leg_length=0.26, hind=2.3, antennae=0.3, head=0.5,
    ),
    "fly": Body(
        parts=(
            Part((-0.46, 0), (0.02, 0), 0.2, patterned=True),
            Part((-0.04, 0), (0.32, 0), 0.17, tone=0.7),
            *_wings(0.16, (-0.5, 0.36), 0.14, tone=1.7, opacity=0.4),
            Part((0.28, 0), (0.46, 0), 0.14, tone=0.5),
        ),
        legs=(0.26, 0.14, 0.0), half_width=0.13, leg_length=0.36, antennae=0.06, head=0.44,
    ),
    "ant": Body(
        parts=(
            Part((-0.55, 0), (-0.12, 0), 0.17, patterned=True),
            Part((-0.16, 0), (-0.06, 0), 0.045, tone=0.7),
            Part((-0.08, 0), (0.26, 0), 0.075, tone=0.85),
            Part((0.22, 0), (0.48, 0), 0.12, tone=0.8),
        ),
        legs=(0.18, 0.09, 0.0), leg_length=0.4, half_width=0.06, head=0.46,
    ),
}  # fmt: skip
