"""One table over runs, evaluations and folds, made from the files that they left."""

from __future__ import annotations

import difflib
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigurationError, InputError
from pipeline.report.intervals import CONFIDENCE, RESAMPLES, bootstrap_interval
from pipeline.report.page import format_value
from pipeline.report.run_files import read_yaml

__all__ = [
    "FOLDS_FILE",
    "Measure",
    "compare_runs",
    "comparison_text",
    "fold_figures",
    "read_measures",
]

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
    """

    value: float
    unit: Literal["image", "fold", ""] = ""
    values: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""
    note: str = ""


def compare_runs(
    runs: Sequence[Path | str], metrics: Iterable[str] = (), *, seed: int = 0
) -> dict[str, Any]:
    """Return the metrics of several runs side by side, as plain data.

    Args:
        runs: folders of a training, of an evaluation, or of a cross-validation (with `fold_<k>`
            below it). The first is what the others are compared with.
        metrics: which to keep; all if none is given.
        seed: of the bootstrap.

    Returns:
        `runs`, `confidence`, `resamples`, `seed` and `rows`: per metric and run `metric`, `run`,
        `unit`, `n`, `mean`, `low` and `high` (interval of the mean over images), `sd` (over images
        or folds), `note`, and `difference` to the first run where it has the same images or folds:
        `n`, `mean`, `low`, `high`, `sd` of what remains when its figure is subtracted one by one.

    Raises:
        InputError: a folder is absent or none of the three.
        ConfigurationError: no run has one of `metrics`.
    """
    names = [str(run) for run in runs]
    found = [read_measures(Path(run)) for run in runs]
    known = list(dict.fromkeys(metric for measures in found for metric in measures))
    chosen = list(metrics) or known
    for metric in chosen:
        if metric not in known:
            close = difflib.get_close_matches(metric, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ConfigurationError(f"no run has a metric {metric!r}; {hint}")
    rows = []
    for metric in chosen:
        for name, measures in zip(names, found, strict=True):
            if metric in measures:
                row = {"metric": metric, "run": name, **_row(measures[metric], seed)}
                first = found[0].get(metric)
                if first is not None and measures is not found[0]:
                    row["difference"] = _difference(measures[metric], first, seed)
                    if row["unit"] and row["difference"] is None:
                        row["note"] = f"{row['note']} other {row['unit']}s than the first".strip()
                rows.append(row)
    settings = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": seed}
    return {"runs": names, **settings, "rows": rows}


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Return what `compare_runs` found as a table for a terminal."""
    runs = comparison["runs"]
    percent = f"{comparison['confidence']:.0%}".replace("%", " %")
    head = ["metric", "run", "of", "mean", f"{percent} interval", "sd"]
    paired = len(runs) > 1
    lines = [[*head, *(["difference", f"{percent} interval", "note"] if paired else ["note"])]]
    for row in comparison["rows"]:
        of = f"{row['n']} {row['unit']}s" if row["unit"] else "-"
        cells = [row["metric"], row["run"], of, format_value(row["mean"]), _interval(row)]
        cells.append(format_value(row["sd"]))
        if paired:
            difference = row["difference"] or {}
            value = difference.get("mean")
            sd = f"sd {difference.get('sd', 0):.4f}" if row["unit"] == "fold" else "-"
            cells.append("-" if value is None else f"{value:+.4f}")
            cells.append("-" if value is None else (_interval(difference, sign="+") or sd))
        lines.append([*(cell or "-" for cell in cells), row["note"]])
    columns = list(zip(*lines, strict=True))
    told = [column for column in columns if set(column[1:]) - {"-", ""}] or columns
    lines = [list(line) for line in zip(*told, strict=True)]
    notes = [
        f"interval: of the mean, {comparison['resamples']} bootstrap resamples of the images, seed "
        f"{comparison['seed']}; folds: mean and standard deviation"
    ]
    if paired:
        notes.append(f"difference: to {runs[0]}, image by image or fold by fold where they agree")
    return "\n".join([*_aligned(lines), *notes])


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
        "best": _finite((best.get("val") or {}).get(metric)) if best else None,
        "best_epoch": best["epoch"] if best else None,
        "epochs": history[-1]["epoch"] if history else 0,
    }


def _trained(folder: Path) -> dict[str, Measure]:
    best = _best(_history(folder))
    if best is None:
        return {}
    note = f"best epoch {best['epoch']}"
    figures = {key: _finite(value) for key, value in (best.get("val") or {}).items()}
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
    measures: dict[str, Measure] = {}
    for name, value in (totals.get("average_metrics") or {}).items():
        if (number := _finite(value)) is not None:
            measures[f"{split} {name}"] = Measure(number)
    for name, values in _per_image(folder / "per_image_metrics.yaml").items():
        mean = math.fsum(values.values()) / len(values)
        measures[f"{split} {name}"] = Measure(mean, "image", values, origin)
    for name, value in (totals.get("pooled_metrics") or {}).items():
        if (number := _finite(value)) is not None:
            measures[f"{split} {name}, pooled"] = Measure(number)
    return measures


def _mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of metrics, as `evaluate` writes it")
    return content


def _per_image(path: Path) -> dict[str, dict[str, float]]:
    """Return metric -> image -> figure; an image where the metric is not defined is left out."""
    rows = read_yaml(path) or []
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "image" in row for row in rows
    ):
        raise InputError(f"{path}: expected a list of images, as `evaluate` writes it")
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "image" and (number := _finite(value)) is not None:
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
    identity = [summary.get(key) for key in ("manifest", "count", "seed")]
    origin = " ".join(map(str, identity)) if summary else ""
    found: dict[str, dict[str, float]] = {}
    for number, path in done.items():
        for name, measure in read_measures(path).items():
            found.setdefault(name, {})[str(number)] = measure.value
    return {
        name: Measure(math.fsum(values.values()) / len(values), "fold", values, origin, note)
        for name, values in found.items()
    }


def _row(measure: Measure, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"unit": measure.unit, "n": len(measure.values) or None}
    row |= {"mean": measure.value, **_spread(measure.unit, list(measure.values.values()), seed)}
    if measure.unit == "fold":
        row["values"] = dict(measure.values)
    return row | {"note": measure.note, "difference": None}


def _difference(measure: Measure, first: Measure, seed: int) -> dict[str, Any] | None:
    """Return the paired difference, None where the images or folds are not the same ones."""
    common = sorted(measure.values.keys() & first.values.keys())
    same = measure.unit == first.unit and measure.origin == first.origin != ""
    if not same or len(common) < 2:
        return None
    values = [measure.values[name] - first.values[name] for name in common]
    mean = math.fsum(values) / len(values)
    return {"n": len(values), "mean": mean, **_spread(measure.unit, values, seed)}


def _spread(unit: str, values: Sequence[float], seed: int) -> dict[str, float | None]:
    """Return the interval over images, none over folds: too few and trained on the same data."""
    interval = bootstrap_interval(values, seed=seed) if unit == "image" else None
    low, high = interval or (None, None)
    return {"low": low, "high": high, "sd": statistics.stdev(values) if len(values) > 1 else None}


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _interval(row: Mapping[str, Any], sign: str = "") -> str:
    if row.get("low") is None:
        return ""
    return f"[{row['low']:{sign}.4f}, {row['high']:{sign}.4f}]"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return [line.rstrip() for line in padded]
