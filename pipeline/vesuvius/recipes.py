"""The steps of post-processing by name, and the chains of them that have a name.

- `default`: hysteresis threshold, frame, small components, diagonals, tunnels, gaps, cavities, and
  after smoothing the thickness. The frame goes first, so that every repair sees the volume as the
  competition's metric does.
- `original`: threshold, small components, cavities up to a size, opening and closing by a ball, and
  instances on request, as the project that came before did it. Opening by a ball of 2 removes every
  sheet thinner than four voxels.

Both smooth the probability first where asked to, which may join sheets two or three voxels apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.binary_morphology import close, open_
from pipeline.vesuvius.cavities import fill_cavities
from pipeline.vesuvius.components import hysteresis, remove_small_components, zero_frame
from pipeline.vesuvius.height_map import interpolate_gaps
from pipeline.vesuvius.plug import plug_diagonals
from pipeline.vesuvius.separation import keep_apart, separate_sheets
from pipeline.vesuvius.sheet_closing import close_sheets
from pipeline.vesuvius.smoothing import restore_thickness, smooth
from pipeline.vesuvius.tunnels import fill_tunnels

__all__ = [
    "BEFORE",
    "RECIPES",
    "STEPS",
    "VOLUMES",
    "complete_steps",
    "default_steps",
    "original_steps",
    "recipe_steps",
]

Mask = NDArray[np.bool_]


def threshold(probability: NDArray[np.float32], threshold: float = 0.5) -> Mask:
    """Return where `probability` reaches `threshold`."""
    if not 0 <= threshold <= 1:
        raise ConfigurationError(f"threshold must be a probability, 0 to 1, got {threshold!r}")
    return probability >= threshold


def opening(mask: Mask, kernel_size: float = 2) -> Mask:
    """Keep the part of `mask` in which a ball of radius `kernel_size` fits."""
    return open_(mask, kernel_size)


def closing(mask: Mask, kernel_size: float = 2) -> Mask:
    """Fill what a ball of radius `kernel_size` does not fit into. Merges sheets that are close."""
    return close(mask, kernel_size)


STEPS: dict[str, Callable[..., Mask]] = {
    "threshold": threshold,
    "hysteresis": hysteresis,
    "zero_frame": zero_frame,
    "remove_small_components": remove_small_components,
    "separate_sheets": separate_sheets,
    "keep_apart": keep_apart,
    "opening": opening,
    "closing": closing,
    "close_sheets": close_sheets,
    "plug_diagonals": plug_diagonals,
    "fill_tunnels": fill_tunnels,
    "interpolate_gaps": interpolate_gaps,
    "fill_cavities": fill_cavities,
    "restore_thickness": restore_thickness,
}
"""What a chain can be made of. Merging two components is in the nature of `closing`, and of
`fill_cavities` where something floats in a cavity; no other step does."""

BEFORE = {"smooth": smooth}
"""What may stand before the first step: from a probability to a probability."""

VOLUMES = ("mask", "probability", "unsmoothed")
"""What a step gets by the names of its arguments; all others are settings. `unsmoothed` is the
probability as it was before `BEFORE`."""

_FIRST = ("threshold", "hysteresis")


def default_steps(
    threshold: float = 0.5,
    high_threshold: float | None = None,
    min_component_size: float = 100,
    max_hole_size: int | None = None,
    kernel_size: float = 0,
    separate_instances: bool = False,
    frame: int = 3,
    hole_evidence: float = 0.4,
    smoothing: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the chain of the default recipe.

    Args:
        threshold: probability from which a voxel is surface.
        high_threshold: what each component has to reach somewhere; None is half way from the
            threshold to 1.
        min_component_size: voxels of the smallest component that stays.
        max_hole_size: cavities of more voxels stay; None fills all.
        kernel_size: radius in voxels by which each sheet is closed on its own; 0 leaves that out.
        separate_instances: cut components that are several sheets.
        frame: voxels cleared at every face: training labels have no sheet there.
        hole_evidence: share of the threshold that the probability has to reach in what fills a
            hole; where it is lower, the sheet is taken to be torn. 0 fills whatever can be filled.
        smoothing: of the probability before all else, sigma in voxels, its thickening undone at
            the end; 0 leaves it as it is.
    """
    high = (1 + threshold) / 2 if high_threshold is None else high_threshold
    least = hole_evidence * threshold
    small = {"name": "remove_small_components", "min_component_size": min_component_size}
    steps: list[dict[str, Any]] = [
        *_smoothing(smoothing),
        {"name": "hysteresis", "low": threshold, "high": high},
        {"name": "zero_frame", "frame": frame},
        small,
    ]
    if separate_instances:
        steps += [{"name": "separate_sheets"}, small]
    if kernel_size:
        steps.append({"name": "close_sheets", "radius": kernel_size})
    steps += [
        {"name": "plug_diagonals"},
        {"name": "fill_tunnels", "min_probability": least},
        {"name": "interpolate_gaps", "min_probability": least},
        {"name": "fill_cavities", "max_hole_size": max_hole_size},
    ]
    if smoothing:
        steps.append({"name": "restore_thickness", "threshold": threshold})
    return steps


