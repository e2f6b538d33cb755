"""What evaluation and inference write per photograph: maps, tables, overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from skimage.transform import resize

from pipeline.data.images import read_image
from pipeline.data.photographs import rgb_photograph
from pipeline.data.writers import write_png
from pipeline.fundus.evaluation import VesselMetrics
from pipeline.fundus.metrics import summarise
from pipeline.fundus.morphometry import vessel_calibre
from pipeline.inference.batch import BatchRun
from pipeline.inference.evaluation_tables import EvaluationFolder, items_of

__all__ = ["EvaluationWriter", "ResultWriter", "overlay", "shown_photograph"]

_OVERLAY_SIDE_PX = 900  # larger photographs are shown smaller in the report


def overlay(
    photograph: NDArray[np.uint8], mask: NDArray[np.bool_], truth: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Return the photograph `(H, W, 3)` with vessels drawn over it.

    Without truth the vessels are cyan. With truth, agreement is green, what only the prediction has
    is red, and what only the truth has is blue.
    """
    drawn = photograph.astype(np.float32) * 0.75
    if truth is None:
        layers = [(mask, (0, 230, 255))]
    else:
        layers = [
            (mask & truth, (40, 220, 90)),
            (mask & ~truth, (255, 60, 60)),
            (truth & ~mask, (70, 120, 255)),
        ]
    for pixels, colour in layers:
        drawn[pixels] = 0.25 * drawn[pixels] + 0.75 * np.array(colour, dtype=np.float32)
    return _shown_size(drawn.clip(0, 255).astype(np.uint8))


class EvaluationWriter:
    """Write `test_metrics.yaml`, `per_image_metrics.yaml`, masks and overlays of an evaluation.

    List it among `validate::handlers` of an evaluation. The overlays, with the truth, go to
    `pictures/`; the masks, as PNG 0/255, to `predictions/`. File names keep the images' folders.

    Args:
        output_dir: the evaluation's folder.
        metrics: the evaluator's metric, with a row per image.
        summary: plain data for the head of `test_metrics.yaml`: experiment, checkpoint, split, ...
        save_predictions: whether the masks are written.
    """

    def __init__(
        self,
        output_dir: str,
        metrics: VesselMetrics,
        summary: Mapping[str, Any],
        save_predictions: bool = True,
    ) -> None:
        self.folder = EvaluationFolder(output_dir, summary)
        self.metrics = metrics
        self.save_predictions = save_predictions

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self) -> None:
        """Write everything, the tables last."""
        for (probability, label, fov), item in zip(
            self.metrics.cases, self.metrics.items, strict=True
        ):
            name, mask = item["name"], (probability >= self.metrics.threshold) & fov
            if self.save_predictions:
                write_png(self.folder.prediction(name, ".png"), mask.astype(np.uint8) * 255)
            picture = overlay(shown_photograph(item["image_path"]), mask, label & fov)
            write_png(self.folder.picture(name), picture)
        self.folder.write_tables(self.metrics.per_image, self._figures())

    def _figures(self) -> dict[str, Any]:
        rows = self.metrics.per_image
        origins = {row["fov"] for row in rows}
        return {
            "threshold": self.metrics.threshold,
            "picture_legend": "Green: both agree; red: prediction only; blue: truth only.",
            "fov": origins.pop() if len(origins) == 1 else "mixed",
            "average_metrics": {k: v["mean"] for k, v in summarise(rows).items()},
            "spread": {k: {"sd": v["sd"], "min": v["min"]} for k, v in summarise(rows).items()},
            "pooled_metrics": self.metrics.pooled,
            **({"strata": strata} if (strata := _strata(rows)) else {}),
        }


def _strata(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the means of each stratum that the manifest names, since one mean hides failures."""
    names = sorted({row["stratum"] for row in rows if "stratum" in row})
    by_name = {name: [row for row in rows if row.get("stratum") == name] for name in names}
    return {
        name: {"images": len(members)} | {k: v["mean"] for k, v in summarise(members).items()}
        for name, members in by_name.items()
    }


class ResultWriter:
    """Write each photograph's vessel map, overlay and sidecar as inference goes along.

    List it among the evaluator's `handlers`. Per input: `<name>_vessels.png` (0/255), on request
    `<name>_probability.png` (16-bit, 65535 is certain), `pictures/<name>.png`, and the sidecar.

    Args:
        batch: the run over files, which names the results and keeps the account.
        threshold: probability from which a pixel is vessel.
        save_probability: whether the probability is written too.
    """

    def __init__(self, batch: BatchRun, threshold: float, save_probability: bool = False) -> None:
        self.batch = batch
        self.threshold = float(threshold)
        self.save_probability = save_probability

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        for item in items_of(engine):
            probability = np.asarray(item["pred"].cpu())[0]
            fov = np.asarray(item["native_fov"].cpu())[0] > 0
            mask = (probability >= self.threshold) & fov
            name = str(item["name"])
            pictures = {
                self.batch.path(name, "_vessels.png"): mask.astype(np.uint8) * 255,
                self.batch.path(f"pictures/{name}", ".png"): overlay(
                    _uint8(np.moveaxis(np.asarray(item["native_image"].cpu()), 0, -1)), mask
                ),
            }
            if self.save_probability:
                levels = (probability * 65535).round().astype(np.uint16)
                pictures[self.batch.path(name, "_probability.png")] = levels
            for path, picture in pictures.items():
                write_png(path, picture)
            row = {**vessel_calibre(mask, fov), "fov": item["fov_source"]}
            details = {
                "shape": list(mask.shape),
                "source_dtype": item["source_dtype"],
                "threshold": self.threshold,
            }
            self.batch.record(name, list(pictures), row, details)


def shown_photograph(source: str | Path) -> NDArray[np.uint8]:
    """Return a photograph file as RGB uint8 `(H, W, 3)`, for pictures."""
    return _uint8(rgb_photograph(read_image(Path(source)), source))


def _uint8(values: NDArray[Any]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return levels


def _shown_size(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    factor = _OVERLAY_SIDE_PX / max(picture.shape[:2])
    if factor >= 1:
        return picture
    size = (round(picture.shape[0] * factor), round(picture.shape[1] * factor))
    shown = resize(picture, size, anti_aliasing=True, preserve_range=True)
    return np.asarray(shown, dtype=np.uint8)
