"""How hard a phantom scroll is: every number that the three difficulties differ in.

They were set by eye, from the look of the pictures alone, before any recipe was tuned on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigurationError

__all__ = ["DIFFICULTIES", "Difficulty", "difficulty_named"]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Geometry and look of a phantom; lengths in voxels, grey values of 0..255.

    Args:
        spacing_vx: mean distance between the recto surfaces of neighbouring windings.
        least_spacing_vx: the same where windings are pressed together.
        bunching: share of the spacing by which every other gap is narrower than the mean, at most.
        wander_vx: how far a winding strays from its even place, one standard deviation.
        wave_vx: height of the waves that all windings share, one standard deviation.
        wave_length_vx: distance over which those waves are alike.
        thickness_vx: of the papyrus, of which the recto layer takes the first 2.
        holes: per 10,000 square voxels of sheet.
        hole_radius_vx: mean radius of a hole.
        tears: long and narrow holes per 10,000 square voxels of sheet.
        raggedness_vx: how uneven the edges of holes and tears are.
        air: grey value between sheets.
        contrast: grey value of papyrus above that of air.
        recto_gain: how much denser the recto layer is than the mean, the verso layer less dense.
        fibre: share of the density that differs from fibre to fibre.
        dust: grey values of loose matter in the air.
        brightness: share by which the brightness drifts through the volume.
        blur_vx: standard deviation of the point spread.
        noise: standard deviation of the grey values.
        ring: standard deviation of the ring artefacts.
    """

    spacing_vx: float
    least_spacing_vx: float
    bunching: float
    wander_vx: float
    wave_vx: float
    wave_length_vx: float
    thickness_vx: float
    holes: float
    hole_radius_vx: float
    tears: float
    raggedness_vx: float
    air: float
    contrast: float
    recto_gain: float
    fibre: float
    dust: float
    brightness: float
    blur_vx: float
    noise: float
    ring: float


DIFFICULTIES = {
    "easy": Difficulty(
        spacing_vx=32.0,
        least_spacing_vx=10.0,
        bunching=0.0,
        wander_vx=3.0,
        wave_vx=2.5,
        wave_length_vx=22.0,
        thickness_vx=5.5,
        holes=0.4,
        hole_radius_vx=3.0,
        tears=0.1,
        raggedness_vx=0.8,
        air=45.0,
        contrast=115.0,
        recto_gain=0.17,
        fibre=0.14,
        dust=4.0,
        brightness=0.04,
        blur_vx=0.6,
        noise=5.5,
        ring=1.2,
    ),
    "medium": Difficulty(
        spacing_vx=29.0,
        least_spacing_vx=6.8,
        bunching=0.4,
        wander_vx=6.0,
        wave_vx=3.5,
        wave_length_vx=17.0,
        thickness_vx=5.5,
        holes=0.9,
        hole_radius_vx=3.5,
        tears=0.35,
        raggedness_vx=1.2,
        air=55.0,
        contrast=85.0,
        recto_gain=0.14,
        fibre=0.2,
        dust=7.0,
        brightness=0.09,
        blur_vx=0.8,
        noise=8.5,
        ring=3.0,
    ),
    "hard": Difficulty(
        spacing_vx=27.0,
        least_spacing_vx=5.4,
        bunching=0.6,
        wander_vx=8.0,
        wave_vx=4.5,
        wave_length_vx=14.0,
        thickness_vx=5.2,
        holes=1.4,
        hole_radius_vx=4.0,
        tears=0.7,
        raggedness_vx=1.6,
        air=65.0,
        contrast=62.0,
        recto_gain=0.12,
        fibre=0.26,
        dust=9.0,
        brightness=0.14,
        blur_vx=0.95,
        noise=11.0,
        ring=5.0,
    ),
}


def difficulty_named(name: str) -> Difficulty:
    """Return the parameters of `easy`, `medium` or `hard`.

    Raises:
        ConfigurationError: there is no such difficulty.
    """
    if name not in DIFFICULTIES:
        known = ", ".join(DIFFICULTIES)
        raise ConfigurationError(f"difficulty of the scroll phantom is {name!r}; expected {known}")
    return DIFFICULTIES[name]