def _smoothing(sigma: float) -> list[dict[str, Any]]:
    return [{"name": "smooth", "sigma": sigma}] if sigma else []


def original_steps(
    threshold: float = 0.5,
    min_component_size: float = 100,
    max_hole_size: int | None = 50,
    kernel_size: float = 2,
    separate_instances: bool = False,
    smoothing: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the chain of the original project; arguments as in `default_steps`.

    What `smoothing` adds to the thickness of sheets stays.
    """
    steps: list[dict[str, Any]] = [
        *_smoothing(smoothing),
        {"name": "threshold", "threshold": threshold},
        {"name": "remove_small_components", "min_component_size": min_component_size},
        {"name": "fill_cavities", "max_hole_size": max_hole_size},
        {"name": "opening", "kernel_size": kernel_size},
        {"name": "closing", "kernel_size": kernel_size},
    ]
    return [*steps, {"name": "separate_sheets"}] if separate_instances else steps


RECIPES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "default": default_steps,
    "original": original_steps,
}
"""Chains with a name."""


def recipe_steps(recipe: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the chain that `recipe` makes of `settings`.

    Raises:
        ConfigurationError: the recipe is unknown, or has no such setting.
    """
    if recipe not in RECIPES:
        raise ConfigurationError(f"recipe must be one of {sorted(RECIPES)}, got {recipe!r}")
    known = inspect.signature(RECIPES[recipe]).parameters
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigurationError(
            f"recipe {recipe!r} has no setting {unknown[0]!r}; it has {', '.join(known)}"
        )
    return RECIPES[recipe](**settings)


def complete_steps(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps with all their settings, those not given at their defaults.

    Raises:
        ConfigurationError: a step or a setting is unknown, or a threshold is not the first step
            after smoothing and nothing else.
    """
    before = 1 if steps and steps[0].get("name") in BEFORE else 0
    if len(steps) == before or steps[before].get("name") not in _FIRST:
        raise ConfigurationError(
            f"the first step must be one of {', '.join(_FIRST)}, with smooth before it or nothing"
        )
    complete = []
    for index, step in enumerate(steps):
        name = str(step.get("name"))
        known: Mapping[str, Callable[..., Any]] = BEFORE if index < before else STEPS
        if name not in known or (index > before and name in _FIRST):
            later = sorted(set(STEPS) - set(_FIRST))
            raise ConfigurationError(
                f"step {index + 1} is {name!r}; expected one of {', '.join(later)}"
            )
        settings = {
            key: list(parameter.default)
            if isinstance(parameter.default, tuple)
            else parameter.default
            for key, parameter in inspect.signature(known[name]).parameters.items()
            if key not in VOLUMES
        }
        unknown = sorted(set(step) - set(settings) - {"name"})
        if unknown:
            raise ConfigurationError(
                f"step {name!r} has no setting {unknown[0]!r}; it has {', '.join(settings)}"
            )
        complete.append({"name": name, **settings, **step})
    return complete
