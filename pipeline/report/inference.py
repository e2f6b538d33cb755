"""The page of a batch of predictions, made from the files that it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.cases import add_pictures, case_key
from pipeline.report.class_tables import add_predictions
from pipeline.report.failures import add_failures
from pipeline.report.page import Link, Page
from pipeline.report.run_files import read_csv, read_json, read_text
from pipeline.report.values import format_duration, format_time

__all__ = ["inference_report"]

_IN_TITLE = frozenset({"bundle", "checkpoint", "picture_legend", "ended", "model_sha256"})


def inference_report(folder: Path | str) -> Path:
    """Write `report.html` into a folder of predictions and return its path.

    Args:
        folder: holds `summary.json`, or of a run that did not end `per_image.csv` or
            `failures.csv`; and where present `predictions.csv` and `pictures/`.

    Raises:
        InputError: there is none of the three.
    """
    folder = Path(folder)
    summary: dict[str, Any] = read_json(folder / "summary.json") or {}
    images = read_csv(folder / "predictions.csv") or read_csv(folder / "per_image.csv")
    if not summary and not images and not (folder / "failures.csv").exists():
        raise InputError(f"{folder}: no summary.json: give the folder that `predict` wrote")
    page = Page(
        f"Predictions: {summary.get('bundle', folder.name)}", str(summary.get("checkpoint", ""))
    )
    page.facts(_facts(summary))
    if not summary:
        page.warning("There is no summary.json: the run did not end.")
    add_failures(page, folder)
    found = add_pictures(page, folder, str(summary.get("picture_legend") or ""))
    add_predictions(page, images)
    _images(page, images, found)
    if summary:
        page.details("summary.json", read_text(folder / "summary.json"))
    return page.write(folder / "report.html")


def _facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        key.replace("_", " "): value
        for key, value in summary.items()
        if isinstance(value, (bool, int, float, str)) and key not in _IN_TITLE
    }
    if "started" in facts:
        facts["started"] = format_time(facts["started"])
    if isinstance(seconds := facts.pop("seconds", None), (int, float)):
        facts["time"] = format_duration(seconds)
    return facts


def _images(page: Page, images: Sequence[Mapping[str, Any]], found: Mapping[str, Path]) -> None:
    page.section("Images")
    if not images:
        page.text("No image was processed.")
        return
    rows = []
    for image in images:
        picture = found.get(case_key(image.get("image")))
        target = "" if picture is None else page.link_to(picture)
        rows.append({**image, "image": Link(str(image.get("image", "")), target)})
    told = [key for key in images[0] if any(row.get(key) is not None for row in images)]
    page.table(rows, told)
