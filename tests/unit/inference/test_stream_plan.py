from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigurationError
from pipeline.inference.stream_plan import StreamPlan, growth_table, plan_stream
from pipeline.inference.windows import Grid, make_grid

sizes = st.tuples(st.integers(3, 40), st.integers(3, 30), st.integers(3, 30))
rois = st.tuples(st.integers(2, 16), st.integers(2, 16), st.integers(2, 16))


def grid_of(shape: Sequence[int], roi: Sequence[int], overlap: Any = 0.5) -> Grid:
    """Return windows over a volume that is padded where it is smaller than one."""
    return make_grid([max(n, r) for n, r in zip(shape, roi, strict=True)], roi, overlap)


@st.composite
def plans(draw: Any) -> StreamPlan:
    shape, roi = draw(sizes), draw(rois)
    unit = tuple(draw(st.integers(1, 12)) for _ in range(3))
    units = [math.ceil(n / u) for n, u in zip(shape, unit, strict=True)]
    slabs, *tiles = (draw(st.integers(1, min(4, most))) for most in units)
    grid = grid_of(shape, roi, draw(st.sampled_from([0.0, 0.25, 0.5, 0.7])))
    return plan_stream(shape, grid, unit, blocks=slabs * math.prod(tiles), tiles=tiles)


@given(plans())
def test_blocks_are_the_volume_once_each_on_whole_chunks(plan: StreamPlan) -> None:
    voxels = [
        voxel
        for block in plan.blocks
        for voxel in itertools.product(*map(range, block.low, block.high))
    ]
    assert len(voxels) == len(set(voxels)) == math.prod(plan.shape)
    for block in plan.blocks:
        assert all(a % u == 0 for a, u in zip(block.low, plan.unit, strict=True))
    assert len(plan.blocks) == plan.count


@given(plans())
def test_counted_windows_are_those_that_touch_the_blocks(plan: StreamPlan) -> None:
    found = 0
    for block in plan.blocks:
        for starts in itertools.product(*plan.grid.starts):
            found += all(
                s < b + pad and s + r > a + pad
                for s, r, a, b, pad in zip(
                    starts, plan.grid.roi, block.low, block.high, plan.padding, strict=True
                )
            )
    assert plan.windows == found == sum(plan.windows_of(block).count for block in plan.blocks)


def test_one_block_runs_every_window_once() -> None:
    plan = plan_stream((100, 40, 40), grid_of((100, 40, 40), (16, 16, 16)), (8, 16, 16))
    assert plan.windows == plan.grid.count


def test_a_bound_on_a_window_start_repeats_one_row_at_half_overlap() -> None:
    grid = grid_of((96, 16, 16), (16, 16, 16))
    at_start, between = (
        plan_stream((96, 16, 16), grid, (4, 16, 16), bounds=[0, bound, 96]) for bound in (48, 52)
    )
    assert at_start.windows == grid.count + 1
    assert between.windows == grid.count + 2


@pytest.mark.parametrize("bound", [1, 20, 63])
def test_bounds_inside_a_chunk_or_shard_are_refused(bound: int) -> None:
    grid = grid_of((96, 16, 16), (16, 16, 16))
    with pytest.raises(
        ConfigurationError, match=rf"begin at \[{bound}\] along axis 0, inside a ch"
    ):
        plan_stream((96, 16, 16), grid, (32, 16, 16), bounds=[0, bound, 96])


@pytest.mark.parametrize("bounds", [[], [0], [0, 64], [32, 96], [0, 64, 32, 96], [0, 32, 32, 96]])
def test_bounds_that_are_not_the_axis_are_refused(bounds: list[int]) -> None:
    grid = grid_of((96, 16, 16), (16, 16, 16))
    with pytest.raises(ConfigurationError, match="must ascend from 0 to 96"):
        plan_stream((96, 16, 16), grid, (32, 16, 16), bounds=bounds)


