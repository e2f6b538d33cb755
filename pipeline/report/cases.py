"""Which cases of an evaluation to look at: the worst, some from the middle, and the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.writers import result_path
from pipeline.errors import ConfigurationError
from pipeline.report.page import Page
from pipeline.report.run_files import pictures
from pipeline.report.values import finite, format_value

__all__ = ["add_cases", "add_pictures", "case_key", "worst_first"]

SHOWN = 12


def case_key(name: Any) -> str:
    """Return what an image and its picture have in common: folders and name, no extension.

    Example:
        >>> case_key("images/im0001.ppm.gz")
        'images/im0001'
    """
    try:
        return result_path(str(name), ".", "", "").as_posix()
    except ConfigurationError:  # a name from elsewhere, whose picture is not below this folder
        return Path(str(name)).with_suffix("").as_posix()


def worst_first(
    rows: Sequence[Mapping[str, Any]], metric: str, *, lower_is_better: bool
) -> list[Mapping[str, Any]]:
    """Return the rows in the order of `metric`, those without a value last."""
    sign = -1.0 if lower_is_better else 1.0

    def place(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = finite(row.get(metric))
        return value is None, sign * (value or 0.0)

    return sorted(rows, key=place)


def add_cases(
    page: Page, folder: Path, rows: Sequence[Mapping[str, Any]], metric: str, legend: str = ""
) -> dict[str, Path]:
    """Add the pictures of the worst, middle and best cases, as many as a page can carry.

    Args:
        page: to which they are added.
        folder: with `pictures/`.
        rows: per image, the worst first.
        metric: what they are sorted by.
        legend: what the colours in the pictures mean.

    Returns:
        The file of every picture that exists, by the key of its case.
    """
    found = _found(folder)
    if not found:
        return found
    page.section("Cases")
    if legend:
        page.text(legend)
    row_of = {case_key(row.get("image")): row for row in rows}
    captions = {path: _caption(key, row_of.get(key, {}), metric) for key, path in found.items()}
    ordered = [key for key in row_of if key in found]
    ordered += [key for key in found if key not in row_of]
    drawn = f"{len(ordered)} of {len(rows)} images have a picture" if rows else ""
    for title, keys in _chosen(ordered, [*row_of]).items():
        page.subsection(title)
        page.pictures([found[key] for key in keys], captions)
    if drawn:
        page.text(f"{drawn}; all of them lie in pictures/.", soft=True)
    return found


def add_pictures(page: Page, folder: Path, legend: str = "") -> dict[str, Path]:
    """Add pictures in the order of their names, as many as a page can carry.

    Returns:
        The file of every picture that exists, by the key of its case.
    """
    found = _found(folder)
    if not found:
        return found
    page.section("Pictures")
    if legend:
        page.text(legend)
    if len(found) > SHOWN:
        page.text(f"The first {SHOWN} of {len(found)}; the others lie in pictures/.", soft=True)
    shown = dict(list(found.items())[:SHOWN])
    page.pictures(shown.values(), {path: key for key, path in shown.items()})
    return found


def _found(folder: Path) -> dict[str, Path]:
    """Return the pictures of a folder by the key of their case."""
    return {
        path.relative_to(folder / "pictures").with_suffix("").as_posix(): path
        for path in pictures(folder)
    }


def _caption(key: str, row: Mapping[str, Any], metric: str) -> str:
    text = f"{key}: {metric} {format_value(finite(row.get(metric)))}"
    if {"truth", "predicted"} <= row.keys():
        text += f"; {row['truth']}, predicted {row['predicted']}"
    return text


def _chosen(ordered: Sequence[str], ranking: Sequence[str]) -> dict[str, list[str]]:
    """Return which cases are shown under which heading.

    Args:
        ordered: cases with a picture, the worst first.
        ranking: all cases, the worst first.
    """
    hardest = len(ordered) < len(ranking) and [*ordered] == [*ranking[: len(ordered)]]
    if hardest:  # an evaluation of very many images draws these alone
        return {"Hardest": list(ordered[:SHOWN])}
    if len(ordered) <= SHOWN:
        return {"From the worst to the best": list(ordered)}
    third = SHOWN // 3
    start = len(ordered) // 2 - third // 2
    return {
        "Worst": list(ordered[:third]),
        "Middle": list(ordered[start : start + third]),
        "Best, the best last": list(ordered[-third:]),
    }
