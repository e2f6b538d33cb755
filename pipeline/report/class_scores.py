"""How sure a classifier's scores over all images are: bootstrap intervals from what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.intervals import CONFIDENCE, RESAMPLES

__all__ = ["SCORES", "Said", "said_of", "score_difference", "score_interval"]

Said = Mapping[str, tuple[str, str]]
"""Truth and prediction of each image."""

_CELLS_AT_ONCE = 4_000_000  # bounds the memory to some 100 MB
_CELLS_IN_ALL = 10_000_000  # and the time to some 3 s, with fewer resamples of very many answers
_LEAST_RESAMPLES = 500

_Score = Callable[[NDArray[np.float64], Sequence[tuple[str, str]]], NDArray[np.float64]]


def _counts(
    drawn: NDArray[np.float64], cells: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return right, true and predicted images of each class that has a truth, each `(R, K)`."""
    classes = sorted({truth for truth, _ in cells})
    truth = np.array([[name == one for one, _ in cells] for name in classes], float)
    said = np.array([[name == one for _, one in cells] for name in classes], float)
    return drawn @ (truth * said).T, drawn @ truth.T, drawn @ said.T


def _balanced_accuracy(
    drawn: NDArray[np.float64], cells: Sequence[tuple[str, str]]
) -> NDArray[np.float64]:
    right, true, _ = _counts(drawn, cells)
    return _mean_known(right, true, true)


def _macro_f1(drawn: NDArray[np.float64], cells: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    right, true, said = _counts(drawn, cells)
    return _mean_known(2 * right, true + said, true)


def _mean_known(
    above: NDArray[np.float64], below: NDArray[np.float64], true: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean quotient over the classes that a resample has images of `(R,)`."""
    known = true > 0
    quotient = np.divide(above, below, out=np.zeros_like(above), where=known)
    mean: NDArray[np.float64] = quotient.sum(axis=1) / known.sum(axis=1)
    return mean


SCORES: Mapping[str, _Score] = {"balanced_accuracy": _balanced_accuracy, "macro_f1": _macro_f1}


def said_of(rows: Sequence[Mapping[str, Any]]) -> Said:
    """Return truth and prediction per image of an evaluation, none where a row lacks them."""
    if not all({"image", "truth", "predicted"} <= row.keys() for row in rows):
        return {}
    return {str(row["image"]): (str(row["truth"]), str(row["predicted"])) for row in rows}


def score_interval(score: str, said: Said, *, seed: int = 0) -> tuple[float, float] | None:
    """Return the interval of a score under resampling of the images, None below two of them.

    Args:
        score: one of `SCORES`; classes without an image are left out of it.
        said: truth and prediction per image.
        seed: of the draws.
    """
    compute, cells = SCORES[score], sorted(said.values())
    return _interval([(compute, cells)], seed)


def score_difference(
    score: str, said: Said, first: Said, *, seed: int = 0
) -> tuple[float, float, float] | None:
    """Return what remains when the `first` one's score is subtracted, and its interval.

    The same images are drawn for both, so that what is hard for both cancels.

    Args:
        score: one of `SCORES`.
        said: truth and prediction per image.
        first: those of the other run.
        seed: of the draws.

    Returns:
        Difference, low and high; None where the images or their truth are not the same, or where
        there are fewer than two.
    """
    names = sorted(said)
    if names != sorted(first) or any(said[name][0] != first[name][0] for name in names):
        return None
    compute = SCORES[score]
    mine, other = ([one[name] for name in names] for one in (said, first))
    ends = _interval([(compute, mine), (compute, other)], seed)
    whole = np.ones((1, len(names)))
    return ends and (float((compute(whole, mine) - compute(whole, other))[0]), *ends)


def _interval(
    terms: Sequence[tuple[_Score, Sequence[tuple[str, str]]]], seed: int
) -> tuple[float, float] | None:
    """Return the interval of the first term, less the second where there is one.

    Images of which the same was said are one cell of a multinomial draw, so that the work grows
    with the kinds of answers and not with the images.
    """
    kinds = Counter(zip(*(cells for _, cells in terms), strict=True))
    total = kinds.total()
    if total < 2:
        return None
    shares = np.array([count / total for count in kinds.values()])
    resamples = min(RESAMPLES, max(_LEAST_RESAMPLES, _CELLS_IN_ALL // len(shares)))
    generator, values = np.random.default_rng(seed), list[NDArray[np.float64]]()
    step = max(1, _CELLS_AT_ONCE // len(shares))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.multinomial(total, shares, size=count).astype(float)
        scores = [
            compute(drawn, [kind[place] for kind in kinds])
            for place, (compute, _) in enumerate(terms)
        ]
        values.append(scores[0] - scores[1] if len(scores) > 1 else scores[0])
    low, high = np.quantile(np.concatenate(values), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
