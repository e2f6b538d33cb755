"""What evaluation and inference write per volume: masks, probabilities, sheets, pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.atomic import whole_folder
from pipeline.data.writers import write_png, write_tiff
from pipeline.inference.batch import BatchRun
from pipeline.inference.ensembles import Ensemble
from pipeline.inference.evaluation_tables import EvaluationFolder, column_means, items_of
from pipeline.inference.stages import StageClock
from pipeline.vesuvius.evaluation import SurfaceMetrics
from pipeline.vesuvius.geometry import VoxelSize, voxel_size
from pipeline.vesuvius.member_agreement import member_difference
from pipeline.vesuvius.pictures import LEGEND, LEGEND_WITH_TRUTH, three_planes
from pipeline.vesuvius.result_facts import foreground_facts, log_facts
from pipeline.vesuvius.sheet_maps import sheet_map, write_sheet_map
from pipeline.vesuvius.sheet_measures import largest_sheets, sheet_facts
from pipeline.vesuvius.sheet_meshes import sheet_mesh, write_ply
from pipeline.vesuvius.topology import PostProcess, Repaired
from pipeline.vesuvius.whole_results import ExchangeForms, write_ome_zarr

__all__ = ["EvaluationWriter", "SurfaceWriter"]

logger = logging.getLogger(__name__)


class SurfaceWriter:
    """Repair, measure and write each volume's surface as inference goes along.

    List it among the evaluator's `handlers`. Per input: `<name>.tif` (0/1, LZW),
    `<name>_visualization.tif` (0/255), `pictures/<name>.png`: three planes with the surface before
    and after repair; on request `<name>_probability.tif` (uint16, 65535 is certain),
    `<name>_sheets.tif` (a number per sheet), `<name>_surface.zarr` and, where the probability is
    saved, `<name>_probability.zarr` (OME-Zarr), the mask as `<name>.nii.gz`, `<name>.ome.tif` and
    `<name>.dcm` (DICOM Segmentation), `<name>_heights/sheet_<number>.tif` and
    `<name>_meshes/sheet_<number>.ply`; last the sidecar.

    Args:
        batch: the run over files, which names the results and keeps the account.
        repair: from probability to mask.
        threshold: probability from which a voxel is surface, for the picture before repair.
        save_probability: whether the probability is written too.
        separate_instances: whether the sheets are numbered in a file of their own.
        save_ome_zarr: whether mask and saved probability are written as OME-Zarr too.
        save_nifti: whether the mask is written as NIfTI too.
        save_ome_tiff: whether the mask is written as OME-TIFF too.
        save_dicom_seg: whether the mask is written as a DICOM Segmentation too.
        save_height_maps: whether each sheet's height, thickness and layers are written.
        save_meshes: whether each sheet is written as a mesh.
        largest_sheets: how many sheets get a map and a mesh.
        checkpoint: plain data of the checkpoint for the sidecar: epoch, score, ...
        members: the ensemble; a warning tells where its members say the same.
        window: voxels per axis of the window in which the members are compared.

    Raises:
        ConfigurationError: `save_dicom_seg` without the library for it.
    """

    def __init__(
        self,
        batch: BatchRun,
        repair: PostProcess,
        threshold: float,
        save_probability: bool = False,
        separate_instances: bool = False,
        save_ome_zarr: bool = False,
        save_nifti: bool = False,
        save_ome_tiff: bool = False,
        save_dicom_seg: bool = False,
        save_height_maps: bool = False,
        save_meshes: bool = False,
        largest_sheets: int = 50,
        checkpoint: Mapping[str, Any] | None = None,
        members: Ensemble | None = None,
        window: Sequence[int] = (96, 96, 96),
    ) -> None:
        self.batch = batch
        batch.picture_legend = LEGEND
        self.repair = repair
        self.threshold = float(threshold)
        self.save_probability = save_probability
        self.separate_instances = separate_instances
        self.save_ome_zarr = save_ome_zarr
        self.forms = ExchangeForms(save_nifti, save_ome_tiff, save_dicom_seg)
        self.forms.check()
        self.save_height_maps = save_height_maps
        self.save_meshes = save_meshes
        self.largest_sheets = largest_sheets
        self.checkpoint = dict(checkpoint or {})
        self.members = members
        self.window = tuple(window)
        self._clock = StageClock()

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._warn)

    def _begin(self) -> None:
        self._clock = StageClock()

    def _warn(self) -> None:
        self.forms.warn_where_streamed(self.batch)

    def _write(self, engine: Engine) -> None:
        for item in items_of(engine):
            probability = np.asarray(item["pred"].cpu(), np.float32)[0]
            self._clock.lap("network")
            repaired = self.repair(probability)
            self._clock.lap("repair")
            self._write_item(item, probability, repaired)
            self._begin()

    def _write_item(
        self, item: Mapping[str, Any], probability: NDArray[np.float32], repaired: Repaired
    ) -> None:
        """Measure, write and record one volume."""
        name, clock = str(item["name"]), self._clock
        image = np.asarray(item["image"].cpu())[0]
        source = str(item.get("image_path", ""))
        size = voxel_size(source, list(item.get("spacing", ())))
        sheets, facts = sheet_facts(repaired.mask, size.um)
        difference = None
        if self.members is not None:
            difference = member_difference(self.members, image, self.window)
        facts |= foreground_facts(facts["foreground"], sheets.size, name, difference)
        clock.lap("measure")
        written = self._write_volumes(name, probability, repaired.mask, sheets, size)
        written += self.forms.write(self.batch, name, repaired.mask, size, source)
        written += self._write_sheets(name, sheets, size)
        written.append(self.batch.path(f"pictures/{name}", ".png"))
        before = probability >= self.threshold
        write_png(written[-1], three_planes(image, before, repaired.mask))
        clock.lap("write")
        details = {
            "shape": list(repaired.mask.shape),
            "source_dtype": str(item.get("source_dtype", "")),
            **size.facts(),
            "checkpoint": self.checkpoint,
            "repair": repaired.record,
            **facts,
            **clock.record(item.get("stages")),
        }
        log_facts(name, details)
        row = {key: facts[key] for key in ("foreground", "sheets", "largest_sheet_voxels")}
        row["warning"] = "; ".join(facts["warnings"])
        self.batch.record(name, written, row, details)

    def _write_volumes(
        self,
        name: str,
        probability: NDArray[np.float32],
        mask: NDArray[np.uint8],
        sheets: NDArray[np.int32],
        size: VoxelSize,
    ) -> list[Path]:
        volumes: dict[str, NDArray[Any]] = {"": mask, "_visualization": mask * np.uint8(255)}
        images: dict[str, tuple[NDArray[Any], str]] = {"_surface": (mask, "max")}
        if self.save_probability:
            volumes["_probability"] = (probability * 65535).round().astype(np.uint16)
            images["_probability"] = (volumes["_probability"], "mean")
        if self.separate_instances:
            few = sheets.max(initial=0) <= np.iinfo(np.uint16).max
            volumes["_sheets"] = sheets.astype(np.uint16 if few else np.uint32)
            images["_sheets"] = (volumes["_sheets"], "nearest")
        written = [
            write_tiff(self.batch.path(name, f"{suffix}.tif"), volume, **size.tiff_tags())
            for suffix, volume in volumes.items()
        ]
        if self.save_ome_zarr:
            about = {"lamina": {"bundle": self.batch.bundle, "input": name}}
            written += [
                write_ome_zarr(self.batch.path(name, f"{suffix}.zarr"), volume, size, reduce, about)
                for suffix, (volume, reduce) in images.items()
            ]
        return written

    def _write_sheets(self, name: str, sheets: NDArray[np.int32], size: VoxelSize) -> list[Path]:
        """Write the height maps and the meshes of the largest sheets."""
        if not (self.save_height_maps or self.save_meshes):
            return []
        boxes = ndimage.find_objects(sheets)
        numbers = largest_sheets(np.bincount(sheets.ravel()), self.largest_sheets)
        if len(numbers) < len(boxes):
            logger.info(
                "%s: maps and meshes of the %d largest of %d sheets; see largest_sheets",
                name, len(numbers), len(boxes),
            )  # fmt: skip
        parts = {number: boxes[number - 1] for number in numbers}
        written = []
        if self.save_height_maps:
            written.append(self.batch.path(name, "_heights"))
            with whole_folder(written[-1]) as folder:
                for number, box in parts.items():
                    found = sheet_map(sheets[box] == number, _origin(box))
                    write_sheet_map(folder / f"sheet_{number:04d}.tif", found, size.spacing)
        if self.save_meshes:
            written.append(self.batch.path(name, "_meshes"))
            comments = [f"x y z in {'um' if size.um else 'voxels'}, voxel (0, 0, 0) at the origin"]
            with whole_folder(written[-1]) as folder:
                for number, box in parts.items():
                    mesh = sheet_mesh(sheets[box] == number, _origin(box), size.um or (1, 1, 1))
                    write_ply(folder / f"sheet_{number:04d}.ply", mesh, comments)
        return written


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
        self.folder = EvaluationFolder(output_dir, summary)
        self.metrics = metrics
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
            write_tiff(self.folder.prediction(name, ".tif"), mask)
        image, label = (np.asarray(item[key].cpu())[0] for key in ("image", "label"))
        write_png(self.folder.picture(name), three_planes(image, cut, mask, label))

    def write(self) -> None:
        """Write the tables."""
        rows = self.metrics.per_image
        means = column_means(rows, complete=True)
        figures = {
            "threshold": self.metrics.threshold,
            "average_metrics": means,
            "picture_legend": LEGEND_WITH_TRUTH,
        }
        self.folder.write_tables(rows, figures)


def _origin(box: Sequence[slice]) -> tuple[int, ...]:
    return tuple(part.start for part in box)