def test_more_blocks_than_chunks_are_refused() -> None:
    grid = grid_of((96, 16, 16), (16, 16, 16))
    with pytest.raises(ConfigurationError, match=r"3 chunks .* cannot be cut into 4 parts"):
        plan_stream((96, 16, 16), grid, (32, 16, 16), blocks=4)
    with pytest.raises(ConfigurationError, match=r"axis 2 has 16 voxels in 1 chunks"):
        plan_stream((96, 16, 16), grid, (32, 16, 16), tiles=(1, 2))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"blocks": 0}, "positive multiple"),
        ({"blocks": 3, "tiles": (2, 1)}, "multiple of the 2 tiles"),
        ({"blocks": 3, "bounds": [0, 32, 96]}, "blocks is 3, the bounds and tiles make 2"),
        ({"tiles": (0, 1)}, "tiles"),
        ({"unit": (32, 0, 16)}, "chunks or shards"),
        ({"unit": (32, 16)}, "chunks or shards"),
    ],
)
def test_a_cut_without_a_meaning_is_refused(settings: dict[str, Any], reason: str) -> None:
    grid = grid_of((96, 32, 32), (16, 16, 16))
    with pytest.raises(ConfigurationError, match=reason):
        plan_stream((96, 32, 32), grid, **{"unit": (32, 16, 16), **settings})


def test_a_scroll_of_ten_to_the_thirteen_voxels_is_planned_at_once() -> None:
    shape = (26_000, 20_000, 20_000)
    started = time.process_time()
    grid = grid_of(shape, (128, 128, 128), 0.25)
    plan = plan_stream(
        shape, grid, (96, 128, 128), blocks=100 * 64, tiles=(8, 8), out_bytes=1, gaussian=True
    )
    text = plan.table(seconds_per_window=0.5)
    assert time.process_time() - started < 1
    assert plan.result_bytes == math.prod(shape) > 1e13
    assert plan.grid.count < plan.windows < 1.5 * plan.grid.count
    assert plan.memory_bytes < 32e9
    assert "6,400 of up to" in text
    assert "time on all blocks at once" in text


def test_memory_does_not_grow_with_depth_and_grows_with_the_plane() -> None:
    plan = plan_stream((96, 64, 64), grid_of((96, 64, 64), (16, 16, 16)), (8, 64, 64))
    deeper, larger, scroll = plan.growth(lambda shape: grid_of(shape, (16, 16, 16)))
    assert deeper.memory_bytes == plan.memory_bytes
    assert deeper.result_bytes == 2 * plan.result_bytes
    assert larger.memory_bytes > 3 * plan.memory_bytes
    assert scroll.result_bytes > 4e13


def test_tiles_make_a_worker_smaller() -> None:
    grid = grid_of((96, 256, 256), (16, 16, 16))
    whole, tiled = (
        plan_stream((96, 256, 256), grid, (8, 64, 64), tiles=tiles) for tiles in ((1, 1), (4, 4))
    )
    assert tiled.memory_bytes < whole.memory_bytes / 8


def test_the_sum_of_gaussian_weights_takes_as_much_as_one_channel() -> None:
    grid = grid_of((96, 64, 64), (16, 16, 16))
    separable, gaussian, channels = (
        plan_stream((96, 64, 64), grid, (8, 64, 64), **settings).memory_bytes
        for settings in ({}, {"gaussian": True}, {"channels_summed": 2})
    )
    assert separable < gaussian < channels


def test_the_table_says_what_a_run_takes() -> None:
    grid = grid_of((200, 128, 128), (64, 64, 64))
    plan = plan_stream((200, 128, 128), grid, (32, 128, 128), blocks=2, in_bytes=2)
    lines = plan.table().splitlines()
    assert lines[0] == "volume                      200 x 128 x 128 = 3.28e+06 voxels"
    assert lines[1] == "window                      64 x 64 x 64, 54 in the volume"
    assert lines[2].endswith("2 of up to 104 x 128 x 128, written in units of 32 x 128 x 128")
    assert lines[3].startswith("windows to run              63, 1.17 times")
    assert lines[5] == "result                      12.5 MiB before compression"


def test_the_growth_table_ends_with_a_scroll() -> None:
    plan = plan_stream((96, 64, 64), grid_of((96, 64, 64), (16, 16, 16)), (8, 64, 64))
    text = growth_table(plan.growth(lambda shape: grid_of(shape, (16, 16, 16))))
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "192 x 64 x 64",
        "192 x 128 x 128",
        "26,000 x 20,000 x 20,000",
    ]
