"""Vessel metrics over a validation or test set, as a metric of MONAI's evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine
from ignite.metrics import Metric
from numpy.typing import NDArray
from torch import Tensor

from pipeline.fundus.metrics import choose_threshold, pooled_metrics, summarise, vessel_metrics
from pipeline.fundus.morphometry import vessel_calibre
from pipeline.inference.evaluation_tables import items_of

__all__ = ["VesselMetrics"]

Maps = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]


class VesselMetrics(Metric):
    """Score probability maps in the photographs' own frames, inside the field of view.

    The value is the pooled Dice at `threshold`. Beside it the evaluator's metrics get
    `val_iou`, `val_auc`, `val_sensitivity`, ... (pooled), `val_dice_mean` (mean over the images)
    and `threshold`. `per_image` holds one row per image and `cases` the maps until the next start.

    Args:
        threshold: probability from which a pixel is vessel; None chooses it on these very images,
            as validation does, by the mean Dice.
        per_image_rows: also compute clDice and calibre and keep a row per image: for evaluation,
            not for every epoch.
    """

    required_output_keys = None

    def __init__(self, threshold: float | None = None, per_image_rows: bool = False) -> None:
        self.given_threshold = threshold
        self.per_image_rows = per_image_rows
        super().__init__()

    def reset(self) -> None:
        """Forget the images seen."""
        self.cases: list[Maps] = []
        self.items: list[dict[str, Any]] = []
        self.per_image: list[dict[str, Any]] = []
        self.pooled: dict[str, float] = {}
        self.threshold = 0.5

    def iteration_completed(self, engine: Engine) -> None:
        """Take the items of the iteration."""
        self.update(items_of(engine))

    def update(self, output: Sequence[dict[str, Any]]) -> None:
        """Take items after post-processing, with the keys of batch and output."""
        for item in output:
            probability = _array(item["pred"]).astype(np.float32)
            label, fov = _array(item["native_label"]) > 0, _array(item["native_fov"]) > 0
            self.cases.append((probability, label, fov))
            kept = ("name", "image_path", "fov_source", "stratum")
            self.items.append({key: item.get(key) for key in kept})

    def compute(self) -> float:
        """Return the pooled Dice of the images seen."""
        chosen = self.given_threshold
        self.threshold = choose_threshold(self.cases) if chosen is None else chosen
        self.pooled = pooled_metrics(self.cases, self.threshold)
        return self.pooled["dice"]

    def completed(self, engine: Engine, name: str) -> None:
        """Put the figures into the evaluator's metrics."""
        engine.state.metrics[name] = self.compute()
        prefix = name.rsplit("_", 1)[0]
        for key, value in self.pooled.items():
            engine.state.metrics[f"{prefix}_{key}"] = value
        if self.per_image_rows:
            self.per_image = [self._row(*pair) for pair in zip(self.cases, self.items, strict=True)]
            means = summarise(self.per_image)
            engine.state.metrics[f"{prefix}_dice_mean"] = means["dice"]["mean"]
        engine.state.metrics["threshold"] = self.threshold

    def _row(self, maps: Maps, item: dict[str, Any]) -> dict[str, Any]:
        probability, label, fov = maps
        metrics = vessel_metrics(probability, label, fov, self.threshold)
        calibre = vessel_calibre((probability >= self.threshold) & fov, fov)
        row = {"image": item["name"], **metrics, **calibre, "fov": item["fov_source"]}
        return row | ({"stratum": item["stratum"]} if item["stratum"] else {})


def _array(value: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return `(1, H, W)` or `(H, W)` as a numpy array `(H, W)`."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return array[0] if array.ndim == 3 else array
