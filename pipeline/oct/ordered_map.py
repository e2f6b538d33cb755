"""The most probable pair of ordered boundaries in each column, and how sure it is.

Given the logits of a column of H rows, pixels independent, a pair `0 <= y1 <= y2 <= H` (ILM, BM)
has `log p(y1, y2) = f(y1) + g(y2) + const` with `f(y) = sum of l0 - l1 over rows < y` and `g(y) =
sum of l1 - l2 over rows < y`. The softmax cancels, so raw logits are enough. Sums are kept in
float64, whatever the type of the logits; of equally probable pairs the upper one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from pipeline.hardware.compilation import compiled

__all__ = ["REACH", "Estimates", "ordered_estimates"]

Floats = NDArray[np.float64]

REACH = 3
"""Rows on either side of a boundary that its refinement looks at."""

_BLOCK = 256  # columns worked on together: wide enough for vector loops, and still in the cache
_NEGLIGIBLE = 36.0  # nats below the best pair from which on a row counts for nothing


@dataclass(frozen=True)
class Estimates:
    """What the logits say about ILM and BM, in this order along the first axis.

    Attributes:
        rows: most probable ordered pair `(2, B, W)`, whole numbers.
        refined: expected row `(2, B, W)` among those within `REACH` of `rows`; not yet ordered.
        means: posterior mean `(2, B, W)`.
        sigmas: posterior standard deviation `(2, B, W)`, in rows.
    """

    rows: Floats
    refined: Floats
    means: Floats
    sigmas: Floats


def ordered_estimates(logits: NDArray[np.floating], temperature: float = 1.0) -> Estimates:
    """Return the estimates of all columns of `logits` `(B, 3, H, W)`, float32 or float64.

    Args:
        logits: of the classes above ILM, between, below BM.
        temperature: divides the logits for `means` and `sigmas`, not for `rows` and `refined`.

    Raises:
        FloatingPointError: a sum over a column is not finite.
    """
    batch, _, _, width = logits.shape
    found = np.zeros((4, 2, batch, width))
    if not _estimate(np.ascontiguousarray(logits), 1 / temperature, *found):
        raise FloatingPointError("the logits of a column have no finite sum")
    return Estimates(*found)


@compiled
def _estimate(
    logits: NDArray[np.floating],
    sharpness: float,
    rows: Floats,
    refined: Floats,
    means: Floats,
    sigmas: Floats,
) -> bool:
    """Fill the arrays `(2, B, W)`; return whether every sum was finite."""
    batch, _, height, width = logits.shape
    f = np.zeros((height + 1, _BLOCK))
    g = np.zeros((height + 1, _BLOCK))
    counts = np.zeros((height + 1, _BLOCK), np.bool_)
    busy = np.zeros(height + 1, np.bool_)
    for image in range(batch):
        for start in range(0, width, _BLOCK):
            count = min(_BLOCK, width - start)
            pair, best = _most_probable(logits, image, start, count, f, g)
            for x in range(count):
                if not (isfinite(best[x]) and isfinite(f[height, x]) and isfinite(g[height, x])):
                    return False
            _mark_rows_that_count(
                f, g, best, _NEGLIGIBLE / min(sharpness, 1.0), count, counts, busy
            )
            ilm = _moments(g, f, True, counts, busy, pair[0], best, sharpness, count)
            bm = _moments(f, g, False, counts, busy, pair[1], best, sharpness, count)
            for boundary, sums in enumerate((ilm, bm)):
                for x in range(count):
                    row = pair[boundary, x]
                    rows[boundary, image, start + x] = row
                    mean = sums[1, x] / sums[0, x]
                    variance = sums[2, x] / sums[0, x] - mean * mean
                    refined[boundary, image, start + x] = row + sums[4, x] / sums[3, x]
                    means[boundary, image, start + x] = row + mean
                    sigmas[boundary, image, start + x] = sqrt(max(variance, 0.0))
    return True


@compiled
def _most_probable(
    logits: NDArray[np.floating], image: int, start: int, count: int, f: Floats, g: Floats
) -> tuple[NDArray[np.int64], Floats]:
    """Fill `f` and `g` `(H + 1, _BLOCK)`; return the best pairs `(2, _BLOCK)` and their scores.

    Short loops without branches: only these become vector instructions.
    """
    above, between, below = logits[image, 0], logits[image, 1], logits[image, 2]
    pair = np.zeros((2, _BLOCK), np.int64)
    best_ilm, ilm, bm = np.zeros(_BLOCK, np.int64), pair[0], pair[1]
    best_f, best = np.zeros(_BLOCK), np.zeros(_BLOCK)
    for h in range(above.shape[0]):
        for x in range(count):
            f[h + 1, x] = f[h, x] + (
                np.float64(above[h, start + x]) - np.float64(between[h, start + x])
            )
        for x in range(count):
            g[h + 1, x] = g[h, x] + (
                np.float64(between[h, start + x]) - np.float64(below[h, start + x])
            )
        for x in range(count):
            higher = f[h + 1, x] > best_f[x]
            best_ilm[x] = h + 1 if higher else best_ilm[x]
            best_f[x] = f[h + 1, x] if higher else best_f[x]
        for x in range(count):
            score = best_f[x] + g[h + 1, x]
            better = score > best[x]
            ilm[x] = best_ilm[x] if better else ilm[x]
            bm[x] = h + 1 if better else bm[x]
            best[x] = score if better else best[x]
    return pair, best


@compiled
def _mark_rows_that_count(
    f: Floats,
    g: Floats,
    best: Floats,
    margin: float,
    count: int,
    counts: NDArray[np.bool_],
    busy: NDArray[np.bool_],
) -> None:
    """Mark in `counts` `(H + 1, _BLOCK)` the rows where a pair within `margin` of `best` has one.

    All others together change a mean or a sigma by less than rounding does, and cost exponentials.
    """
    height = f.shape[0] - 1
    best_g = g[height].copy()
    best_f = f[0].copy()
    for h in range(height, -1, -1):
        for x in range(count):
            best_g[x] = max(best_g[x], g[h, x])
            counts[h, x] = f[h, x] + best_g[x] >= best[x] - margin
    for h in range(height + 1):
        some = False
        for x in range(count):
            best_f[x] = max(best_f[x], f[h, x])
            counts[h, x] |= best_f[x] + g[h, x] >= best[x] - margin
            some |= counts[h, x]
        busy[h] = some


@compiled
def _moments(
    other: Floats,
    own: Floats,
    upward: bool,
    counts: NDArray[np.bool_],
    busy: NDArray[np.bool_],
    rows: NDArray[np.int64],
    best: Floats,
    sharpness: float,
    count: int,
) -> Floats:
    """Return sums `(5, _BLOCK)` over rows, about `rows`: three of the posterior, two of the local.

    The posterior of y2 = h is `exp(g(h)) * sum of exp(f) over rows <= h`, that of y1 = h is
    `exp(f(h)) * sum of exp(g) over rows >= h`: `own` and `other` are g and f, and f and g with rows
    taken from below (`upward`). `mass` is the sum in units of its largest term, so that nothing
    overflows.
    """
    sums = np.zeros((5, _BLOCK))
    largest = np.full(_BLOCK, -np.inf)
    mass = np.zeros(_BLOCK)
    for step in range(busy.size):
        h = busy.size - 1 - step if upward else step
        for x in range(count if busy[h] else 0):
            if not counts[h, x]:
                continue
            if other[h, x] > largest[x]:
                mass[x] = mass[x] * exp((largest[x] - other[h, x]) * sharpness) + 1
                largest[x] = other[h, x]
            else:
                mass[x] += exp((other[h, x] - largest[x]) * sharpness)
            _add(sums, x, h - rows[x], largest[x] + own[h, x] - best[x], mass[x], sharpness)
    return sums


@compiled
def _add(sums: Floats, x: int, distance: int, score: float, mass: float, sharpness: float) -> None:
    """Add a row at `distance` from the most probable one whose best pair is `score` from it."""
    weight = exp(score * sharpness) * mass
    sums[0, x] += weight
    sums[1, x] += weight * distance
    sums[2, x] += weight * distance * distance
    if abs(distance) <= REACH:
        local = exp(score)
        sums[3, x] += local
        sums[4, x] += local * distance
