"""What evaluation and inference write per volume: masks, probabilities, sheets, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from ignite.engine import Engine, Events
from numpy.typing import NDArray

from pipeline.data.atomic import write_yaml
from pipeline.data.writers import result_path, write_png, write_tiff
from pipeline.inference.batch import BatchRun
from pipeline.vesuvius.evaluation import SurfaceMetrics, column_means, items_of
from pipeline.vesuvius.topology import PostProcess

__all__ = ["EvaluationWriter", "SurfaceWriter", "sheet_facts", "three_planes"]

_SIDE_PX = 320  # larger planes are shown by their middle part
_GAP_PX = 6


class SurfaceWriter:
    """Repair, measure and write each volume's surface as inference goes along.

    List it among the evaluator's `handlers`. Per input: `<name>.tif` (0/1, LZW),
    `<name>_visualization.tif` (0/255), on request `<name>_probability.tif` (uint16, 65535 is
    certain) and `<name>_sheets.tif` (uint16, a number per sheet), `pictures/<name>.png`: three
    planes with the surface before and after repair; and the sidecar with the record of the repair.

    Args:
        batch: the run over files, which names the results and keeps the account.
        repair: from probability to mask.
        threshold: probability from which a voxel is surface, for the picture before repair.
        save_probability: whether the probability is written too.
        separate_instances: whether the sheets are numbered in a file of their own.
        checkpoint: plain data of the checkpoint for the sidecar: epoch, score, ...
    """

    def __init__(
        self,
        batch: BatchRun,
        repair: PostProcess,
        threshold: float,
        save_probability: bool = False,
        separate_instances: bool = False,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        self.batch = batch
        self.repair = repair
        self.threshold = float(threshold)
        self.save_probability = save_probability
        self.separate_instances = separate_instances
        self.checkpoint = dict(checkpoint or {})

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        for item in items_of(engine):
            probability = np.asarray(item["pred"].cpu(), np.float32)[0]
            repaired = self.repair(probability)
            name = str(item["name"])
            sheets, facts = sheet_facts(repaired.mask)
            volumes = {"": repaired.mask, "_visualization": repaired.mask * np.uint8(255)}
            if self.save_probability:
                volumes["_probability"] = (probability * 65535).round().astype(np.uint16)
            if self.separate_instances:
                volumes["_sheets"] = sheets.astype(np.uint16)
            written = []
            for suffix, volume in volumes.items():
                path = self.batch.path(name, f"{suffix}.tif")
                write_tiff(path, volume)
                written.append(path)
            picture = result_path(name, ".", self.batch.output_dir / "pictures", ".png")
            image = np.asarray(item["image"].cpu())[0]
            write_png(picture, three_planes(image, probability >= self.threshold, repaired.mask))
            details = {
                "shape": list(repaired.mask.shape),
                "source_dtype": str(item.get("source_dtype", "")),
                "spacing": [float(side) for side in item.get("spacing", ())],
                "checkpoint": self.checkpoint,
                "repair": repaired.record,
                **facts,
            }
            row = {key: facts[key] for key in ("foreground", "sheets", "largest_sheet_voxels")}
            self.batch.record(name, [*written, picture], row, details)


class EvaluationWriter:
    """Write `test_metrics.yaml`, `per_image_metrics.yaml`, masks and pictures of an evaluation.

    List it among `validate::handlers` of an evaluation, and call `watch` from its metric.

    Args:
        output_dir: the evaluation's folder.
        metrics: the evaluator's metric, with a row per volume; its `watch` becomes this writer's.
        summary: plain data for the head of `test_metrics.yaml`.
        save_predictions: whether the masks are written.
    """

    def __init__(
        self,
        output_dir: str,
        metrics: SurfaceMetrics,
        summary: Mapping[str, Any],
        save_predictions: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.metrics = metrics
        self.summary = dict(summary)
        self.save_predictions = save_predictions
        metrics.watch = self.watch

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.COMPLETED, self.write)

    def watch(
        self, item: Mapping[str, Any], cut: NDArray[np.bool_], mask: NDArray[np.uint8]
    ) -> None:
        """Write the mask and the picture of one volume."""
        name = str(item["name"])
        if self.save_predictions:
            write_tiff(result_path(name, ".", self.output_dir / "predictions", ".tif"), mask)
        image, label = (np.asarray(item[key].cpu())[0] for key in ("image", "label"))
        picture = three_planes(image, cut, mask, label)
        write_png(result_path(name, ".", self.output_dir / "pictures", ".png"), picture)

    def write(self) -> None:
        """Write the tables."""
        rows = self.metrics.per_image
        write_yaml(self.output_dir / "per_image_metrics.yaml", rows)
        content = {
            **self.summary,
            "num_test_images": len(rows),
            "threshold": self.metrics.threshold,
            "average_metrics": column_means(rows),
        }
        write_yaml(self.output_dir / "test_metrics.yaml", content)


def sheet_facts(mask: NDArray[np.uint8]) -> tuple[NDArray[Any], dict[str, Any]]:
    """Number the sheets of a mask and measure them.

    Args:
        mask: `(D, H, W)`.

    Returns:
        A number per 26-connected sheet from 1 on, and `foreground`, `background`, `sheets`,
        `largest_sheet_voxels` and `sheet_faces`, the faces that each of the largest 50 sheets
        shows to the background: twice its area in voxels.
    """
    sheets, count = cc3d.connected_components(mask, connectivity=26, return_N=True)
    sizes = np.bincount(sheets.ravel(), minlength=count + 1)
    faces = np.zeros(count + 1, np.int64)
    for axis in range(3):
        ahead = np.moveaxis(sheets, axis, 0)
        differs = ahead[1:] != ahead[:-1]
        for side in (ahead[1:], ahead[:-1]):
            faces += np.bincount(side[differs], minlength=count + 1)
    largest = np.argsort(sizes[1:])[::-1][:50] + 1
    return sheets, {
        "foreground": int(sizes[1:].sum()),
        "background": int(sizes[0]),
        "sheets": int(count),
        "largest_sheet_voxels": int(sizes[1:].max(initial=0)),
        "sheet_faces": {int(number): int(faces[number]) for number in largest},
    }


def three_planes(
    image: NDArray[Any],
    before: NDArray[np.bool_],
    after: NDArray[np.uint8],
    label: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return the middle planes of a volume as one RGB picture.

    Left the image, in the middle the surface by the threshold alone, right the repaired one.
    Without truth the surface is cyan. With truth, agreement is green, what only the prediction has
    is red, what only the truth has is blue, and unlabelled voxels are dark.

    Args:
        image: `(D, H, W)`, any grey values.
        before: `(D, H, W)`, the mask by the threshold alone.
        after: `(D, H, W)`, the repaired mask.
        label: `(D, H, W)`, 0, 1 and 2 (unlabelled).
    """
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    rows = []
    for axis in range(3):
        planes = [_plane(v, axis) for v in (grey, before, after)]
        truth = None if label is None else _plane(label, axis)
        shown = [_painted(planes[0], None, None)]
        shown += [_painted(planes[0], plane > 0, truth) for plane in planes[1:]]
        rows.append(np.concatenate([_margin(part) for part in shown], axis=1))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, [(0, 0), (0, width - row.shape[1]), (0, 0)]) for row in rows]
    return np.concatenate(padded, axis=0)


