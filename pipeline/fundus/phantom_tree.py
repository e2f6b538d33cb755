"""The vessel trees of the phantom: four arcades of arteries and veins that branch and taper.

Lengths are in units of the radius of the field of view, whose centre is the origin; x runs from the
optic disc (at negative x) to the periphery beyond the macula, y runs down. Vessels are grown one by
one, wide ones first; each turns towards where vessels of its place go, wavers, gives off branches
by Murray's law (the cubes of the radii of the branches add up to the cube of the trunk's) and stops
before it meets a vessel of its own kind or the avascular centre of the macula.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import atan2, cos, exp, hypot, pi, sin, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Anatomy", "Kind", "Vessel", "grow_vessels", "place_anatomy"]

Kind = Literal["artery", "vein"]

_STEP = 0.012
_WIDEST_VEIN = 0.0165  # radius: 8 px wide where the field of view is 486 px across
_ARTERY_TO_VEIN = 0.78
_THINNEST = 0.0022
_RIM = 1.02
_CELL = 0.016
_GRID = 136  # cells across the occupancy grid, from -1.088 to 1.088


@dataclass(frozen=True)
class Anatomy:
    """Where the landmarks of an eye lie."""

    disc: tuple[float, float]
    disc_radius: float
    macula: tuple[float, float]


@dataclass(frozen=True)
class Vessel:
    """A centreline with radii, from its origin to its end.

    Args:
        points: `(N, 2)`, x and y, N at least 2.
        radius: `(N,)`.
        kind: artery or vein.
        order: 0 for a trunk from the disc, one more at each branching.
    """

    points: NDArray[np.float64]
    radius: NDArray[np.float64]
    kind: Kind
    order: int


@dataclass(frozen=True)
class _Seed:
    """Where and how a vessel starts."""

    x: float
    y: float
    heading: float
    radius: float
    kind: Kind
    order: int
    height: float | None = None  # of the arcade it follows over the macula; None: none
    side: int = 1  # -1 above the macula, 1 below


@dataclass
class _Grower:
    """The state of one growth: random numbers, landmarks and the space already taken."""

    rng: np.random.Generator
    anatomy: Anatomy
    vessels: list[Vessel] = field(default_factory=list)
    taken: dict[Kind, NDArray[np.int32]] = field(
        default_factory=lambda: {
            "artery": np.full((_GRID, _GRID), -1, np.int32),
            "vein": np.full((_GRID, _GRID), -1, np.int32),
        }
    )


def place_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw the places of disc and macula."""
    disc = (float(rng.uniform(-0.8, -0.64)), float(rng.uniform(-0.1, 0.1)))
    macula = (
        disc[0] + float(rng.uniform(0.72, 0.82)),
        disc[1] + float(rng.uniform(0.03, 0.1)),
    )
    return Anatomy(disc, float(rng.uniform(0.145, 0.18)), macula)


def grow_vessels(rng: np.random.Generator, anatomy: Anatomy) -> list[Vessel]:
    """Grow the arteries and veins of one eye, wide ones first."""
    grower = _Grower(rng, anatomy)
    queue = _trunks(rng, anatomy)
    while queue:
        queue.sort(key=lambda seed: seed.radius)
        queue.extend(_grow(grower, queue.pop()))
    return grower.vessels


def _trunks(rng: np.random.Generator, anatomy: Anatomy) -> list[_Seed]:
    """Draw what leaves the disc: arcades, nasal vessels and small ones to the macula's side."""
    seeds = []
    for kind in ("vein", "artery"):
        scale = _WIDEST_VEIN * (1.0 if kind == "vein" else _ARTERY_TO_VEIN)
        inner = rng.choice([-1, 1]) * rng.uniform(0.04, 0.12) if kind == "artery" else 0.0
        for side in (-1, 1):
            height = rng.uniform(0.46, 0.62) - inner
            radius = scale * rng.uniform(0.85, 1.0)
            tilt = rng.uniform(1.2, 1.65)
            seeds.append(_from_disc(rng, anatomy, side * tilt, radius, kind, height, side))
            radius = scale * rng.uniform(0.5, 0.75)
            tilt = rng.uniform(1.9, 2.4)
            seeds.append(_from_disc(rng, anatomy, side * tilt, radius, kind, None, side))
        for _ in range(int(rng.integers(1, 3))):
            radius = scale * rng.uniform(0.25, 0.4)
            tilt = rng.uniform(0.2, 0.9) * rng.choice([-1, 1])
            seeds.append(_from_disc(rng, anatomy, tilt, radius, kind, None, 1))
        for _ in range(int(rng.integers(1, 4))):
            radius = scale * rng.uniform(0.22, 0.4)
            tilt = rng.uniform(2.2, 3.1) * rng.choice([-1, 1])
            seeds.append(_from_disc(rng, anatomy, tilt, radius, kind, None, 1))
    return seeds


