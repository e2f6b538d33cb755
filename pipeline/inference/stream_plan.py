"""What streaming a volume takes: windows, blocks, memory, bytes, before anything is computed."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigurationError
from pipeline.inference.windows import Grid

__all__ = ["Block", "StreamPlan", "growth_table", "plan_stream"]

_SPARE = 1.7  # measured peak by the sum of the arrays below: windows, decoded chunks, fragments
_SUM_BYTES = 4  # float32
_SCROLL = (26_000, 20_000, 20_000)  # 10^13 voxels


@dataclass(frozen=True)
class Block:
    """A box of the result, computed by one process: from `low` to before `high`."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return tuple(b - a for a, b in zip(self.low, self.high, strict=True))


@dataclass(frozen=True)
class StreamPlan:
    """How a volume is cut up.

    Attributes:
        shape: of the volume `(D, H, W)`.
        grid: the windows, over the volume padded to hold one.
        unit: voxels of the result that one writer must own, per axis: a chunk, or a shard.
        edges: per axis, where the blocks begin, and the end of the last.
        channels_in, channels_summed, channels_out: of the volume, the network and the result.
        in_bytes, out_bytes: of a voxel and channel.
        gaussian: whether the sum of weights is kept beside that of the predictions.
    """

    shape: tuple[int, ...]
    grid: Grid
    unit: tuple[int, ...]
    edges: tuple[tuple[int, ...], ...]
    channels_in: int = 1
    channels_summed: int = 1
    channels_out: int = 1
    in_bytes: int = 1
    out_bytes: int = 4
    gaussian: bool = False

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.prod(len(edges) - 1 for edges in self.edges)

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in their order, which together are the volume."""
        boxes = itertools.product(*(itertools.pairwise(edges) for edges in self.edges))
        return tuple(Block(*zip(*box, strict=True)) for box in boxes)

    @property
    def padding(self) -> tuple[int, ...]:
        """Voxels added before the volume along each axis, where it is smaller than a window."""
        return tuple((g - n) // 2 for g, n in zip(self.grid.size, self.shape, strict=True))

    def windows_of(self, block: Block) -> Grid:
        """Return the windows that touch `block`, in the frame of the padded volume."""
        low, high = (
            tuple(x + p for x, p in zip(side, self.padding, strict=True))
            for side in (block.low, block.high)
        )
        return self.grid.touching(low, high)

    @property
    def windows(self) -> int:
        """Windows that are run in all blocks together; `grid.count` without the repeated ones."""
        return math.prod(sum(map(len, self._windows_along(axis))) for axis in range(3))

    @property
    def result_bytes(self) -> int:
        """Size of the finest level, before compression."""
        return math.prod(self.shape) * self.channels_out * self.out_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory of the largest block's worker, without the network and its activations."""
        plane = math.prod(self._extent(axis) for axis in (1, 2))
        depth, starts = self.grid.roi[0], self.grid.starts[0]
        stride = max(map(_gap, itertools.pairwise(starts)), default=depth)
        summed = plane * _SUM_BYTES * self.channels_summed
        sums = depth * (summed + (plane * _SUM_BYTES if self.gaussian else 0))
        read = plane * self.in_bytes * self.channels_in * (depth + stride)
        taken = summed * stride  # planes that are finished
        across = math.prod(max(map(_gap, itertools.pairwise(edges))) for edges in self.edges[1:])
        written = across * min(self.unit[0], self.shape[0]) * self.out_bytes * self.channels_out
        return int(_SPARE * (sums + read + taken + 2 * written))  # collected, and compressed

    def table(self, seconds_per_window: float | None = None) -> str:
        """Return the plan as lines of text.

        Args:
            seconds_per_window: measured; None leaves the time out.
        """
        largest = [max(map(_gap, itertools.pairwise(edges))) for edges in self.edges]
        rows = {
            "volume": f"{_size(self.shape)} = {math.prod(self.shape):.3g} voxels",
            "window": f"{_size(self.grid.roi)}, {self.grid.count:,} in the volume",
            "blocks": f"{self.count:,} of up to {_size(largest)}, written in units of "
            f"{_size(self.unit)}",
            "windows to run": f"{self.windows:,}, {self.windows / self.grid.count:.2f} times: "
            "those between two blocks run in both",
            "memory per worker": f"{_bytes(self.memory_bytes)}, and the network's own",
            "result": f"{_bytes(self.result_bytes)} before compression",
        }
        if seconds_per_window is not None:
            seconds = self.windows * seconds_per_window
            rows["time on one worker"] = _time(seconds)
            rows["time on all blocks at once"] = _time(seconds / self.count)
        return "\n".join(f"{name:<28}{value}" for name, value in rows.items())

    def growth(
        self,
        grid_of: Callable[[Sequence[int]], Grid],
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> list[StreamPlan]:
        """Return plans of larger volumes, each as one block.

        Args:
            grid_of: the windows over a volume of some shape.
            shapes: of the volumes; by default this one twice as deep, then twice along every axis,
                then a whole scroll of 10^13 voxels.
        """
        if shapes is None:
            depth, *rest = self.shape
            shapes = [(2 * depth, *rest), tuple(2 * n for n in self.shape), _SCROLL]
        return [
            dataclasses.replace(
                self, shape=tuple(shape), grid=grid_of(shape), edges=tuple((0, n) for n in shape)
            )
            for shape in shapes
        ]

    def _windows_along(self, axis: int) -> list[range]:
        """Return which windows touch each part of an axis."""
        starts, roi, pad = self.grid.starts[axis], self.grid.roi[axis], self.padding[axis]
        return [
            range(bisect.bisect_right(starts, a + pad - roi), bisect.bisect_left(starts, b + pad))
            for a, b in itertools.pairwise(self.edges[axis])
        ]

    def _extent(self, axis: int) -> int:
        """Return how far the windows of a block reach at most."""
        starts, roi = self.grid.starts[axis], self.grid.roi[axis]
        return max(starts[r[-1]] + roi - starts[r[0]] for r in self._windows_along(axis))


def growth_table(plans: Sequence[StreamPlan]) -> str:
    """Return what volumes take, a line each."""
    rows = [("volume, as one block", "windows", "memory", "result")]
    for plan in plans:
        result = _bytes(plan.result_bytes)
        rows.append((_size(plan.shape), f"{plan.grid.count:,}", _bytes(plan.memory_bytes), result))
    return "\n".join(f"{a:<28}{b:>14}{c:>12}{d:>12}" for a, b, c, d in rows)


def plan_stream(
    shape: Sequence[int],
    grid: Grid,
    unit: Sequence[int],
    *,
    blocks: int | None = None,
    tiles: Sequence[int] = (1, 1),
    bounds: Sequence[int] | None = None,
    channels_in: int = 1,
    channels_summed: int = 1,
    channels_out: int = 1,
    in_bytes: int = 1,
    out_bytes: int = 4,
    gaussian: bool = False,
) -> StreamPlan:
    """Cut a volume into blocks, each to be computed by itself.

    Args:
        shape: of the volume `(D, H, W)`.
        grid: its windows.
        unit: voxels of the result that one writer must own: a chunk's size, or a shard's.
        blocks: how many, a multiple of the number of tiles; by default one per tile, or as many as
            `bounds` say.
        tiles: into how many parts the other two axes are cut, where one slab of the whole plane
            would not fit into a worker's memory.
        bounds: where the blocks begin along the first axis, and the end of the last; None spreads
            them evenly.
        channels_in: see `StreamPlan`, as the other arguments.
        channels_summed: of the network.
        channels_out: of the result.
        in_bytes: of a voxel read.
        out_bytes: of a voxel written.
        gaussian: whether the weights are.

    Raises:
        ConfigurationError: a block would share a unit with its neighbour, and two writers of one
            chunk lose each other's part; or there are more blocks than units.
    """
    shape, unit = tuple(shape), tuple(unit)
    for name, values, length in (("chunks or shards", unit, 3), ("tiles", tiles, 2)):
        if len(values) != length or min(values) < 1:
            raise ConfigurationError(f"{name} {list(values)}: expected {length} positive numbers")
    along = [list(bounds) if bounds is not None else _cut(shape, unit, 0, _slabs(blocks, tiles))]
    along += [_cut(shape, unit, axis, parts) for axis, parts in enumerate(tiles, 1)]
    for axis, edges in enumerate(along):
        _check_aligned(edges, shape[axis], unit[axis], axis)
    plan = StreamPlan(
        shape, grid, unit, tuple(map(tuple, along)), channels_in, channels_summed, channels_out,
        in_bytes, out_bytes, gaussian,
    )  # fmt: skip
    if blocks is not None and plan.count != blocks:
        raise ConfigurationError(f"blocks is {blocks}, the bounds and tiles make {plan.count}")
    return plan


def _slabs(blocks: int | None, tiles: Sequence[int]) -> int:
    """Return into how many parts the first axis is cut."""
    across = math.prod(tiles)
    if blocks is None:
        return 1
    if blocks < 1 or blocks % across:
        raise ConfigurationError(
            f"blocks is {blocks}; expected a positive multiple of the {across} tiles"
        )
    return blocks // across


def _cut(shape: Sequence[int], unit: Sequence[int], axis: int, parts: int) -> list[int]:
    """Return the edges of `parts` parts of an axis, on units."""
    size, step = shape[axis], unit[axis]
    units = math.ceil(size / step)
    if parts > units:
        raise ConfigurationError(
            f"axis {axis} has {size} voxels in {units} chunks (or shards) of {step} and cannot be "
            f"cut into {parts} parts; ask for fewer blocks or tiles, or write smaller chunks"
        )
    return [min(size, i * units // parts * step) for i in range(parts + 1)]


def _check_aligned(edges: Sequence[int], size: int, unit: int, axis: int) -> None:
    if not edges or list(edges) != sorted(set(edges)) or (edges[0], edges[-1]) != (0, size):
        raise ConfigurationError(
            f"the blocks' bounds {list(edges)} along axis {axis} must ascend from 0 to {size}"
        )
    if misplaced := [edge for edge in edges[:-1] if edge % unit]:
        raise ConfigurationError(
            f"blocks would begin at {misplaced} along axis {axis}, inside a chunk (or shard) of "
            f"{unit} voxels that another block writes too; put every bound on a multiple of {unit}"
        )


def _gap(edges: tuple[int, int]) -> int:
    return edges[1] - edges[0]


def _size(shape: Sequence[int]) -> str:
    return " x ".join(f"{n:,}" for n in shape)


def _time(seconds: float) -> str:
    for name, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {name}"
    return f"{seconds:.1f} s"


def _bytes(count: int) -> str:
    amount = float(count)
    for name in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000:
            return f"{amount:.3g} {name}"
        amount /= 1024
    return f"{amount:,.3g} TiB"
