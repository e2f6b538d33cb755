from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.oct.ordered_map import ordered_estimates
from pipeline.oct.viterbi import bounded_paths

seeds = st.integers(0, 2**32 - 1)


def votes(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how the best pair with each row does, `(2, H + 1, W)`, by looking at all pairs."""
    above, between, below = logits
    height = above.shape[0]
    f, g = np.zeros((2, height + 1, above.shape[1]))
    f[1:], g[1:] = np.cumsum(above - between, axis=0), np.cumsum(between - below, axis=0)
    ilm = [
        np.max([f[y] + g[below] for below in range(y, height + 1)], axis=0)
        for y in range(height + 1)
    ]
    bm = [np.max([f[above] + g[y] for above in range(y + 1)], axis=0) for y in range(height + 1)]
    return np.array([ilm, bm]) - np.max(ilm, axis=0)


def score(vote: NDArray[np.float64], path: NDArray[np.int64], penalty: float, cap: float) -> float:
    said = np.maximum(vote, -cap)[path, np.arange(path.size)].sum()
    return float(said - penalty * (np.diff(path) ** 2).sum())


@given(
    seed=seeds,
    max_step=st.integers(0, 3),
    penalty=st.sampled_from([0.0, 0.5, 2.0]),
    cap=st.sampled_from([2.0, 30.0]),
)
def test_no_path_scores_higher(seed: int, max_step: int, penalty: float, cap: float) -> None:
    logits = 3 * np.random.default_rng(seed).standard_normal((1, 3, 4, 4))
    rows, _ = bounded_paths(logits, max_step, penalty, cap)
    found = rows[:, 0].astype(np.int64)
    paths = np.array(list(product(range(5), repeat=4)))
    paths = paths[np.abs(np.diff(paths, axis=1)).max(axis=1) <= max_step]
    for boundary, vote in enumerate(votes(logits[0])):
        allowed = paths if boundary == 0 else paths[(paths >= found[0]).all(axis=1)]
        best = max(score(vote, path, penalty, cap) for path in allowed)
        assert score(vote, found[boundary], penalty, cap) == pytest.approx(best, abs=1e-9)
        assert (found[boundary] == allowed).all(axis=1).any()


@given(seed=seeds)
def test_paths_are_ordered_and_bounded(seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal((2, 3, 12, 20))
    (ilm, bm), _ = bounded_paths(logits, max_step=2)
    assert (ilm <= bm).all()
    assert np.abs(np.diff([ilm, bm], axis=-1)).max() <= 2


@given(seed=seeds)
def test_without_a_bound_or_a_price_ilm_is_that_of_the_map(seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal((1, 3, 12, 20))
    rows, refined = bounded_paths(logits, max_step=12, step_penalty=0, cap=1e6)
    expected = ordered_estimates(logits)
    np.testing.assert_array_equal(rows, expected.rows)
    np.testing.assert_allclose(refined, expected.refined, atol=1e-9)


@given(seed=seeds)
def test_a_mirrored_image_has_mirrored_paths(seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal((1, 3, 12, 20))
    rows, _ = bounded_paths(logits, step_penalty=0.7)
    mirrored, _ = bounded_paths(logits[..., ::-1], step_penalty=0.7)
    np.testing.assert_array_equal(mirrored[0, ..., ::-1], rows[0])


@pytest.mark.parametrize(("max_step", "follows"), [(1, False), (3, True), (4, True)])
def test_the_slope_of_a_fovea_needs_steps_of_three_rows(max_step: int, follows: bool) -> None:
    ilm = np.concatenate([np.arange(20, 50, 3), np.arange(50, 20, -3)])
    height = np.arange(80)[:, None]
    classes = (height >= ilm).astype(int) + (height >= 65)
    logits = 20.0 * (classes == np.arange(3)[:, None, None])[None]
    rows, _ = bounded_paths(logits, max_step, step_penalty=0.5)
    assert bool((rows[0, 0] == ilm).all()) == follows