def _from_disc(
    rng: np.random.Generator,
    anatomy: Anatomy,
    heading: float,
    radius: float,
    kind: str,
    height: float | None,
    side: int,
) -> _Seed:
    """Start near the centre of the disc, a little on the nasal side, where the vessels enter."""
    spread = 0.2 * anatomy.disc_radius
    x = anatomy.disc[0] - 0.25 * anatomy.disc_radius + rng.uniform(-spread, spread)
    y = anatomy.disc[1] + 0.25 * anatomy.disc_radius * sin(heading) + rng.uniform(-spread, spread)
    named: Kind = "vein" if kind == "vein" else "artery"
    return _Seed(float(x), float(y), float(heading), float(radius), named, 0, height, side)


def _grow(grower: _Grower, seed: _Seed) -> list[_Seed]:
    """Grow one vessel to its end, note the space it takes and return the branches it gives off."""
    rng, number = grower.rng, len(grower.vessels)
    x, y, heading, radius = seed.x, seed.y, seed.heading, seed.radius
    wander, length = 0.0, 0.0
    budget = 4.0 if seed.order == 0 and seed.height else float(rng.uniform(0.6, 1.4)) * _reach(seed)
    next_branch = _gap(rng, radius) + (grower.anatomy.disc_radius if seed.order == 0 else 0.0)
    points, radii, branches = [(x, y)], [radius], []
    while hypot(x, y) < _RIM and length < budget:
        wander = 0.88 * wander + float(rng.normal(0, 0.024))
        heading += wander + 0.14 * _turn(heading, _wanted(grower, seed, x, y, heading))
        free = _steer(grower, seed, number, (x, y), heading, length)
        if free is None:
            break
        heading += free
        x, y = round(x + _STEP * cos(heading), 9), round(y + _STEP * sin(heading), 9)
        length += _STEP
        radius = _tapered(seed, radius, length, budget)
        points.append((x, y))
        radii.append(radius)
        if length > next_branch and radius > 1.25 * _THINNEST:
            branch, radius, bend = _branch(rng, seed, (x, y), heading, radius)
            heading += bend
            branches.append(branch)
            next_branch = length + _gap(rng, radius)
    if len(points) < 5:
        return []
    path = np.array(points)
    radius_along = _with_soft_ends(np.array(radii), seed.order == 0, hypot(x, y) < _RIM)
    grower.vessels.append(Vessel(path, radius_along, seed.kind, seed.order))
    _occupy(grower.taken[seed.kind], path, number)
    return branches


def _with_soft_ends(
    radius: NDArray[np.float64], rises_from_disc: bool, ends_inside: bool
) -> NDArray[np.float64]:
    """Let a trunk come up out of the disc and a vessel that ends in the picture fade away."""
    count = len(radius)
    ramp = np.ones(count)
    if rises_from_disc:
        ramp = np.minimum(ramp, 0.35 + 0.65 * np.arange(count) / 7)
    if ends_inside:
        ramp = np.minimum(ramp, 0.2 + 0.8 * np.arange(count)[::-1] / 12)
    soft = np.maximum(radius * ramp, np.minimum(radius, _THINNEST))
    return np.asarray(soft, dtype=np.float64)


def _gap(rng: np.random.Generator, radius: float) -> float:
    return float(rng.uniform(0.4, 1.6)) * (0.165 + 1.5 * radius)


def _reach(seed: _Seed) -> float:
    """Return the usual length of a branch: wide ones go far, arcades further."""
    return (0.12 + 80 * seed.radius) * (1.6 if seed.height is not None else 1.0)


def _tapered(seed: _Seed, radius: float, length: float, budget: float) -> float:
    """Narrow slowly along the way, and to the thinnest width over the last third."""
    radius *= exp(-0.22 * _STEP)
    remaining = (budget - length) / (0.35 * budget)
    if remaining < 1:
        radius = min(radius, _THINNEST + (seed.radius - _THINNEST) * max(remaining, 0.0))
    return max(radius, _THINNEST)


