"""One table over runs, evaluations and folds, made from the files that they left."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.report.class_scores import score_difference, score_interval
from pipeline.report.directions import lower_is_better
from pipeline.report.intervals import CONFIDENCE, RESAMPLES, bootstrap_interval
from pipeline.report.measures import FOLDS_FILE, Measure, fold_figures, read_measures
from pipeline.report.values import format_value

__all__ = [
    "FOLDS_FILE",
    "Measure",
    "compare_runs",
    "comparison_text",
    "fold_figures",
    "read_measures",
]


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
        or folds), `lower_is_better` (None where the name does not tell), `note`, and `difference`
        to the first run where it has the same images or folds: `n`, `mean`, `low`, `high`, `sd` of
        what remains when its figure is subtracted one by one, and `verdict`: `better` or `worse`
        where the interval is on one side of 0.

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
                row["lower_is_better"] = lower_is_better(metric)
                first = found[0].get(metric)
                if first is not None and measures is not found[0]:
                    row["difference"] = _difference(measures[metric], first, seed)
                    if row["difference"]:
                        row["difference"]["verdict"] = _verdict(row)
                    if row["unit"] and row["difference"] is None:
                        mine = measures[metric]
                        alike = bool(mine.values) and mine.origin == first.origin
                        alike = alike and mine.values.keys() == first.values.keys()
                        why = "too few" if alike else "other"
                        than = "for a difference" if alike else "than the first"
                        row["note"] = f"{row['note']} {why} {row['unit']}s {than}".strip()
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
            spread = _interval(difference, sign="+") or sd
            cells.append("-" if value is None else f"{spread} {difference['verdict']}".rstrip())
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


def _row(measure: Measure, seed: int) -> dict[str, Any]:
    count = len(measure.values) or len(measure.said)
    row: dict[str, Any] = {"unit": measure.unit, "n": count or None}
    row |= {"mean": measure.value, **_spread(measure.unit, list(measure.values.values()), seed)}
    if measure.score:
        row["low"], row["high"] = score_interval(measure.score, measure.said, seed=seed) or (
            None,
            None,
        )
    if measure.unit == "fold":
        row["values"] = dict(measure.values)
    return row | {"note": measure.note, "difference": None}


def _difference(measure: Measure, first: Measure, seed: int) -> dict[str, Any] | None:
    """Return the paired difference, None where the images or folds are not the same ones."""
    same = measure.unit == first.unit and measure.origin == first.origin != ""
    if same and measure.score:
        found = score_difference(measure.score, measure.said, first.said, seed=seed)
        if found is None:
            return None
        ends = dict(zip(("mean", "low", "high"), found, strict=True))
        return {"n": len(measure.said), **ends, "sd": None}
    common = sorted(measure.values.keys() & first.values.keys())
    if not same or len(common) < 2:
        return None
    values = [measure.values[name] - first.values[name] for name in common]
    mean = math.fsum(values) / len(values)
    return {"n": len(values), "mean": mean, **_spread(measure.unit, values, seed)}


def _verdict(row: Mapping[str, Any]) -> str:
    """Return whether the difference is one beyond chance, and to which side; else nothing."""
    difference, lower = row["difference"], row["lower_is_better"]
    if lower is None or difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return ""
    return "better" if (difference["mean"] < 0) == lower else "worse"


def _spread(unit: str, values: Sequence[float], seed: int) -> dict[str, float | None]:
    """Return the interval over images, none over folds: too few and trained on the same data."""
    interval = bootstrap_interval(values, seed=seed) if unit == "image" else None
    low, high = interval or (None, None)
    return {"low": low, "high": high, "sd": statistics.stdev(values) if len(values) > 1 else None}


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
