"""What the folds of a cross-validation add up to, from their entries in `folds.yaml`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.page import format_value

__all__ = ["fold_totals", "folds_text"]


def fold_totals(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the entries of a summary come to.

    Args:
        runs: per fold `status`, `metric`, `best`, `started`, `ended`, `seconds`.

    Returns:
        `folds` (how many have each status), `metric`, `mean` and `sd` of the best values of the
        folds done (None where there are too few), `started`, `ended`, `seconds` (spent training,
        without the time in between).
    """
    states = [entry["status"] for entry in runs]
    done = [entry for entry in runs if entry["status"] == "done"]
    best = [entry["best"] for entry in done if entry["best"] is not None]
    return {
        "folds": {status: states.count(status) for status in dict.fromkeys(states)},
        "metric": next((entry["metric"] for entry in done), None),
        "mean": statistics.fmean(best) if best else None,
        "sd": statistics.stdev(best) if len(best) > 1 else None,
        "started": min((entry["started"] for entry in runs if entry["started"]), default=None),
        "ended": max((entry["ended"] for entry in runs if entry["ended"]), default=None),
        "seconds": round(sum(entry["seconds"] for entry in runs), 3),
    }


def folds_text(summary: Mapping[str, Any]) -> str:
    """Return the summary as a table for a terminal."""
    total = summary["total"]
    metric = total["metric"] or "best"
    lines = [["fold", "status", metric, "best epoch", "epochs", "minutes", "error"]]
    for entry in summary["runs"]:
        values = [entry["fold"], entry["status"], entry["best"], entry["best_epoch"]]
        values += [entry["epochs"], entry["seconds"] / 60, entry["error"]]
        lines.append([format_value(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    counts = ", ".join(f"{count} {status}" for status, count in total["folds"].items())
    text.append(f"total: {counts}; {total['seconds'] / 60:.1f} minutes")
    if total["mean"] is not None:
        spread = f" +- {total['sd']:.4f} (standard deviation)" if total["sd"] is not None else ""
        text.append(f"{metric}: mean {total['mean']:.4f}{spread} over the folds done")
    return "\n".join(text)
