"""Runs, folds or networks side by side on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.diagrams import interval_chart
from pipeline.report.page import Page

__all__ = ["comparison_report"]

_MOST_CHARTS = 24


def comparison_report(comparison: Mapping[str, Any], path: Path | str) -> Path:
    """Write what `compare_runs` found as a page and return its path.

    Args:
        comparison: as `compare_runs` returns it.
        path: of the page.
    """
    runs, rows = comparison["runs"], comparison["rows"]
    page = Page("Comparison", f"{len(runs)} runs" if len(runs) != 1 else str(runs[0]))
    page.section("Runs")
    short = _short_names(runs)
    first = "the others are compared with it" if len(runs) > 1 else ""
    role = [first, *[""] * (len(runs) - 1)]
    page.table(
        [
            {"run": short[run], "folder": run, "role": why}
            for run, why in zip(runs, role, strict=True)
        ]
    )
    _charts(page, rows, short)
    page.section("Figures")
    page.table([_line(row, short) for row in rows], _columns(rows))
    percent = f"{comparison['confidence']:.0%}"
    page.text(
        f"From and to: {percent} interval by bootstrap over the images, seed {comparison['seed']}; "
        "folds have a mean and a standard deviation. Difference: to the first run, image by image "
        "or fold by fold where they are the same ones; better and worse where its interval lies on "
        "one side of 0 and the metric's name tells which side is better.",
        soft=True,
    )
    return page.write(Path(path))


def _charts(page: Page, rows: Sequence[Mapping[str, Any]], short: Mapping[str, str]) -> None:
    """Add a chart per metric: those with intervals or folds where there are any."""
    metrics: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        metrics.setdefault(row["metric"], []).append({**row, "run": short[row["run"]]})
    told = {name: lines for name, lines in metrics.items() if any(row["unit"] for row in lines)}
    judged = {name: lines for name, lines in told.items() if _direction(lines)} or told or metrics
    shown = dict(list(judged.items())[:_MOST_CHARTS])
    if not shown:
        return
    page.section("Charts")
    page.figures(
        interval_chart(lines, f"{name}{_direction(lines)}") for name, lines in shown.items()
    )
    if len(shown) < len(metrics):
        page.text(f"{len(shown)} of {len(metrics)} metrics; all are in the table.", soft=True)


def _direction(lines: Sequence[Mapping[str, Any]]) -> str:
    lower = lines[0].get("lower_is_better")
    return "" if lower is None else f", {'lower' if lower else 'higher'} is better"


def _line(row: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    difference = row["difference"] or {}
    return {
        "metric": row["metric"],
        "run": short[row["run"]],
        "of": f"{row['n']} {row['unit']}s" if row["unit"] else None,
        "mean": row["mean"],
        "from": row["low"],
        "to": row["high"],
        "sd": row["sd"],
        "difference": difference.get("mean"),
        "difference from": difference.get("low"),
        "difference to": difference.get("high"),
        "verdict": difference.get("verdict") or None,
        "note": row["note"] or None,
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that say anything."""
    lines = [_line(row, {row["run"]: row["run"]}) for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    return [name for name in names if any(line[name] is not None for line in lines)] or ["metric"]


def _short_names(runs: Sequence[str]) -> dict[str, str]:
    """Return of each path what tells it from the others, or its last part where there is one."""
    parts = {run: list(Path(run).parts) or [run] for run in dict.fromkeys(runs)}
    if len(parts) == 1:
        return {run: names[-1] for run, names in parts.items()}
    for end in (0, -1):
        while (
            len({names[end] for names in parts.values()}) == 1 and min(map(len, parts.values())) > 1
        ):
            for names in parts.values():
                del names[end]
    return {run: "/".join(names) for run, names in parts.items()}
