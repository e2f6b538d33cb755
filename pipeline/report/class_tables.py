"""What an evaluation or inference of a classifier left, as sections of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.calibration import calibration_of
from pipeline.report.diagrams import count_chart, reliability_diagram
from pipeline.report.page import Page
from pipeline.report.run_files import read_csv, read_text
from pipeline.report.values import finite

__all__ = ["add_calibration", "add_classes", "add_predictions"]

_MOST_CONFUSED = 10


def add_classes(page: Page, folder: Path) -> None:
    """Add confusion matrix, most frequent confusions and the table per class, where they exist."""
    picture, matrix = folder / "confusion_matrix.png", read_csv(folder / "confusion_matrix.csv")
    per_class = read_csv(folder / "per_class_metrics.csv")
    if not (picture.exists() or matrix or per_class):
        return
    page.section("Classes")
    if picture.exists():
        page.pictures([picture], {picture: "Confusion matrix: truth along the rows"})
    confused = _confusions(matrix)
    if confused:
        page.subsection("Most frequent confusions")
        page.table(confused)
    if per_class:
        page.subsection("Per class")
        page.table(per_class)
    if matrix:
        page.details("confusion_matrix.csv", read_text(folder / "confusion_matrix.csv"))


def add_calibration(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add how sure the predictions were and how often they were right, where the rows tell."""
    found = calibration_of(rows)
    if found is None:
        return
    page.section("Calibration")
    counts = [int(count) for count in found.counts]
    page.figures(
        [
            reliability_diagram(found),
            count_chart(counts, "How sure", "probability of the predicted class"),
        ]
    )
    sides = "surer than it was right" if found.bias > 0 else "less sure than it was right"
    page.text(
        f"Expected calibration error {found.error:.4f} in {len(counts)} bins over "
        f"{sum(counts)} images; on average {abs(found.bias):.4f} {sides}. On the dashed line "
        "probabilities are as high as predictions are right; larger dots hold more images.",
        soft=True,
    )


def add_predictions(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add how many inputs were given each class, and how sure that was."""
    classes: dict[str, list[float | None]] = {}
    for row in rows:
        if row.get("class") is not None:
            classes.setdefault(str(row["class"]), []).append(finite(row.get("probability")))
    if not classes:
        return
    page.section("Predicted classes")
    table: list[dict[str, Any]] = []
    for name, found in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        known = [value for value in found if value is not None]
        line: dict[str, Any] = {"class": name, "images": len(found)}
        if known:
            line |= {"mean probability": sum(known) / len(known), "lowest": min(known)}
        table.append(line)
    page.table(table)


def _confusions(matrix: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the largest cells beside the diagonal of a matrix with the truth along its rows."""
    cells: list[dict[str, Any]] = []
    for row in matrix:
        (_, truth), *columns = row.items()
        counts = {name: finite(count) or 0 for name, count in columns}
        total = sum(counts.values())
        cells += [
            {
                "truth": str(truth),
                "predicted": name,
                "images": int(count),
                "share of the truth": count / total,
            }
            for name, count in counts.items()
            if count and name != str(truth)
        ]
    cells.sort(key=lambda cell: (-cell["images"], -cell["share of the truth"]))
    return cells[:_MOST_CONFUSED]
