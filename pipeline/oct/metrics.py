"""Errors of predicted boundaries against annotated rows, per scan, per eye and overall.

Truth is the annotated rows with their fractions, never rows read back from a mask. Columns without
annotation count nowhere. Two sets of figures stand side by side: over all annotated columns that
have a row predicted (`found` is their share, 1 for every method but `transition`), and, with
`valid_` before the name, over those that were called valid (`coverage` is their share). What cannot
be measured is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

__all__ = ["ScanRows", "boundary_metrics", "evaluate_scans", "layer_metrics"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_SUMMED = ("columns", "order_violations")


@dataclass(frozen=True)
class ScanRows:
    """Predicted and annotated rows of one B-scan, in one frame: the original one.

    Attributes:
        name: of the scan.
        eye: what scans are grouped by; the subject where the eye is not known.
        predicted: rows `(W,)` per boundary, NaN where there is none.
        truth: annotated rows `(W,)`, NaN where nobody annotated.
        valid: columns `(W,)` whose prediction is trusted; a boundary not named is valid throughout.
        scale_y_um: height of a pixel of this frame; None leaves the figures in micrometres out.
    """

    name: str
    eye: str
    predicted: Mapping[str, NDArray[np.floating]]
    truth: Mapping[str, NDArray[np.floating]]
    valid: Mapping[str, Bools]
    scale_y_um: float | None = None


def boundary_metrics(
    predicted: NDArray[np.floating],
    truth: NDArray[np.floating],
    valid: Bools | None = None,
    scale_y_um: float | NDArray[np.floating] | None = None,
) -> dict[str, float]:
    """Return the errors of one boundary over any number of columns.

    Args:
        predicted: rows of any shape, NaN where there is none.
        truth: annotated rows of the same shape, NaN where there is none.
        valid: columns whose prediction is trusted; None: all.
        scale_y_um: height of a pixel, one for all or one per column.

    Returns:
        `columns` annotated, `found` and `coverage` as shares of them; `mae_px`, `rmse_px`, `p95_px`
        (of the absolute error), `max_px`, `bias_px` (predicted - truth), and `ccc`, Lin's
        concordance; the same with `valid_` before them; all but `ccc` also as `_um` if there is a
        scale.

    Raises:
        InputError: the shapes differ.
    """
    trusted = np.ones(np.shape(truth), np.bool_) if valid is None else np.asarray(valid, np.bool_)
    rows, annotated = _as_floats(predicted), _as_floats(truth)
    _check_shapes(rows.shape, annotated.shape, trusted.shape)
    scale = None if scale_y_um is None else np.broadcast_to(_as_floats(scale_y_um), rows.shape)
    known = np.isfinite(annotated)
    found = known & np.isfinite(rows)
    chosen = found & trusted
    columns = int(known.sum())
    metrics: dict[str, float] = {
        "columns": columns,
        "found": _share(found, columns),
        "coverage": _share(chosen, columns),
    }
    for prefix, where in (("", found), ("valid_", chosen)):
        error = rows[where] - annotated[where]
        figures = {
            **_error_figures(error, "px"),
            "ccc": _concordance(rows[where], annotated[where]),
        }
        if scale is not None:
            figures |= _error_figures(error * scale[where], "um")
        metrics |= {prefix + name: value for name, value in figures.items()}
    return metrics


def layer_metrics(scans: Sequence[ScanRows]) -> dict[str, float]:
    """Return the errors over the columns of some scans, as if they were one scan.

    Returns:
        The figures of `boundary_metrics` with the boundary before them, such as `ilm_mae_px`; with
        ILM and BM both, `thickness_mae_px` and the like, and `order_violations`, the columns in
        which BM is predicted above ILM, annotated or not.

    Raises:
        InputError: there is no scan, the shapes differ, or the scans have not the same boundaries.
    """
    names = _boundaries(scans)
    scale = _pooled_scale(scans)
    pooled = {name: _pooled(scans, name) for name in names}
    metrics = {
        f"{name.lower()}_{figure}": value
        for name, columns in pooled.items()
        for figure, value in boundary_metrics(*columns, scale).items()
    }
    if {"ILM", "BM"} <= set(names):
        (ilm, ilm_truth, ilm_valid), (bm, bm_truth, bm_valid) = pooled["ILM"], pooled["BM"]
        thickness = boundary_metrics(bm - ilm, bm_truth - ilm_truth, ilm_valid & bm_valid, scale)
        metrics |= {f"thickness_{figure}": value for figure, value in thickness.items()}
        metrics["order_violations"] = int((bm < ilm).sum())
    return metrics


def evaluate_scans(scans: Sequence[ScanRows]) -> dict[str, Any]:
    """Return the errors per scan, per eye, and over all eyes.

    Returns:
        `per_scan` and `per_eye`: a row of figures each, with `scan` and `eye`; `overall`: the mean
        of each figure over the eyes in which it could be measured (the largest one of a maximum,
        the sum of a count), the numbers of `eyes` and `scans`, and for each boundary the worst
        scan's `..._worst_scan_mae_px` and its name, `..._worst_scan`.

    Raises:
        InputError: as `layer_metrics`.
    """
    _boundaries(scans)
    per_scan = [{"scan": scan.name, "eye": scan.eye, **layer_metrics([scan])} for scan in scans]
    groups: dict[str, list[ScanRows]] = {}
    for scan in scans:
        groups.setdefault(scan.eye, []).append(scan)
    per_eye: list[dict[str, Any]] = [
        {"eye": eye, "scans": len(group), **layer_metrics(group)} for eye, group in groups.items()
    ]
    overall: dict[str, Any] = {"eyes": len(per_eye), "scans": len(scans)}
    for name in per_eye[0]:
        if name not in ("eye", "scans"):
            overall[name] = _over_eyes(name, [row.get(name, nan) for row in per_eye])
    for boundary in _boundaries(scans):
        overall |= _worst(per_scan, boundary.lower())
    return {"per_scan": per_scan, "per_eye": per_eye, "overall": overall}


def _error_figures(error: Floats, unit: str) -> dict[str, float]:
    size = np.abs(error)
    figures = {
        "mae": size.mean() if error.size else nan,
        "rmse": np.sqrt(np.square(error).mean()) if error.size else nan,
        "p95": np.percentile(size, 95) if error.size else nan,
        "max": size.max() if error.size else nan,
        "bias": error.mean() if error.size else nan,
    }
    return {f"{name}_{unit}": float(value) for name, value in figures.items()}


def _concordance(first: Floats, second: Floats) -> float:
    """Return Lin's concordance correlation; NaN where nothing varies and nothing differs."""
    if not first.size:
        return nan
    difference = first.mean() - second.mean()
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    whole = first.var() + second.var() + difference**2
    return float(2 * covariance / whole) if whole else nan


