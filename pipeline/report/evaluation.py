"""The page of an evaluation, made from the files that it left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.page import Page, format_value
from pipeline.report.run_files import pictures, read_text, read_yaml

__all__ = ["evaluation_report"]

SHOWN = 12
_IN_TITLE = {"experiment", "checkpoint"}


def evaluation_report(
    folder: Path | str, metric: str | None = None, *, lower_is_better: bool = False
) -> Path:
    """Write `report.html` into an evaluation folder and return its path.

    Args:
        folder: holds `test_metrics.yaml`, `per_image_metrics.yaml`, and where present `pictures/`.
        metric: which column of the per-image table orders the pictures, worst first; the
            first with numbers if None.
        lower_is_better: whether the worst has the highest value, as an error does.

    Raises:
        InputError: there is no `test_metrics.yaml`.
    """
    folder = Path(folder)
    metrics: dict[str, Any] = read_yaml(folder / "test_metrics.yaml") or {}
    if not metrics:
        raise InputError(f"{folder}: no test_metrics.yaml: give the folder that `evaluate` wrote")
    images: list[dict[str, Any]] = read_yaml(folder / "per_image_metrics.yaml") or []
    page = Page(
        f"Evaluation: {metrics.get('experiment', folder.name)}", str(metrics.get("checkpoint", ""))
    )
    plain = {key: value for key, value in metrics.items() if not isinstance(value, Mapping)}
    page.facts({key.replace("_", " "): v for key, v in plain.items() if key not in _IN_TITLE})
    page.section("Metrics")
    page.table(_metric_rows(metrics, images))
    page.text(
        "Mean, deviation and range are over the images; pooled counts all pixels as one image.",
        soft=True,
    )
    if images:
        page.section("Images")
        names = dict.fromkeys(["image", *(key for image in images for key in image)])
        page.table(images, list(names))
    numeric = [key for image in images for key in image if _finite(image[key]) is not None]
    metric = metric or next(iter(numeric), "image")
    _pictures(page, folder, images, metric, lower_is_better=lower_is_better)
    page.details("test_metrics.yaml", read_text(folder / "test_metrics.yaml"))
    return page.write(folder / "report.html")


def _metric_rows(
    metrics: Mapping[str, Any], images: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    average, pooled = metrics.get("average_metrics") or {}, metrics.get("pooled_metrics") or {}
    rows = []
    for name in dict.fromkeys([*average, *pooled]):
        values = [v for image in images if (v := _finite(image.get(name))) is not None]
        row = {"metric": name, "mean per image": average.get(name), "pooled": pooled.get(name)}
        if values:
            mean = math.fsum(values) / len(values)
            row["deviation"] = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
            row |= {"lowest": min(values), "highest": max(values)}
        rows.append(row)
    return rows


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _pictures(
    page: Page,
    folder: Path,
    images: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    lower_is_better: bool,
) -> None:
    """Add pictures, worst first, as many as a page can carry: worst, median and best of many."""
    score = {
        Path(str(image.get("image"))).with_suffix(""): _finite(image.get(metric))
        for image in images
    }
    found = pictures(folder)
    if not found:
        return
    place = {
        path: score.get(path.relative_to(folder / "pictures").with_suffix("")) for path in found
    }
    sign = -1.0 if lower_is_better else 1.0
    ordered = sorted(
        found, key=lambda path: (place[path] is None, sign * (place[path] or 0.0), str(path))
    )
    if len(ordered) > SHOWN:
        third, middle = SHOWN // 3, len(ordered) // 2
        chosen = [*range(third), *range(middle - third // 2, middle - third // 2 + third)]
        chosen += range(len(ordered) - third, len(ordered))
        shown = [ordered[index] for index in sorted(set(chosen))]
    else:
        shown = ordered
    page.section("Pictures")
    of = f", the worst, middle and best of {len(ordered)}" if len(shown) < len(ordered) else ""
    first = "Highest" if lower_is_better else "Lowest"
    page.text(f"{first} {metric} first{of}.", soft=True)
    names = {path: str(path.relative_to(folder / "pictures").with_suffix("")) for path in shown}
    captions = {path: f"{names[path]}: {metric} {format_value(place[path])}" for path in shown}
    page.pictures(shown, captions)