def _plane(volume: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return the middle plane across an axis, its middle part where large, enlarged where small."""
    plane = np.take(volume, volume.shape[axis] // 2, axis)
    starts = [max(0, (n - _SIDE_PX) // 2) for n in plane.shape]
    plane = plane[tuple(slice(start, start + _SIDE_PX) for start in starts)]
    factor = max(1, _SIDE_PX // max(plane.shape))
    enlarged: NDArray[Any] = plane.repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged


def _painted(
    grey: NDArray[Any], mask: NDArray[np.bool_] | None, truth: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    drawn = np.repeat(grey[..., None] * 255, 3, axis=-1).astype(np.float32)
    if mask is None:
        return drawn.astype(np.uint8)
    layers = [(mask, (0, 230, 255))]
    if truth is not None:
        drawn[truth == 2] *= 0.4
        real, seen = truth == 1, mask & (truth != 2)
        layers = [
            (seen & real, (40, 220, 90)),
            (seen & ~real, (255, 60, 60)),
            (real & ~mask, (70, 120, 255)),
        ]
    for pixels, colour in layers:
        drawn[pixels] = 0.25 * drawn[pixels] + 0.75 * np.array(colour, np.float32)
    return drawn.clip(0, 255).astype(np.uint8)


def _margin(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(picture, [(0, _GAP_PX), (0, _GAP_PX), (0, 0)], constant_values=255)
