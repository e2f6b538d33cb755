"""Line charts as SVG text, in the colours of the page that shows them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["curves", "line_chart"]

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 30, 34
COLOURS = 6
SPLITS = {"train": 0, "val": 1, "test": 2}  # each keeps its colour from chart to chart

Point = tuple[float, float]


def curves(
    history: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    title: str = "",
    mark: float | None = None,
) -> str:
    """Return a chart of values over the epochs of a `metrics_history.yaml`.

    Args:
        history: one mapping per epoch, with `epoch`.
        keys: what to draw; a dot goes one level down, as in `val.val_dice`. Epochs without the
            value, and values that are not finite, are left out.
        title: above the chart.
        mark: the epoch to mark with a vertical line, such as the best.
    """
    short = [key.split(".", 1)[0] for key in keys]
    names = short if len(set(short)) == len(keys) else list(keys)
    series = {
        name: [(float(entry["epoch"]), _lookup(entry, key)) for entry in history]
        for name, key in zip(names, keys, strict=True)
    }
    return line_chart(series, title=title, x_label="epoch", mark=mark)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    title: str = "",
    x_label: str = "",
    mark: float | None = None,
) -> str:
    """Return an SVG line chart with axes and a legend; without a value it says so."""
    lines = {
        name: [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        for name, points in series.items()
    }
    if not any(lines.values()):
        return _svg(title, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>')
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), whole=True), _ticks(min(ys), max(ys))
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    frame = _Frame(x_range, (y_ticks[0], y_ticks[-1]))
    parts = [frame.grid(x_ticks, y_ticks, x_label)]
    if mark is not None:
        parts.append(frame.mark(mark))
    colours = {name: SPLITS.get(name, index % COLOURS) for index, name in enumerate(lines)}
    parts += [frame.line(points, colours[name]) for name, points in lines.items() if points]
    named = len(lines) > 1 or set(lines) & set(SPLITS)
    return _svg(title, "".join(parts) + (_legend(colours) if named else ""))


class _Frame:
    """Data coordinates to drawing coordinates."""

    def __init__(self, x_range: Point, y_range: Point) -> None:
        self.x_range = x_range
        self.y_range = y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
        parts = [
            f'<path d="M{LEFT} {self.y(t):.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{t:.4g}</text>'
            for t in y_ticks
        ]
        below, right = HEIGHT - BOTTOM + 16, WIDTH - RIGHT
        parts += [
            f'<text x="{self.x(t):.1f}" y="{below}" text-anchor="middle">{t:g}</text>'
            for t in x_ticks
            if self.x_range[0] <= t <= self.x_range[1]
        ]
        parts.append(
            f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(x_label)}</text>'
        )
        return "".join(parts)

    def mark(self, value: float) -> str:
        return (
            f'<path d="M{self.x(value):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="var(--soft)" '
            f'stroke-dasharray="3 3"><title>best: {value:g}</title></path>'
        )

    def line(self, points: Sequence[Point], colour: int) -> str:
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        radius = 3 if len(points) < 40 else 1.5
        dot = "".join(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}" '
            f'fill="var(--s{colour})"><title>{x:g}: {y:.5g}</title></circle>'
            for x, y in points
        )
        return f'<path d="M{path}" fill="none" stroke="var(--s{colour})" stroke-width="2"/>{dot}'


def _svg(title: str, content: str) -> str:
    name = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" '
        'font-family="system-ui,sans-serif" font-size="12" fill="currentColor">'
        f'<text x="{LEFT}" y="16" font-size="14" font-weight="600">{name}</text>{content}</svg>'
    )


def _legend(colours: Mapping[str, int]) -> str:
    """Return the names, right-aligned on the title's line."""
    parts, right = [], WIDTH - RIGHT
    for name, index in reversed(list(colours.items())):
        colour = f"var(--s{index})"
        parts.append(
            f'<text x="{right}" y="16" text-anchor="end" fill="{colour}">{html.escape(name)}</text>'
        )
        right -= 7 * len(name) + 12
    return "".join(parts)


def _lookup(entry: Mapping[str, Any], key: str) -> float | None:
    value: Any = entry
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return about five round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    step = max(1.0, float(round(step))) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]
