"""What inference and evaluation write: rows, tables, thickness maps, pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.batch import BatchRun
from pipeline.inference.evaluation_tables import EvaluationFolder, column_means, items_of
from pipeline.inference.stages import StageClock
from pipeline.oct.bscan_loader import BScanLoader
from pipeline.oct.coordinates import Layers
from pipeline.oct.evaluation import LayerMetrics, layers_in_source
from pipeline.oct.metrics import ScanRows
from pipeline.oct.pictures import LEGEND, write_overlay, write_thickness_picture
from pipeline.oct.pixel_maps import class_mask, confidence_map
from pipeline.oct.prediction_writer import PredictionWriter
from pipeline.oct.result_facts import layer_facts
from pipeline.oct.tables import write_etdrs, write_rows, write_thickness
from pipeline.oct.volume import BScans, OctVolume

__all__ = ["EvaluationWriter", "LayerWriter"]

logger = logging.getLogger(__name__)

_TOLD = ("scale_x_um", "scale_y_um", "spacing_um", "laterality", "scan_pattern")


class LayerWriter:
    """Extract, write and record the boundaries of each file as inference goes along.

    List it among the evaluator's `handlers`. Per input: `<name>.h5`, B-scan by B-scan, under its
    name once it is whole; `<name>_inference_summary.json`; `<name>.csv`, a line per column;
    `pictures/<name>.png`, the B-scan in the middle, and of a volume `pictures/<name>_<k>.png`, the
    least certain others; of a raster whose distances are known also `<name>_thickness.csv`,
    `<name>_etdrs.csv` and `pictures/<name>_thickness.png`; last the sidecar. Rows are in the frame
    of the file's B-scans.

    Args:
        batch: the run over files, which names the results and keeps the account.
        loader: gives the B-scans.
        extraction: arguments of `extract_layers`.
        save_masks: whether classes and confidence of each pixel go into the HDF5 file.
        save_csv: whether the tables are written.
        save_pictures: whether the pictures are written.
        most_pictures: B-scans of a volume that are drawn, at most.
        least_valid: share of the columns of a boundary below which a file, or a B-scan, is flagged
            as one that is not to be trusted.
        architecture: the network's name, for the HDF5 file.
        checkpoint: plain data of the checkpoint for the sidecar: epoch, score, ...

    Raises:
        ConfigurationError: a number is out of its range.
    """

    def __init__(
        self,
        batch: BatchRun,
        loader: BScanLoader,
        extraction: Mapping[str, Any],
        save_masks: bool = True,
        save_csv: bool = True,
        save_pictures: bool = True,
        most_pictures: int = 4,
        least_valid: float = 0.75,
        architecture: str = "",
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= least_valid <= 1 or most_pictures < 1:
            raise ConfigurationError(
                f"least_valid is {least_valid} and most_pictures {most_pictures}; expected a share "
                "of 0 to 1, and 1 or more"
            )
        self.batch = batch
        batch.picture_legend = LEGEND
        self.loader = loader
        self.extraction = dict(extraction)
        self.save_masks = save_masks
        self.save_csv = save_csv
        self.save_pictures = save_pictures
        self.most_pictures = most_pictures
        self.least_valid = least_valid
        self.architecture = architecture
        self.checkpoint = dict(checkpoint or {})
        self._file: _File | None = None
        self._clock = StageClock()
        batch.closing.callback(self.close)

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._begin)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: self._clock.lap("read"))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def close(self) -> None:
        """Remove what was written of a file that is not done."""
        if self._file is not None:
            file, self._file = self._file, None
            left = InputError(f"{file.name}: not completed")
            file.writer.__exit__(InputError, left, None)

    def _begin(self) -> None:
        self._clock = StageClock()

    def _write(self, engine: Engine) -> None:
        items = items_of(engine)
        logits = torch.stack([item["pred"] for item in items])
        if logits.is_cuda:  # else extraction would be blamed for the network's time
            torch.cuda.synchronize(logits.device)
        self._clock.lap("network")
        name = str(items[0]["name"])
        if self._file is None or self._file.name != name:
            self.close()
            self._file = self._opened(name)
        file, shape = self._file, self._file.volume.bscans.shape
        layers = layers_in_source(logits, self.extraction, shape[1:], file.volume.scale_y_um)
        masks = class_mask(logits) if self.save_masks else None
        confidence = confidence_map(logits) if self.save_masks else None
        self._clock.lap("extract")
        file.writer.append(layers, masks=masks, confidence=confidence)
        file.layers.append(layers)
        self._clock.lap("write")
        file.clock.add(self._clock)
        if file.writer.written == shape[0]:
            self._finish(file, [int(side) for side in logits.shape[2:]])

    def _opened(self, name: str) -> _File:
        volume = self.loader.volume
        if volume is None:
            raise ConfigurationError(
                f"{name}: the loader of LayerWriter gave no B-scan; pass the evaluator's loader"
            )
        # A name that is taken shows before anything is written.
        paths = {suffix: self.batch.path(name, suffix) for suffix in self._suffixes(volume)}
        writer = PredictionWriter(
            paths[".h5"],
            volume,
            model_path=self.batch.model_path or "",
            model_architecture=self.architecture,
            metadata={"bundle": self.batch.bundle, "extraction": self.extraction},
            summary_path=paths["_inference_summary.json"],
        )
        writer.__enter__()
        return _File(name, volume, writer, paths)

    def _suffixes(self, volume: OctVolume) -> list[str]:
        tables = [".csv"] if self.save_csv else []
        if self.save_csv and _is_raster(volume):
            tables += ["_thickness.csv", "_etdrs.csv"]
        return [".h5", "_inference_summary.json", *tables]

    def _finish(self, file: _File, frame: list[int]) -> None:
        """Write the rest, and record the file."""
        volume, rows = file.volume, file.rows()
        pictures = self._pictures(file, rows)
        self._file = None
        file.writer.__exit__(None, None, None)
        written: list[Path | None] = [file.paths[".h5"], file.paths["_inference_summary.json"]]
        writers = {".csv": write_rows, "_thickness.csv": write_thickness, "_etdrs.csv": write_etdrs}
        for suffix, write in writers.items():
            if suffix in file.paths:
                written.append(write(file.paths[suffix], volume, rows))
        written += [write_overlay(path, volume, rows, index) for index, path in pictures.items()]
        if self.save_pictures and _is_raster(volume):
            path = self.batch.path(f"pictures/{file.name}", "_thickness.png")
            written.append(write_thickness_picture(path, volume, rows))
        file.clock.lap("write")
        self._record(file, rows, frame, [path for path in written if path is not None])

    def _pictures(self, file: _File, rows: Layers) -> dict[int, Path]:
        """Return which B-scans are drawn, and where."""
        if not self.save_pictures:
            return {}
        name, middle = f"pictures/{file.name}", len(rows.ilm_px) // 2
        sigma = (rows.ilm_sigma_px + rows.bm_sigma_px).mean(axis=1)
        others = [int(k) for k in np.argsort(-sigma, kind="stable") if k != middle]
        chosen = {middle: self.batch.path(name, ".png")}
        for index in others[: self.most_pictures - 1]:
            chosen[index] = self.batch.path(name, f"_{index}.png")
        return chosen

    def _record(self, file: _File, rows: Layers, frame: list[int], written: Sequence[Path]) -> None:
        volume = file.volume
        facts = layer_facts(volume, rows, self.least_valid, file.name)
        details = {
            "shape": list(volume.bscans.shape),
            "source_dtype": str(volume.bscans.dtype),
            "source_format": volume.source_format,
            **{key: getattr(volume, key) for key in _TOLD},
            "notes": list(volume.notes),
            "network_frame": frame,
            "checkpoint": self.checkpoint,
            "extraction": self.extraction,
            **facts,
            **file.clock.record(),
        }
        row = {key: value for key, value in facts.items() if key != "flagged_bscans"}
        row["flagged_bscans"] = len(facts["flagged_bscans"])
        logger.info(
            "%s: %d B-scans of %s; valid ILM %.1f %%, BM %.1f %%; %s",
            file.name, volume.bscans.shape[0], tuple(volume.bscans.shape[1:]),
            100 * facts["ilm_valid"], 100 * facts["bm_valid"],
            ", ".join(f"{stage} {spent_s:.1f} s" for stage, spent_s in file.clock.seconds.items()),
        )  # fmt: skip
        self.batch.record(file.name, list(written), row, details)


class EvaluationWriter:
    """Write `test_metrics.yaml`, `per_image_metrics.yaml`, rows and pictures of an evaluation.

    List it among `validate::handlers` of an evaluation.

    Args:
        output_dir: the evaluation's folder.
        metrics: the evaluator's metric, with a row per B-scan; its `watch` becomes this writer's.
        summary: plain data for the head of `test_metrics.yaml`.
        save_predictions: whether the rows are written.
    """

    def __init__(
        self,
        output_dir: str,
        metrics: LayerMetrics,
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

    def watch(self, item: Mapping[str, Any], layers: Layers, scan: ScanRows) -> None:
        """Write rows and picture of one B-scan, over the grey values that the network saw."""
        volume = _as_volume(item, scan)
        if self.save_predictions:
            write_rows(self.folder.prediction(scan.name, ".csv"), volume, layers)
        write_overlay(self.folder.picture(scan.name), volume, layers)

    def write(self) -> None:
        """Write the tables."""
        rows, extraction = self.metrics.per_image, self.metrics.extraction
        figures = {
            "picture_legend": LEGEND,
            "max_sigma_px": extraction.get("max_sigma_px"),
            "extraction": extraction,
            "average_metrics": column_means(rows),
            **self.metrics.figures(),
        }
        self.folder.write_tables(rows, figures)


@dataclass
class _File:
    """A file whose B-scans are on their way."""

    name: str
    volume: OctVolume
    writer: PredictionWriter
    paths: Mapping[str, Path]
    layers: list[Layers] = field(default_factory=list)
    clock: StageClock = field(default_factory=StageClock)

    def rows(self) -> Layers:
        names = [entry.name for entry in fields(Layers)]
        joined = {n: np.concatenate([getattr(part, n) for part in self.layers]) for n in names}
        return Layers(**joined)


def _is_raster(volume: OctVolume) -> bool:
    """Return whether a thickness map has known distances on both axes."""
    known = None not in (volume.spacing_um, volume.scale_x_um, volume.scale_y_um)
    return known and volume.bscans.shape[0] > 1


def _as_volume(item: Mapping[str, Any], scan: ScanRows) -> OctVolume:
    """Return one B-scan as the network saw it, in the frame that it was stored in."""
    size = tuple(int(side) for side in item["source_shape"])
    image = torch.as_tensor(item["image"]).detach().cpu().float()[None]
    grey: NDArray[Any] = functional.interpolate(image, size, mode="bilinear")[0].numpy()
    low, high = float(grey.min()), float(grey.max())
    grey = (grey - low) / (high - low or 1.0)
    return OctVolume(
        path=Path(str(item.get("image_path", ""))),
        source_format="network",
        bscans=cast(BScans, grey),
        layers={name: rows[None] for name, rows in scan.truth.items()},
        names=[scan.name],
        subjects=[scan.eye],
        white=1.0,
        scale_y_um=scan.scale_y_um,
    )