def _share(where: Bools, whole: int) -> float:
    return float(where.sum()) / whole if whole else nan


def _over_eyes(name: str, values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    if name.endswith(_SUMMED):
        return sum(known)
    if not known:
        return nan
    return max(known) if "max_" in name else float(np.mean(known))


def _worst(per_scan: Sequence[Mapping[str, Any]], boundary: str) -> dict[str, Any]:
    name = f"{boundary}_mae_px"
    known = [row for row in per_scan if not np.isnan(row[name])]
    worst = max(known, key=lambda row: float(row[name]), default={name: nan, "scan": ""})
    return {f"{boundary}_worst_scan_mae_px": worst[name], f"{boundary}_worst_scan": worst["scan"]}


def _boundaries(scans: Sequence[ScanRows]) -> list[str]:
    """Return the boundaries that the scans have, in the order of the first one."""
    if not scans:
        raise InputError("there is no scan to evaluate; expected one or more")
    names = [name for name in scans[0].predicted if name in scans[0].truth]
    for scan in scans:
        if not names or {*scan.predicted} & {*scan.truth} != {*names}:
            raise InputError(
                f"{scan.name} has predictions of {', '.join(scan.predicted) or 'nothing'} and "
                f"annotations of {', '.join(scan.truth) or 'nothing'}; expected the same "
                "boundaries in every scan: evaluate scans without one of them apart"
            )
    return names


def _pooled(scans: Sequence[ScanRows], name: str) -> tuple[Floats, Floats, Bools]:
    """Return predicted and annotated rows and validity of all columns of all scans."""
    parts = []
    for scan in scans:
        rows, truth = _as_floats(scan.predicted[name]), _as_floats(scan.truth[name])
        valid = np.asarray(scan.valid.get(name, np.ones(rows.shape)), np.bool_)
        _check_shapes(rows.shape, truth.shape, valid.shape, f"{scan.name}, {name}: ")
        parts.append((rows, truth, valid))
    rows_of, truth_of, valid_of = zip(*parts, strict=True)
    return np.concatenate(rows_of), np.concatenate(truth_of), np.concatenate(valid_of)


def _pooled_scale(scans: Sequence[ScanRows]) -> Floats | None:
    """Return the height of a pixel at each column; None where a scan has none."""
    scales = [scan.scale_y_um for scan in scans]
    widths = [next(iter(scan.predicted.values())).size for scan in scans]
    known = [scale for scale in scales if scale is not None]
    return np.repeat(_as_floats(known), widths) if len(known) == len(scales) else None


def _check_shapes(
    predicted: tuple[int, ...], truth: tuple[int, ...], valid: tuple[int, ...], place: str = ""
) -> None:
    if not predicted == truth == valid:
        raise InputError(
            f"{place}predicted rows have shape {predicted}, annotated ones {truth}, validity "
            f"{valid}; expected one shape: map the prediction into the frame of the annotation"
        )


def _as_floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)
