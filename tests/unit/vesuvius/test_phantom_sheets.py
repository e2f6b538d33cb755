from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipeline.vesuvius.phantom_difficulty import DIFFICULTIES, difficulty_named
from pipeline.vesuvius.phantom_sheets import (
    Chart,
    Windings,
    coil,
    place,
    smooth_noise,
    spiral_chart,
    truth,
)

SIZE = (48, 64, 64)


def charts(closed: bool) -> list[Chart]:
    drawn = (spiral_chart(np.random.Generator(np.random.PCG64(s)), SIZE) for s in range(30))
    return [chart for chart in drawn if chart.closed == closed][:3]


def flat(heights: list[float], spacing: float = 1.0) -> tuple[Chart, Windings]:
    """Level windings in a box whose height is y."""
    z, y, x = (np.asarray(i, np.float32) for i in np.indices((8, 40, 20)))
    chart = Chart(y * spacing, x, z, np.ones(z.shape, bool), (20, 8))
    level = np.broadcast_to(np.float32(heights)[:, None, None], (len(heights), 21, 8)).copy()
    return chart, Windings(level, np.ones_like(level), np.full_like(level, 40))


def test_level_windings_take_two_planes_each() -> None:
    chart, windings = flat([10.0, 17.0, 30.0])
    mask = truth(chart, windings, place(chart, windings))
    np.testing.assert_array_equal(np.flatnonzero(mask.any(axis=(0, 2))), [10, 11, 17, 18, 30, 31])
    assert mask[:, [10, 31]].all()


@pytest.mark.parametrize("gap", [0.3, 1.0, 2.0, 3.0, 3.6])
def test_windings_that_touch_are_kept_apart_by_a_voxel(gap: float) -> None:
    for start in np.arange(10, 11, 0.125):
        chart, windings = flat([float(start), float(start) + gap])
        turn = place(chart, windings)
        mask = truth(chart, windings, turn)
        assert mask[turn == 1].any()
        assert_windings_apart(chart, turn, mask)


def assert_windings_apart(chart: Chart, turn: np.ndarray, mask: np.ndarray) -> None:
    """No 26-neighbours in the truth lie a turn apart."""
    columns = chart.shape_px[0]
    on_sheet = np.where(mask, chart.along + columns * turn, np.nan)
    for dz, dy, dx in np.ndindex(3, 3, 3):
        one = on_sheet[dz : dz - 2 or None, dy : dy - 2 or None, dx : dx - 2 or None]
        step = np.abs(one - on_sheet[1:-1, 1:-1, 1:-1])
        assert not (step > columns / 2).any()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_no_two_windings_touch(difficulty: str, closed: bool) -> None:
    for seed, chart in enumerate(charts(closed)):
        rng = np.random.Generator(np.random.PCG64(seed))
        windings = coil(rng, chart, DIFFICULTIES[difficulty])
        turn = place(chart, windings)
        assert_windings_apart(chart, turn, truth(chart, windings, turn))


@pytest.mark.parametrize("closed", [False, True])
def test_windings_never_come_closer_than_the_least_spacing(closed: bool) -> None:
    hard = difficulty_named("hard")
    for seed, chart in enumerate(charts(closed)):
        windings = coil(np.random.Generator(np.random.PCG64(seed)), chart, hard)
        gaps = np.diff(windings.height, axis=0)
        assert gaps.min() >= hard.least_spacing_vx - 1e-3
        if not closed:  # and there they are pressed together somewhere
            assert gaps.min() < hard.least_spacing_vx + 3


def test_turns_of_a_spiral_continue_into_each_other() -> None:
    for chart in charts(closed=True):
        rng = np.random.Generator(np.random.PCG64(1))
        windings = coil(rng, chart, difficulty_named("medium"))
        step = np.abs(windings.height[1:, 0] - windings.height[:-1, -1])
        assert np.percentile(step, 95) < 1
        np.testing.assert_array_equal(windings.edge[1:, 0], windings.edge[:-1, -1])


def test_holes_go_through_the_truth_and_have_ragged_edges() -> None:
    chart, windings = flat([10.0])
    columns, rows = np.ogrid[:21, :8]
    windings.edge[0] = np.hypot(columns - 10, rows - 4) - 3
    mask = truth(chart, windings, place(chart, windings))
    hole = ~mask[:, 10:12].any(axis=1)
    z, x = np.ogrid[:8, :20]
    np.testing.assert_array_equal(hole, np.hypot(x - 10, z - 4) <= 3)


def test_windings_come_closer_from_easy_to_hard() -> None:
    chart = charts(closed=False)[0]
    near = []
    for difficulty in DIFFICULTIES.values():
        seeds = (np.random.Generator(np.random.PCG64(seed)) for seed in range(4))
        gaps = [np.diff(coil(rng, chart, difficulty).height, axis=0) for rng in seeds]
        near.append(np.mean([np.percentile(gap, 10) for gap in gaps]))
    assert near[0] > near[1] + 4 > near[2] + 6
    assert near[2] < 10


def test_tears_rise_with_the_difficulty() -> None:
    chart = charts(closed=False)[0]
    torn = []
    for difficulty in DIFFICULTIES.values():
        seeds = (np.random.Generator(np.random.PCG64(seed)) for seed in range(4))
        edges = [coil(rng, chart, difficulty).edge for rng in seeds]
        torn.append(np.mean([(edge <= 0).mean() for edge in edges]))
    assert 0 < torn[0] < torn[1] < torn[2] < 0.2


def test_sampling_is_linear_interpolation() -> None:
    rng = np.random.default_rng(0)
    shape = (5, 6, 7)
    along, across = (rng.uniform(0, top, shape).astype(np.float32) for top in (8, 4))
    maps = rng.standard_normal((3, 9, 5)).astype(np.float32)
    chart = Chart(np.zeros(shape, np.float32), along, across, np.ones(shape, bool), (8, 5))
    turn = rng.integers(0, 3, shape)
    expected = ndimage.map_coordinates(maps, [turn, along, across], order=1)
    np.testing.assert_allclose(chart.sample(maps, turn), expected, atol=1e-5)


def test_smooth_noise_is_standard_and_periodic() -> None:
    noise = smooth_noise(np.random.default_rng(0), (64, 48), 4)
    assert noise.mean() == pytest.approx(0, abs=1e-12)
    assert noise.std() == pytest.approx(1)
    assert np.abs(noise[0] - noise[-1]).max() < 3 * np.abs(np.diff(noise, axis=0)).max()
