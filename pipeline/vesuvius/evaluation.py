"""The surface score over a validation or test set, as a metric of MONAI's evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine
from ignite.metrics import Metric
from numpy.typing import NDArray
from torch import Tensor

from pipeline.inference.evaluation_tables import column_means, items_of
from pipeline.vesuvius.metrics import surface_dice, surface_score, variation_of_information
from pipeline.vesuvius.topology import PostProcess
from pipeline.vesuvius.transforms import IGNORE_LABEL

__all__ = ["THRESHOLDS", "SurfaceMetrics", "score_row"]

_COMPARED = ("score", "topology", "surface_dice", "voi_score")  # beside the threshold alone

THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)

Watch = Callable[[Mapping[str, Any], NDArray[np.bool_], NDArray[np.uint8]], None]


class SurfaceMetrics(Metric):
    """Score probability volumes against their labels, unlabelled voxels left out.

    While training (`thresholds`) it takes the cheap parts of the competition's score, SurfaceDice
    and VOI, at several thresholds, and keeps the threshold whose mean is best: the value is that
    mean. At the end (`threshold`) it takes the whole score of the repaired volumes: the value is
    its mean, and `per_image` holds a row per volume, with `cut_...` for what the threshold alone
    scores. Volumes are not kept.

    Args:
        threshold: probability from which a voxel is surface; None chooses it among `thresholds`.
        thresholds: to choose from.
        repair: the repairs that follow the threshold, which is then the recipe's; None: none.
        tolerance: of SurfaceDice, in voxels.
        watch: called with the item, the mask by the threshold alone and the repaired one.
    """

    required_output_keys = None

    def __init__(
        self,
        threshold: float | None = None,
        thresholds: Sequence[float] = THRESHOLDS,
        repair: PostProcess | None = None,
        tolerance: float = 2.0,
        watch: Watch | None = None,
    ) -> None:
        self.given_threshold = threshold
        self.thresholds = tuple(thresholds)
        self.repair = repair
        self.tolerance = tolerance
        self.watch = watch
        super().__init__()

    def reset(self) -> None:
        """Forget the volumes seen."""
        self.threshold = 0.5 if self.given_threshold is None else self.given_threshold
        self.per_image: list[dict[str, Any]] = []
        self._by_threshold: dict[float, list[dict[str, float]]] = {t: [] for t in self.thresholds}

    def iteration_completed(self, engine: Engine) -> None:
        """Take the items of the iteration."""
        self.update(items_of(engine))

    def update(self, output: Sequence[dict[str, Any]]) -> None:
        """Take items with `pred`, a probability `(1, D, H, W)`, and `label`."""
        for item in output:
            probability, label = _volume(item["pred"], np.float32), _volume(item["label"], np.uint8)
            if self.given_threshold is None:
                for threshold, rows in self._by_threshold.items():
                    rows.append(_cheap(probability >= threshold, label, self.tolerance))
                continue
            self._score(item, probability, label)

    def _score(
        self, item: Mapping[str, Any], probability: NDArray[np.float32], label: NDArray[np.uint8]
    ) -> None:
        cut = probability >= self.threshold
        mask = cut.astype(np.uint8) if self.repair is None else self.repair(probability).mask
        row = {"image": item.get("name", ""), **score_row(mask, label, self.tolerance)}
        if self.repair is not None:
            plain = score_row(cut.astype(np.uint8), label, self.tolerance)
            row |= {f"cut_{key}": plain[key] for key in _COMPARED}
        if item.get("stratum"):
            row["stratum"] = item["stratum"]
        self.per_image.append(row)
        if self.watch is not None:
            self.watch(item, cut, mask)

    def compute(self) -> float:
        """Return the mean over the volumes seen."""
        if self.given_threshold is not None:
            return column_means(self.per_image, complete=True).get("score", math.nan)
        means = {t: column_means(rows) for t, rows in self._by_threshold.items() if rows}
        if not means:
            return math.nan
        self.threshold = max(means, key=lambda t: means[t]["surface"])
        return means[self.threshold]["surface"]

    def completed(self, engine: Engine, name: str) -> None:
        """Put the figures into the evaluator's metrics."""
        value = self.compute()  # chooses the threshold
        prefix = name.rsplit("_", 1)[0]
        rows = self.per_image or self._by_threshold.get(self.threshold, [])
        for key, mean in column_means(rows, complete=True).items():
            engine.state.metrics[f"{prefix}_{key}"] = mean
        engine.state.metrics[name] = value
        engine.state.metrics["threshold"] = self.threshold


def score_row(
    mask: NDArray[np.uint8], label: NDArray[np.uint8], tolerance: float = 2.0
) -> dict[str, Any]:
    """Return the competition's score of one volume with its parts, flat.

    Args:
        mask: `(D, H, W)`.
        label: `(D, H, W)`, 0, 1 and 2 (unlabelled).
        tolerance: of SurfaceDice, in voxels.

    Returns:
        `score`, `topology` (both None where matched features could not be counted), `surface_dice`,
        `voi_score`, `voi_split`, `voi_merge`, `dice`, and per dimension `k0` to `k2` the features
        as `matched/predicted/truth`.
    """
    found = surface_score(mask, label, tolerance, IGNORE_LABEL)
    topology = found.pop("topology")
    counts = {
        f"k{dimension}": "/".join("?" if n is None else str(n) for n in numbers)
        for dimension, numbers in topology["counts"].items()
    }
    score = found.pop("score")
    return {"score": score, "topology": topology["score"], **found, "dice": _dice(mask, label)} | (
        counts
    )


def _cheap(mask: NDArray[np.bool_], label: NDArray[np.uint8], tolerance: float) -> dict[str, float]:
    dice = surface_dice(mask, label, tolerance, IGNORE_LABEL)
    voi = variation_of_information(mask, label, IGNORE_LABEL)["voi_score"]
    both = {"surface": (dice + voi) / 2, "surface_dice": dice, "voi_score": voi}
    return {**both, "dice": _dice(mask, label)}


def _dice(mask: NDArray[Any], label: NDArray[np.uint8]) -> float:
    labelled = label != IGNORE_LABEL
    predicted, truth = (mask > 0) & labelled, label == 1
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def _volume(value: Tensor | NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return `(1, D, H, W)` or `(D, H, W)` as a numpy array `(D, H, W)`."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return (array[0] if array.ndim == 4 else array).astype(dtype, copy=False)
