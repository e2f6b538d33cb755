"""The metrics of a training, an evaluation or a cross-validation, from the files that it left."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import InputError
from pipeline.report.class_scores import SCORES, Said, said_of
from pipeline.report.run_files import read_yaml
from pipeline.report.values import finite

__all__ = ["FOLDS_FILE", "Measure", "fold_figures", "read_measures"]

FOLDS_FILE = "folds.yaml"

_FOLD_FOLDER = re.compile(r"fold_(\d+)")


@dataclass(frozen=True)
class Measure:
    """One metric of one run.

    Args:
        value: the figure itself; the mean where there are `values`.
        unit: what `values` are of; empty where only the figure is known.
        values: the figure of each image or fold that has one.
        origin: two measures with values of the same names are of the same images or folds only
            where this is equal too; empty where it is not known.
        note: what a reader should know, such as the epoch.
        score: which of the scores over all images that a classifier has, if any.
        said: truth and prediction per image, for its interval.
    """

    value: float
    unit: Literal["image", "fold", ""] = ""
    values: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""
    note: str = ""
    score: str = ""
    said: Said = field(default_factory=dict)


def read_measures(folder: Path) -> dict[str, Measure]:
    """Return the metrics of a training, an evaluation or a cross-validation by their names.

    Figures of validation have the names of `metrics_history.yaml`, at the best epoch; those of an
    evaluation have the split before them: `test dice` is the mean over the images, and
    `test dice, pooled` counts all pixels as one image. A training has those of its evaluations too.

    Raises:
        InputError: there is nothing to compare in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders of runs, evaluations or folds")
    if (folder / "test_metrics.yaml").exists() or (folder / "per_image_metrics.yaml").exists():
        return _evaluated(folder)
    folds = _fold_folders(folder)
    if folds and not (folder / "metrics_history.yaml").exists():
        return _over_folds(folder, folds)
    measures = _trained(folder)
    for path in sorted((folder / "evaluation").glob("*/test_metrics.yaml")):
        measures |= _evaluated(path.parent)
    if not measures:
        raise InputError(
            f"{folder}: nothing to compare; expected the folder of a run (metrics_history.yaml "
            "with a validated epoch), of an evaluation (test_metrics.yaml) or of folds (fold_0)"
        )
    return measures


def fold_figures(folder: Path) -> dict[str, Any]:
    """Return `metric`, `best`, `best_epoch` and `epochs` of a training; None where unknown.

    The metric is the one that the run chose its best epoch by.
    """
    history = _history(folder)
    config = read_yaml(folder / "config.yaml")
    stopping = config.get("early_stopping") if isinstance(config, Mapping) else None
    metric = stopping.get("monitor") if isinstance(stopping, Mapping) else None
    best = _best(history)
    return {
        "metric": metric,
        "best": finite((best.get("val") or {}).get(metric)) if best else None,
        "best_epoch": best["epoch"] if best else None,
        "epochs": history[-1]["epoch"] if history else 0,
    }


def _trained(folder: Path) -> dict[str, Measure]:
    best = _best(_history(folder))
    if best is None:
        return {}
    note = f"best epoch {best['epoch']}"
    figures = {key: finite(value) for key, value in (best.get("val") or {}).items()}
    return {key: Measure(value, note=note) for key, value in figures.items() if value is not None}


def _history(folder: Path) -> list[dict[str, Any]]:
    history = read_yaml(folder / "metrics_history.yaml") or []
    if not isinstance(history, list) or not all(
        isinstance(entry, dict) and "epoch" in entry for entry in history
    ):
        raise InputError(
            f"{folder / 'metrics_history.yaml'}: expected a list of epochs, as a run writes it"
        )
    return history


def _best(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((entry for entry in reversed(history) if entry.get("new_best")), None)


def _evaluated(folder: Path) -> dict[str, Measure]:
    totals = _mapping(folder / "test_metrics.yaml")
    split = str(totals.get("split") or "test")
    origin = str(totals.get("manifest") or "")
    if "dataset_dir" in totals and totals["dataset_dir"] is None:
        origin = f"phantom of {folder.resolve()}"  # drawn for this run: its names say nothing
    rows = _rows(folder / "per_image_metrics.yaml")
    said = said_of(rows)
    measures: dict[str, Measure] = {}
    for name, value in (totals.get("average_metrics") or {}).items():
        if (number := finite(value)) is not None:
            measures[f"{split} {name}"] = Measure(number)
    for name, values in _per_image(rows).items():
        mean = math.fsum(values.values()) / len(values)
        measures[f"{split} {name}"] = Measure(mean, "image", values, origin)
    for name, value in (totals.get("pooled_metrics") or {}).items():
        if (number := finite(value)) is not None:
            pairs = said if name in SCORES else {}
            unit: Literal["image", ""] = "image" if pairs else ""
            measures[f"{split} {name}, pooled"] = Measure(
                number, unit, origin=origin, score=name if pairs else "", said=pairs
            )
    return measures


def _mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of metrics, as `evaluate` writes it")
    return content


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_yaml(path) or []
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "image" in row for row in rows
    ):
        raise InputError(f"{path}: expected a list of images, as `evaluate` writes it")
    return rows


def _per_image(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return metric -> image -> figure; an image where the metric is not defined is left out."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name == "correct" and isinstance(value, bool):
                name, value = "accuracy", float(value)
            if name != "image" and (number := finite(value)) is not None:
                found.setdefault(name, {})[str(row["image"])] = number
    return found


def _fold_folders(folder: Path) -> dict[int, Path]:
    numbered = ((_FOLD_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in numbered if match))


def _over_folds(folder: Path, folds: Mapping[int, Path]) -> dict[str, Measure]:
    """Return mean and values over the folds that are done, as far as `folds.yaml` tells."""
    summary = _mapping(folder / FOLDS_FILE)
    status = {entry["fold"]: entry["status"] for entry in summary.get("runs", ())}
    done = {k: path for k, path in folds.items() if status.get(k, "done") == "done"}
    left_out = len(set(folds) | set(status)) - len(done)
    note = f"{left_out} more not done" if left_out else ""
    identity = [summary.get(key) for key in ("manifest", "count", "fold_seed")]
    origin = " ".join(map(str, identity)) if summary else ""
    found: dict[str, dict[str, float]] = {}
    for number, path in done.items():
        for name, measure in read_measures(path).items():
            found.setdefault(name, {})[str(number)] = measure.value
    return {
        name: Measure(math.fsum(values.values()) / len(values), "fold", values, origin, note)
        for name, values in found.items()
    }
