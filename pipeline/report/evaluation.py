"""The page of an evaluation, made from the files that it left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.cases import add_cases, case_key, worst_first
from pipeline.report.class_scores import SCORES, said_of, score_interval
from pipeline.report.class_tables import add_calibration, add_classes
from pipeline.report.directions import lower_is_better as lower_by_name
from pipeline.report.failures import add_failures
from pipeline.report.intervals import CONFIDENCE, image_interval
from pipeline.report.page import Link, Page
from pipeline.report.run_files import mapping_in, read_text, rows_in
from pipeline.report.values import finite

__all__ = ["evaluation_report"]

_IN_TITLE = frozenset({"experiment", "checkpoint", "picture_legend"})
_MOST_FACTS = 6


def evaluation_report(
    folder: Path | str, metric: str | None = None, *, lower_is_better: bool | None = None
) -> Path:
    """Write `report.html` into an evaluation folder and return its path.

    Args:
        folder: holds `test_metrics.yaml` or `per_image_metrics.yaml`, and where present
            `pictures/`, `failures.csv` and a classifier's tables.
        metric: which column of the per-image table orders cases and table, worst first; the
            first with numbers if None.
        lower_is_better: whether the worst has the highest value, as an error does; None: as the
            metric's name tells.

    Raises:
        InputError: there is neither of the two tables.
    """
    folder = Path(folder)
    metrics = mapping_in(folder / "test_metrics.yaml")
    images: Sequence[Mapping[str, Any]] = rows_in(folder / "per_image_metrics.yaml")
    if not metrics and not images:
        raise InputError(f"{folder}: no test_metrics.yaml: give the folder that `evaluate` wrote")
    numeric = [key for image in images for key in image if finite(image[key]) is not None]
    metric = metric or next(iter(numeric), "image")
    lower = bool(lower_by_name(metric)) if lower_is_better is None else lower_is_better
    images = worst_first(images, metric, lower_is_better=lower)
    page = Page(
        f"Evaluation: {metrics.get('experiment', folder.name)}", str(metrics.get("checkpoint", ""))
    )
    rows = _metric_rows(metrics, images)
    page.facts(*_headline(metrics, rows, metric))
    plain = {key: v for key, v in metrics.items() if not isinstance(v, Mapping | list)}
    page.facts({key.replace("_", " "): v for key, v in plain.items() if key not in _IN_TITLE})
    if not metrics:
        page.warning("There is no test_metrics.yaml: the evaluation did not end.")
    add_failures(page, folder)
    _metrics(page, rows, metrics, images)
    legend = str(metrics.get("picture_legend") or "")
    found = add_cases(page, folder, images, metric, legend)
    add_classes(page, folder)
    add_calibration(page, images)
    _images(page, images, found, metric, lower_is_better=lower)
    if metrics:
        page.details("test_metrics.yaml", read_text(folder / "test_metrics.yaml"))
    return page.write(folder / "report.html")


def _metric_rows(
    metrics: Mapping[str, Any], images: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row per metric: over the images, with its interval, and over all as one."""
    average = _part(metrics, "average_metrics")
    pooled = _part(metrics, "pooled_metrics") or _part(metrics, "overall")
    columns = dict.fromkeys(key for image in images for key in image)
    names = [*average, *pooled, *(() if average else columns)]
    said = said_of(images)
    rows = []
    for name in dict.fromkeys(names):
        values = [v for image in images if (v := finite(image.get(name))) is not None]
        if name == "accuracy" and name not in columns:
            values = [float(row["correct"]) for row in images if "correct" in row]
        mean = finite(average.get(name, math.fsum(values) / len(values) if values else None))
        row: dict[str, Any] = {"metric": name, "mean": mean, "pooled": finite(pooled.get(name))}
        if mean is None and row["pooled"] is None:
            continue  # a column of names
        if name in SCORES and said:
            row["from"], row["to"] = score_interval(name, said) or (None, None)
        if values:
            row["from"], row["to"] = image_interval(values) or (None, None)
            row |= {"deviation": statistics.pstdev(values)}
            row |= {"lowest": min(values), "highest": max(values)}
        rows.append(row)
    return rows


def _headline(
    metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the figures to be seen first, and their intervals.

    They are the metric that orders the cases, those that end like it, then the pooled ones.
    """
    by_name = {str(row["metric"]): row for row in rows}
    alike = [name for name in by_name if name == metric or name.endswith(f"_{metric}")]
    names = [*alike, *_part(metrics, "pooled_metrics"), *by_name]
    told = [n for n in dict.fromkeys(names) if n in by_name and not n.endswith("probability")]
    facts, notes = {}, {}
    for name in told[:_MOST_FACTS]:
        row = by_name[name]
        facts[name] = row["pooled"] if row["mean"] is None else row["mean"]
        if row.get("from") is not None:
            notes[name] = f"{row['from']:.3g} to {row['to']:.3g}"
    return facts, notes


def _metrics(
    page: Page,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]],
) -> None:
    page.section("Metrics")
    order = ["metric", "mean", "from", "to", "deviation", "lowest", "highest", "pooled"]
    known = [name for name in order if any(row.get(name) is not None for row in rows)]
    page.table(rows, known or ["metric"])
    page.text(
        f"Mean, deviation and range are over the {len(images)} images; from and to enclose the "
        f"figure with {CONFIDENCE:.0%} confidence (bootstrap over the images); pooled is over all "
        "of them as one.",
        soft=True,
    )
    for key, part in metrics.items():
        groups = part if isinstance(part, Mapping) and key != "spread" else {}
        if groups and all(isinstance(group, Mapping) for group in groups.values()):
            page.subsection(key.replace("_", " ").capitalize())
            page.table([{"group": str(name), **group} for name, group in groups.items()])


def _images(
    page: Page,
    images: Sequence[Mapping[str, Any]],
    found: Mapping[str, Path],
    metric: str,
    *,
    lower_is_better: bool,
) -> None:
    page.section("Images")
    if not images:
        page.text("No image was evaluated.")
        return
    first = "Highest" if lower_is_better else "Lowest"
    page.text(
        f"{first} {metric} first. A click on a heading sorts; a name leads to its picture.",
        soft=True,
    )
    rows = []
    for image in images:
        picture = found.get(case_key(image.get("image")))
        target = "" if picture is None else page.link_to(picture)
        rows.append({**image, "image": Link(str(image.get("image", "")), target)})
    names = dict.fromkeys(key for image in images for key in image)
    leading = [key for key in ("image", metric) if key in names or key == "image"]
    page.table(rows, list(dict.fromkeys([*leading, *names])))


def _part(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = metrics.get(key)
    return part if isinstance(part, Mapping) else {}
