"""The page of a batch of predictions, made from the files that it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.page import Page
from pipeline.report.run_files import pictures, read_csv, read_json, read_text

__all__ = ["inference_report"]

SHOWN = 12


def inference_report(folder: Path | str) -> Path:
    """Write `report.html` into a folder of predictions and return its path.

    Args:
        folder: holds `summary.json`, and where present `per_image.csv`, `failures.csv` and
            `pictures/`.

    Raises:
        InputError: there is no `summary.json`.
    """
    folder = Path(folder)
    summary: dict[str, Any] = read_json(folder / "summary.json") or {}
    if not summary:
        raise InputError(f"{folder}: no summary.json: give the folder that `predict` wrote")
    page = Page(
        f"Predictions: {summary.get('bundle', folder.name)}", str(summary.get("checkpoint", ""))
    )
    short = {k: v for k, v in summary.items() if isinstance(v, (bool, int, float, str))}
    page.facts(
        {k.replace("_", " "): v for k, v in short.items() if k not in {"bundle", "checkpoint"}}
    )
    failures = read_csv(folder / "failures.csv")
    if failures:
        page.section("Rejected inputs")
        page.table(failures)
    found = pictures(folder)
    if found:
        page.section("Pictures")
        if len(found) > SHOWN:
            page.text(f"The first {SHOWN} of {len(found)}; the others lie in pictures/.", soft=True)
        shown = found[:SHOWN]
        names = {path: str(path.relative_to(folder / "pictures").with_suffix("")) for path in shown}
        page.pictures(shown, names)
    images = read_csv(folder / "per_image.csv")
    if images:
        page.section("Images")
        page.table(images)
    page.details("summary.json", read_text(folder / "summary.json"))
    return page.write(folder / "report.html")
