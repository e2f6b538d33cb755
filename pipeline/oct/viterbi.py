"""The best pair of boundaries that move by a few rows at most from column to column.

Each column votes for its rows by how well its best ordered pair with that row does; a vote cannot
fall below `-cap`, so that one column alone bends no boundary. ILM is found first, then BM among the
rows at or below it.
"""

from __future__ import annotations

from math import exp

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled
from pipeline.oct.ordered_map import REACH

__all__ = ["bounded_paths"]

Floats = NDArray[np.float64]


def bounded_paths(
    logits: NDArray[np.floating], max_step: int = 3, step_penalty: float = 1.0, cap: float = 30.0
) -> tuple[Floats, Floats]:
    """Return the best paths through `logits` `(B, 3, H, W)`, float32 or float64, finite.

    Args:
        logits: of the classes above ILM, between, below BM.
        max_step: rows that a boundary may move between neighbouring columns; 3 or 4 follow the
            fovea.
        step_penalty: nats that a step of one row costs; one of `n` rows costs `n**2` as much.
        cap: nats below a column's best row at which all rows are equally bad.

    Returns:
        Rows `(2, B, W)` of ILM and BM, whole numbers, and the expected rows `(2, B, W)` near them.
    """
    batch, _, _, width = logits.shape
    rows, refined = np.zeros((2, 2, batch, width))
    _follow(np.ascontiguousarray(logits), max_step, step_penalty, cap, rows, refined)
    return rows, refined


@compiled
def _follow(
    logits: NDArray[np.floating],
    max_step: int,
    step_penalty: float,
    cap: float,
    rows: Floats,
    refined: Floats,
) -> None:
    batch, _, _, width = logits.shape
    for image in range(batch):
        votes = _votes(logits, image)
        top = np.zeros(width, np.int64)
        for boundary in range(2):
            path = _best_path(votes[boundary], top, max_step, step_penalty, cap)
            for x in range(width):
                rows[boundary, image, x] = path[x]
                refined[boundary, image, x] = _expected_row(votes[boundary, x], path[x])
            top = path


@compiled
def _votes(logits: NDArray[np.floating], image: int) -> Floats:
    """Return by how much the best pair with each row falls short of the best pair.

    `(2, W, H + 1)`, at most 0: of ILM and of BM.
    """
    height, width = logits.shape[2:]
    votes = np.zeros((2, width, height + 1))
    f, g = np.zeros(height + 1), np.zeros(height + 1)
    for x in range(width):
        for h in range(height):
            middle = np.float64(logits[image, 1, h, x])
            f[h + 1] = f[h] + (np.float64(logits[image, 0, h, x]) - middle)
            g[h + 1] = g[h] + (middle - np.float64(logits[image, 2, h, x]))
        best_f, best_g, best = f[0], g[height], f[0] + g[0]
        for h in range(height + 1):
            best_f = max(best_f, f[h])
            votes[1, x, h] = best_f + g[h]
            best = max(best, votes[1, x, h])
        for h in range(height, -1, -1):
            best_g = max(best_g, g[h])
            votes[0, x, h] = f[h] + best_g
        for h in range(height + 1):
            votes[0, x, h] -= best
            votes[1, x, h] -= best
    return votes


@compiled
def _best_path(
    votes: Floats, top: NDArray[np.int64], max_step: int, step_penalty: float, cap: float
) -> NDArray[np.int64]:
    """Return the row of each column `(W,)`, none above `top`, which is itself such a path."""
    width, states = votes.shape
    came_from = np.zeros((width, states), np.int64)
    before, total = np.zeros(states), np.zeros(states)  # the first column comes from nowhere
    for x in range(width):
        reach = max_step if x > 0 else 0
        for h in range(states):
            if h < top[x]:
                total[h] = -np.inf
                continue
            best, source = before[h], h  # of equally good ways the straight one
            for other in range(max(0, h - reach), min(states, h + reach + 1)):
                score = before[other] - step_penalty * (other - h) ** 2
                if score > best:
                    best, source = score, other
            total[h] = best + max(votes[x, h], -cap)
            came_from[x, h] = source
        before, total = total, before
    path = np.zeros(width, np.int64)
    for h in range(states):
        if before[h] > before[path[width - 1]]:
            path[width - 1] = h
    for x in range(width - 1, 0, -1):
        path[x - 1] = came_from[x, path[x]]
    return path


@compiled
def _expected_row(votes: Floats, row: int) -> float:
    """Return the expected row among those within `REACH` of `row`."""
    first, end = max(0, row - REACH), min(votes.size, row + REACH + 1)
    best = votes[row]
    for h in range(first, end):
        best = max(best, votes[h])
    mass, moment = 0.0, 0.0
    for h in range(first, end):
        weight = exp(votes[h] - best)
        mass += weight
        moment += weight * (h - row)
    return row + moment / mass
