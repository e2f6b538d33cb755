"""Reliability diagrams and interval charts as SVG text, in the colours of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.axes import BOTTOM, COLOURS, RIGHT, TOP, WIDTH, Frame, svg, ticks
from pipeline.report.calibration import Calibration

__all__ = ["count_chart", "interval_chart", "reliability_diagram"]

_NAMES_PX = 170  # left of an interval chart
_LINE_PX = 26
_FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def reliability_diagram(calibration: Calibration, title: str = "Right, by how sure") -> str:
    """Return accuracy against confidence; on the dashed diagonal a classifier is as sure as right.

    The area of a dot grows with the predictions of its bin.
    """
    frame = Frame((0, 1), (0, 1))
    parts = [frame.grid(_FIFTHS, _FIFTHS, "probability of the predicted class")]
    parts.append(
        f'<path d="M{frame.x(0):.1f} {frame.y(0):.1f}L{frame.x(1):.1f} {frame.y(1):.1f}" '
        'stroke="var(--soft)" stroke-dasharray="4 4"/>'
    )
    total = calibration.counts.sum()
    columns = zip(calibration.confidence, calibration.accuracy, calibration.counts, strict=True)
    for sure, right, count in columns:
        if count:
            x, radius = frame.x(float(sure)), 4 + 14 * math.sqrt(count / total)
            parts.append(
                f'<path d="M{x:.1f} {frame.y(float(sure)):.1f}V{frame.y(float(right)):.1f}" '
                'stroke="var(--s1)" stroke-width="2"/>'
                f'<circle cx="{x:.1f}" cy="{frame.y(float(right)):.1f}" r="{radius:.1f}" '
                f'fill="var(--s0)" fill-opacity=".75"><title>{count} images: said {sure:.3f}, '
                f"right {right:.3f}</title></circle>"
            )
    return svg(title, "".join(parts))


def count_chart(counts: Sequence[int], title: str, x_label: str) -> str:
    """Return how many values fell into equal bins of (0, 1], as bars."""
    high = max(counts, default=0)
    y_ticks = ticks(0, max(high, 1), whole=True)
    frame = Frame((0, 1), (0, y_ticks[-1]))
    width_px = (frame.x(1) - frame.x(0)) / max(len(counts), 1)
    bars = "".join(
        f'<rect x="{frame.x(index / len(counts)) + 1:.1f}" y="{frame.y(count):.1f}" '
        f'width="{width_px - 2:.1f}" height="{frame.y(0) - frame.y(count):.1f}" '
        f'fill="var(--s0)"><title>{count} images</title></rect>'
        for index, count in enumerate(counts)
        if count
    )
    return svg(title, frame.grid(_FIFTHS, y_ticks, x_label) + bars)


def interval_chart(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return one line per row: a dot at its mean, and its interval or deviation around it.

    Args:
        rows: with `run`, `mean`, and where known `low` and `high`, or `values` (a dot for each).
        title: above the chart.
    """
    height_px = TOP + BOTTOM + _LINE_PX * len(rows)
    seen = [value for row in rows for value in _extent(row)]
    x_ticks = ticks(min(seen), max(seen))
    low, high = x_ticks[0], x_ticks[-1]

    def x(value: float) -> float:
        return _NAMES_PX + (value - low) / (high - low) * (WIDTH - RIGHT - 10 - _NAMES_PX)

    parts = [
        f'<path d="M{x(tick):.1f} {TOP}V{height_px - BOTTOM}" stroke="var(--line)"/>'
        f'<text x="{x(tick):.1f}" y="{height_px - BOTTOM + 16}" text-anchor="middle">{tick:.4g}'
        "</text>"
        for tick in x_ticks
    ]
    for place, row in enumerate(rows):
        y, colour = TOP + _LINE_PX * (place + 0.5), f"var(--s{place % COLOURS})"
        name = str(row["run"])
        short = name if len(name) <= 23 else "..." + name[-20:]
        parts.append(f'<text x="4" y="{y + 4:.1f}">{html.escape(short)}</text>')
        if row.get("low") is not None:
            parts.append(
                f'<path d="M{x(row["low"]):.1f} {y:.1f}H{x(row["high"]):.1f}" stroke="{colour}" '
                'stroke-width="3"/>'
            )
        parts += [
            f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3" fill="none" stroke="{colour}"/>'
            for value in (row.get("values") or {}).values()
        ]
        parts.append(
            f'<circle cx="{x(row["mean"]):.1f}" cy="{y:.1f}" r="5" fill="{colour}">'
            f"<title>{html.escape(name)}: {row['mean']:.5g}</title></circle>"
        )
    return svg(title, "".join(parts), height_px)


def _extent(row: Mapping[str, Any]) -> list[float]:
    ends = [row["mean"], row.get("low"), row.get("high"), *(row.get("values") or {}).values()]
    return [float(value) for value in ends if value is not None]
