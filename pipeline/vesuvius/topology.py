"""From the probability of a surface to a mask of sheets: a chain of repairs, and what each one did.

The competition counts components, tunnels and cavities, so that one speck or pinhole in a volume
costs more than a percent of its voxels. Every step is a function of its own module; this one runs
them in order. The chains `default` and `original` stand in `recipes`. Any other chain is a list of
steps, each `{"name": ..., setting: value, ...}`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius.betti_numbers import (
    betti_numbers,
    enclosed,
    euler_characteristic,
    label_components,
)
from pipeline.vesuvius.recipes import BEFORE, STEPS, VOLUMES, complete_steps, recipe_steps

__all__ = ["PostProcess", "Repaired", "postprocess"]

Mask = NDArray[np.bool_]
Probability = NDArray[np.float32]
Step = Mapping[str, Any]

_NOTHING = {"6": [0, 0, 0], "26": [0, 0, 0]}


class Repaired(NamedTuple):
    """A repaired surface.

    Args:
        mask: `(D, H, W)`, uint8, 1 on sheets.
        record: one entry per step, fit for JSON: `step`, `settings`, `voxels`, `voxels_added`,
            `voxels_removed`, `seconds`, and `betti_before` and `betti_after` where they were
            counted: components, tunnels and cavities by the connectivity of the foreground, `"6"`
            (as the metric) and `"26"`.
    """

    mask: NDArray[np.uint8]
    record: list[dict[str, Any]]


def postprocess(probability: NDArray[Any], **settings: Any) -> Repaired:
    """Turn a probability `(D, H, W)` into a mask of sheets, as `PostProcess(**settings)` does."""
    return PostProcess(**settings)(probability)


class PostProcess:
    """Turn a probability into a mask of sheets by a chain of steps.

    Args:
        recipe: `default` or `original`.
        steps: a chain in place of a recipe: `{"name": step of STEPS, setting: value, ...}` each,
            the first one `threshold` or `hysteresis`, with `smooth` before it or nothing.
        betti: count components, tunnels and cavities before and after: of every step (`True` or
            `"each"`), after the first and the last step (`"ends"`), or not (`False`).
        settings: of the recipe, see `default_steps` and `original_steps`.

    Raises:
        ConfigurationError: a recipe, a step or one of its settings is unknown.
    """

    def __init__(
        self,
        recipe: str = "default",
        steps: Sequence[Step] | None = None,
        betti: bool | Literal["each", "ends"] = "ends",
        **settings: Any,
    ) -> None:
        if betti not in (True, False, "each", "ends"):
            raise ConfigurationError(f"betti must be true, false, each or ends, got {betti!r}")
        if steps is not None and (settings or recipe != "default"):
            raise ConfigurationError(
                f"steps stand alone, got {sorted(settings) or recipe!r} beside them; "
                "write the settings into the steps"
            )
        self.betti = "each" if betti is True else betti
        self.steps = complete_steps(recipe_steps(recipe, settings) if steps is None else steps)

    def settings(self) -> dict[str, Any]:
        """Return what to write into a sidecar: every step with all of its settings."""
        return {"steps": [dict(step) for step in self.steps], "betti": self.betti}

    def __call__(self, probability: NDArray[Any]) -> Repaired:
        """Return the mask of `probability` `(D, H, W)` and the record of the chain.

        Args:
            probability: float from 0 to 1, or uint8 or uint16 scaled from 0 to the largest value.

        Raises:
            InputError: the volume is empty, not `(D, H, W)`, of another type or out of range.
        """
        unsmoothed = values = _as_probability(probability)
        mask = np.zeros(values.shape, np.bool_)
        record: list[dict[str, Any]] = []
        betti = _NOTHING
        for index, step in enumerate(self.steps):
            if step["name"] in BEFORE:
                entry, values = _prepared(step, values)
                record.append(entry)
                continue
            entry, mask = _run(step, mask, values, unsmoothed)
            if self.betti == "each":
                entry["betti_before"] = betti
            if self._counted(index):
                betti = _betti(mask)
                entry["betti_after"] = betti
            record.append(entry)
        return Repaired(mask.view(np.uint8), record)

    def _counted(self, index: int) -> bool:
        first = sum(step["name"] in BEFORE for step in self.steps)
        ends = index in (first, len(self.steps) - 1)
        return self.betti == "each" or (self.betti == "ends" and ends)


def _prepared(step: Step, probability: Probability) -> tuple[dict[str, Any], Probability]:
    """Return the record of a step that comes before there is a mask, and what it made."""
    settings = {key: value for key, value in step.items() if key != "name"}
    start = time.perf_counter()
    result = BEFORE[str(step["name"])](probability, **settings)
    entry = {"step": step["name"], "settings": settings, "voxels": 0, "voxels_added": 0}
    return entry | {"voxels_removed": 0, "seconds": round(time.perf_counter() - start, 4)}, result


def _run(
    step: Step, mask: Mask, probability: Probability, unsmoothed: Probability
) -> tuple[dict[str, Any], Mask]:
    name = str(step["name"])
    settings = {key: value for key, value in step.items() if key != "name"}
    volumes = dict(zip(VOLUMES, (mask, probability, unsmoothed), strict=True))
    wanted = inspect.signature(STEPS[name]).parameters
    start = time.perf_counter()
    result = STEPS[name](**{key: volumes[key] for key in volumes if key in wanted}, **settings)
    seconds = time.perf_counter() - start
    entry = {
        "step": name,
        "settings": settings,
        "voxels": int(np.count_nonzero(result)),
        "voxels_added": int(np.count_nonzero(result & ~mask)),
        "voxels_removed": int(np.count_nonzero(mask & ~result)),
        "seconds": round(seconds, 4),
    }
    return entry, result


def _betti(mask: Mask) -> dict[str, list[int]]:
    """Return the Betti numbers of `mask` with 6- and with 26-connected foreground."""
    components = label_components(mask, 26)[1]
    cavities = int(enclosed(*label_components(~mask, 6)).sum())
    # By Alexander duality: what is left of a box around the mask is 6-connected.
    euler = euler_characteristic(np.pad(~mask, 1, constant_values=True)) - 1
    return {
        "6": [int(number) for number in betti_numbers(mask)],
        "26": [components, components + cavities - euler, cavities],
    }


def _as_probability(probability: NDArray[Any]) -> Probability:
    values = np.asarray(probability)
    if values.ndim != 3 or not values.size:
        raise InputError(f"probability must be (D, H, W) and not empty, got shape {values.shape}")
    if values.dtype in (np.uint8, np.uint16):
        return np.asarray(values / np.float32(np.iinfo(values.dtype).max), np.float32)
    if values.dtype.kind != "f":
        raise InputError(
            f"probability has type {values.dtype}; expected float, or uint8 or uint16 scaled"
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"probability runs from {low:g} to {high:g}; expected 0 to 1: apply the activation once"
        )
    return np.ascontiguousarray(values, np.float32)
