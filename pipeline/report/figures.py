"""Line charts as SVG text, in the colours of the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.axes import COLOURS, HEIGHT, WIDTH, Frame, legend, svg, ticks

__all__ = ["curves", "line_chart"]

SPLITS = {"train": 0, "val": 1, "test": 2}  # each keeps its colour from chart to chart


def curves(
    history: Sequence[Mapping[str, Any]],
    keys: Sequence[str] | Mapping[str, str],
    title: str = "",
    mark: float | None = None,
) -> str:
    """Return a chart of values over the epochs of a `metrics_history.yaml`.

    Args:
        history: one mapping per epoch, with `epoch`.
        keys: what to draw; a dot goes one level down, as in `val.val_dice`. Epochs without the
            value, and values that are not finite, are left out. A mapping names them.
        title: above the chart.
        mark: the epoch to mark with a vertical line, such as the best.
    """
    if not isinstance(keys, Mapping):
        short = [key.split(".", 1)[0] for key in keys]
        names = short if len(set(short)) == len(keys) else list(keys)
        keys = dict(zip(names, keys, strict=True))
    series = {
        name: [(float(entry["epoch"]), _lookup(entry, key)) for entry in history]
        for name, key in keys.items()
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
        return svg(title, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>')
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    frame = Frame(x_range, (y_ticks[0], y_ticks[-1]))
    parts = [frame.grid(x_ticks, y_ticks, x_label)]
    if mark is not None:
        parts.append(frame.mark(mark))
    colours = _colours(lines)
    parts += [frame.line(points, colours[name]) for name, points in lines.items() if points]
    named = len(lines) > 1 or bool(set(lines) & set(SPLITS))
    return svg(title, "".join(parts) + (legend(colours) if named else ""))


def _colours(names: Iterable[str]) -> dict[str, int]:
    """Return a colour for each name: a split keeps its own, the others share what is left."""
    names = list(names)
    taken = {SPLITS[name] for name in names if name in SPLITS}
    free = [colour for colour in range(COLOURS) if colour not in taken]
    others = [name for name in names if name not in SPLITS]
    given = {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: SPLITS.get(name, given.get(name, 0)) for name in names}


def _lookup(entry: Mapping[str, Any], key: str) -> float | None:
    value: Any = entry
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
