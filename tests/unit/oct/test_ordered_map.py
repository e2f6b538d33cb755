from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.oct.ordered_map import REACH, Estimates, ordered_estimates
from pipeline.oct.ordered_map_cuda import estimates_on_device

seeds = st.integers(0, 2**32 - 1)


def log_probabilities(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log p(y1, y2) of one column `(3, H)`, `(H + 1, H + 1)`: every pair, pixel by pixel."""
    height = column.shape[1]
    logs = column - np.logaddexp.reduce(column, axis=0)
    table = np.full((height + 1, height + 1), -np.inf)
    for y1 in range(height + 1):
        for y2 in range(y1, height + 1):
            table[y1, y2] = logs[0, :y1].sum() + logs[1, y1:y2].sum() + logs[2, y2:].sum()
    return table


def brute_force(logits: NDArray[np.float64], temperature: float = 1.0) -> Estimates:
    """Return the estimates by looking at all pairs of all columns."""
    batch, _, height, width = logits.shape
    found = np.zeros((4, 2, batch, width))
    every = np.arange(height + 1)
    for image, x in np.ndindex(batch, width):
        table = log_probabilities(logits[image, :, :, x])
        pair = np.unravel_index(table.argmax(), table.shape)
        posterior = np.exp(log_probabilities(logits[image, :, :, x] / temperature))
        posterior /= posterior.sum()
        for boundary, row in enumerate(pair):
            near = np.abs(every - row) <= REACH
            weights = np.exp(table.max(axis=1 - boundary) - table.max()) * near
            probability = posterior.sum(axis=1 - boundary)
            mean = (probability * every).sum()
            variance = (probability * (every - mean) ** 2).sum()
            refined = (weights * every).sum() / weights.sum()
            found[:, boundary, image, x] = row, refined, mean, np.sqrt(variance)
    return Estimates(*found)


def agree(first: Estimates, second: Estimates) -> None:
    for name in ("rows", "refined", "means"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-9)
    # A root magnifies the rounding of a variance near 0.
    np.testing.assert_allclose(first.sigmas, second.sigmas, rtol=1e-6, atol=1e-6)


def noise(seed: int, shape: tuple[int, ...], scale: float) -> NDArray[np.float64]:
    return scale * np.random.default_rng(seed).standard_normal(shape)


@given(seed=seeds, height=st.integers(1, 12), scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_estimates_equal_those_over_all_pairs(seed: int, height: int, scale: float) -> None:
    logits = noise(seed, (2, 3, height, 3), scale)
    agree(ordered_estimates(logits), brute_force(logits))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@given(seed=seeds)
def test_the_temperature_divides_the_logits_of_the_posterior(temperature: float, seed: int) -> None:
    logits = noise(seed, (1, 3, 9, 3), 3.0)
    agree(ordered_estimates(logits, temperature), brute_force(logits, temperature))


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_every_column_of_any_width_is_worked_on(width: int) -> None:
    logits = noise(width, (2, 3, 7, width), 2.0)
    agree(ordered_estimates(logits), brute_force(logits))


@given(seed=seeds, scale=st.sampled_from([0.1, 2.0, 30.0]))
def test_single_precision_logits_are_summed_in_double_precision(seed: int, scale: float) -> None:
    logits = noise(seed, (2, 3, 30, 5), scale).astype(np.float32)
    twice = ordered_estimates(logits.astype(np.float64))
    np.testing.assert_array_equal(astuple(ordered_estimates(logits)), astuple(twice))


@given(seed=seeds)
def test_what_is_added_to_all_classes_of_a_pixel_changes_nothing(seed: int) -> None:
    logits = noise(seed, (1, 3, 20, 4), 2.0)
    shifted = logits + np.round(noise(seed + 1, (1, 1, 20, 4), 50.0))
    agree(ordered_estimates(shifted), ordered_estimates(logits))


@given(seed=seeds)
def test_turning_an_image_over_turns_its_boundaries_over(seed: int) -> None:
    logits = noise(seed, (1, 3, 20, 4), 2.0)
    over, straight = ordered_estimates(logits[:, ::-1, ::-1]), ordered_estimates(logits)
    turned = (20 - straight.rows[::-1], 20 - straight.refined[::-1], 20 - straight.means[::-1])
    agree(over, Estimates(*turned, straight.sigmas[::-1]))


def test_of_equally_probable_pairs_the_upper_one_is_taken() -> None:
    estimates = ordered_estimates(np.zeros((1, 3, 8, 1)))
    assert estimates.rows.ravel().tolist() == [0, 0]
    # All 45 pairs alike: the mean of the smaller of two is a third of the way down.
    assert estimates.means.ravel().tolist() == pytest.approx([8 / 3, 16 / 3])


def test_far_islands_count_in_the_sigma() -> None:
    logits = np.full((1, 3, 400, 1), -3.0)
    logits[0, 0, :100] = logits[0, 1, 100:300] = logits[0, 2, 300:] = 3.0
    alone = ordered_estimates(logits).sigmas[0].item()
    logits[0, :, 100:150] = logits[0, [1, 1, 1], 0][:, None]  # rows that could be any class
    assert alone < 0.1
    assert ordered_estimates(logits).sigmas[0].item() == pytest.approx(50 / np.sqrt(12), rel=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sum_that_is_not_finite_stops(value: float) -> None:
    logits = np.zeros((1, 3, 8, 3))
    logits[0, 2, 4, 1] = value
    with pytest.raises(FloatingPointError):
        ordered_estimates(logits)
    with pytest.raises(FloatingPointError):
        estimates_on_device(torch.from_numpy(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds, scale=st.sampled_from([0.1, 2.0, 30.0]), temperature=st.sampled_from([1.0, 2.5]))
def test_torch_gives_the_same(
    dtype: torch.dtype, seed: int, scale: float, temperature: float
) -> None:
    logits = torch.from_numpy(noise(seed, (9, 3, 14, 3), scale)).to(dtype)
    by_torch = estimates_on_device(logits, temperature)
    agree(by_torch, ordered_estimates(logits.numpy(), temperature))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_torch_breaks_ties_alike(number: int) -> None:
    logits = torch.zeros((1, 3, 9, 2))
    logits[:, number, :, 1] = 4
    agree(estimates_on_device(logits), ordered_estimates(logits.numpy()))


def test_torch_takes_an_empty_batch() -> None:
    assert estimates_on_device(torch.zeros((0, 3, 9, 5))).rows.shape == (2, 0, 5)