def _branch(
    rng: np.random.Generator,
    seed: _Seed,
    place: tuple[float, float],
    heading: float,
    radius: float,
) -> tuple[_Seed, float, float]:
    """Split by Murray's law: the branch, the radius that goes on and the bend of the trunk."""
    wide = rng.random() < 0.3
    share = float(rng.uniform(0.6, 0.85) if wide else rng.uniform(0.3, 0.55))
    thin = max(radius * share, _THINNEST)
    rest = max((max(radius**3 - thin**3, 0.0)) ** (1 / 3), _THINNEST)
    sign = float(rng.choice([-1, 1]))
    angle = float(rng.uniform(0.55, 1.2)) * (1.15 - 0.5 * share)
    height = None
    if (
        seed.order == 0 and seed.height is not None and share > 0.5
    ):  # an arcade of its own, above or below this one
        height = seed.height * float(
            rng.uniform(1.2, 1.6) if sign == seed.side else rng.uniform(0.3, 0.7)
        )
    child = _Seed(
        *place, heading + sign * angle, thin, seed.kind, seed.order + 1, height, seed.side
    )
    return child, rest, -sign * 0.3 * share**2


def _wanted(grower: _Grower, seed: _Seed, x: float, y: float, heading: float) -> float:
    """Return the direction that vessels take at a place."""
    disc_x, disc_y = grower.anatomy.disc
    macula_x, macula_y = grower.anatomy.macula
    if seed.height is not None:
        ahead = max(x - disc_x, 0.0) + 0.16
        rise = sqrt(ahead / 0.85) if ahead < 0.85 else 1.0 - 0.22 * (ahead - 0.85)
        goal_y = disc_y + (macula_y - disc_y) * min(ahead, 1) + seed.side * seed.height * rise
        return atan2(goal_y - y, disc_x + ahead - x)
    to_macula = atan2(macula_y - y, macula_x - x)
    distance = hypot(macula_x - x, macula_y - y)
    if distance < 0.17:  # bend around the avascular centre
        away = to_macula + pi
        return heading + 1.5 * _turn(heading, away)
    if distance < 0.5 and abs(_turn(heading, to_macula)) < 1.2:
        return heading + 0.35 * _turn(heading, to_macula)
    outward = atan2(y - 0.3 * disc_y, x - 0.3 * disc_x)
    return heading + 0.16 * _turn(heading, outward)


def _steer(
    grower: _Grower,
    seed: _Seed,
    number: int,
    place: tuple[float, float],
    heading: float,
    length: float,
) -> float | None:
    """Return the turn that keeps clear of other vessels; None where the way is closed.

    A vessel leaves its parent freely. Its own kind closes the way, the other kind may be crossed
    but not followed.
    """
    macula_x, macula_y = grower.anatomy.macula
    reach = 2.6 * _CELL
    x, y = place[0] + reach * cos(heading), place[1] + reach * sin(heading)
    if hypot(macula_x - x, macula_y - y) < 0.085:
        return None
    at_disc = hypot(place[0] - grower.anatomy.disc[0], place[1] - grower.anatomy.disc[1])
    if length < 0.06 or at_disc < 1.3 * grower.anatomy.disc_radius:
        return 0.0
    own = grower.taken[seed.kind]
    other = grower.taken["vein" if seed.kind == "artery" else "artery"]
    left, right = (
        (place[0] + reach * cos(heading + side), place[1] + reach * sin(heading + side))
        for side in (-0.7, 0.7)
    )
    if _at(own, x, y) >= 0 and seed.order > 0:
        return None
    if seed.radius < 0.006 and _at(other, x, y) >= 0 and grower.rng.random() < 0.3:
        return None
    turn = 0.0
    for grid, strength in ((own, 0.16), (other, 0.06)):
        turn += strength * ((_at(grid, *left) >= 0) - (_at(grid, *right) >= 0))
    return turn


def _occupy(grid: NDArray[np.int32], path: NDArray[np.float64], number: int) -> None:
    cells = np.clip((path / _CELL + _GRID / 2).astype(np.int64), 0, _GRID - 1)
    grid[cells[:, 1], cells[:, 0]] = number


def _at(grid: NDArray[np.int32], x: float, y: float) -> int:
    column, row = int(x / _CELL + _GRID / 2), int(y / _CELL + _GRID / 2)
    if not (0 <= column < _GRID and 0 <= row < _GRID):
        return -1
    return int(grid[row, column])


def _turn(heading: float, wanted: float) -> float:
    """Return the signed angle from `heading` to `wanted`, -pi..pi."""
    return (wanted - heading + pi) % (2 * pi) - pi
