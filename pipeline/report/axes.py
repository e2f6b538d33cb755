"""Axes, legend and frame of a drawing as SVG text."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

__all__ = [
    "BOTTOM", "COLOURS", "HEIGHT", "LEFT", "RIGHT", "TOP", "WIDTH", "Frame", "Point", "legend",
    "svg", "ticks",
]  # fmt: skip

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 30, 34
COLOURS = 6

Point = tuple[float, float]


class Frame:
    """From data coordinates to drawing coordinates.

    Args:
        x_range: the values at the left and the right end.
        y_range: the values at the bottom and the top.
    """

    def __init__(self, x_range: Point, y_range: Point) -> None:
        self.x_range = x_range
        self.y_range = y_range

    def x(self, value: float) -> float:
        """Return how far from the left a value is drawn."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return how far from the top a value is drawn."""
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
        """Return lines and numbers of the axes."""
        parts = [
            f'<path d="M{LEFT} {self.y(t):.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{t:.6g}</text>'
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
        """Return a dashed vertical line."""
        return (
            f'<path d="M{self.x(value):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="var(--soft)" '
            f'stroke-dasharray="3 3"><title>best: {value:g}</title></path>'
        )

    def line(self, points: Sequence[Point], colour: int) -> str:
        """Return points that a line joins."""
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        radius = 3 if len(points) < 40 else 1.5
        dot = "".join(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}" '
            f'fill="var(--s{colour})"><title>{x:g}: {y:.5g}</title></circle>'
            for x, y in points
        )
        return f'<path d="M{path}" fill="none" stroke="var(--s{colour})" stroke-width="2"/>{dot}'


def svg(title: str, content: str, height_px: int = HEIGHT) -> str:
    """Return a drawing with its title, in the colours of the page that shows it."""
    name = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height_px}" role="img" aria-label="{name}" '
        'font-family="system-ui,sans-serif" font-size="13" fill="currentColor">'
        f'<text x="{LEFT}" y="16" font-size="14" font-weight="600">{name}</text>{content}</svg>'
    )


def legend(colours: Mapping[str, int]) -> str:
    """Return the names, right-aligned on the title's line."""
    parts, right = [], WIDTH - RIGHT
    for name, index in reversed(list(colours.items())):
        colour = f"var(--s{index})"
        parts.append(
            f'<text x="{right}" y="16" text-anchor="end" fill="{colour}">{html.escape(name)}</text>'
        )
        right -= 7 * len(name) + 12
    return "".join(parts)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return about five round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    step = max(1.0, float(round(step))) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]
