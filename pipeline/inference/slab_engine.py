"""The blended output of a network over a box of a volume on disk, plane after plane."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.data.volumes import Volume
from pipeline.errors import ConfigurationError
from pipeline.inference.accumulation import Slab
from pipeline.inference.passes import Passes
from pipeline.inference.slab_reader import SlabReader
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.stream_plan import Block, StreamPlan
from pipeline.inference.windows import Grid

__all__ = ["SlabEngine"]

logger = logging.getLogger(__name__)


class SlabEngine:
    """What `SlidingWindow` computes in memory, bit for bit, in a slab as deep as a window.

    The network is made ready when it is first needed.

    Args:
        source: the volume.
        mask: of the same shape; windows where it is 0 are not run.
        predictor: from windows `(N, C, *roi)` to outputs `(N, C', *roi)`.
        inferer: the windows.
        prepare: from a window `(C, *roi)` to the network's input; None changes its type only.
        device: where the network computes.
        channels: `C'`, to be compared with what the network gives; None: whatever it gives.

    Attributes:
        windows: on which the network was run so far.

    Raises:
        ConfigurationError: the mask is of another shape.
    """

    def __init__(
        self,
        source: Volume,
        mask: Volume | None,
        predictor: Callable[[Tensor], Any],
        inferer: SlidingWindow,
        prepare: Callable[[Tensor], Tensor] | None,
        device: torch.device,
        channels: int | None,
    ) -> None:
        if mask is not None and mask.shape != source.shape:
            raise ConfigurationError(
                f"{mask.path}: the mask has shape {mask.shape}, the volume {source.shape}; "
                "expected the same"
            )
        self.windows = 0
        self._source = source
        self._mask = mask
        self._predictor = predictor
        self._inferer = inferer
        self._prepare = prepare
        self._device = device
        self._channels = channels

    @functools.cached_property
    def output(self) -> Tensor:
        """What the network gives for a voxel, `(C')`, without values.

        Raises:
            ConfigurationError: it gives several tensors, or another number of channels.
        """
        with torch.no_grad():
            ((_, outputs),) = self._passes.run([((), self._first_window)])
        if outputs is None or len(outputs) != 1:
            raise ConfigurationError(
                f"a streamed network must give one tensor, got {len(outputs or ())}; wrap it in a "
                "function that returns the one to write"
            )
        found = len(outputs[0])
        if self._channels not in (None, found):
            raise ConfigurationError(f"channels is {self._channels}, the network gives {found}")
        return torch.empty(found, dtype=outputs[0].dtype)

    def make_ready(self) -> None:
        """Prepare the network and run it once, so that what does not suit is told in time."""
        logger.debug("the network gives %d channels", len(self.output))

    def planes(self, plan: StreamPlan, block: Block) -> Iterator[Tensor]:
        """Yield the blended planes `(C', k, h, w)` of a block, in order."""
        windows = plan.windows_of(block)
        origin = tuple(axis[0] for axis in windows.starts)
        local = _moved_to(windows, origin)
        shift = [p - o for p, o in zip(plan.padding, origin, strict=True)]
        low = [x + s for x, s in zip(block.low, shift, strict=True)]
        high = [x + s for x, s in zip(block.high, shift, strict=True)]
        inside = (slice(low[1], high[1]), slice(low[2], high[2]))
        for z, planes in self._slabs(local, shift, alone=plan.grid.count == 1):
            first, last = max(z, low[0]), min(z + planes.shape[1], high[0])
            if first < last:
                yield planes[(slice(None), slice(first - z, last - z), *inside)]

    def _slabs(
        self, local: Grid, shift: Sequence[int], *, alone: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield finished planes `(C', k, *rest)` of a box, and the number of the first."""
        inferer = self._inferer
        where = inferer.accumulate_on or self._device
        slab = Slab(local, inferer.weights, local.roi[0], where, inferer.empty_value)
        self._passes.release = slab.move_to_cpu
        reader = SlabReader(self._source, local, shift, inferer.padding_mode)
        mask = SlabReader(self._mask, local, shift, "constant") if self._mask else None
        with tqdm(total=local.count, desc="windows", disable=not inferer.progress or None) as bar:
            for z, following in itertools.pairwise((*local.starts[0], local.size[0])):
                if not slab.sums:  # now, because the first windows may be empty
                    slab.begin([self.output])
                held, kept = reader.planes(z), mask.planes(z) if mask else None
                row = ((s, self._window(held, kept, (0, *s[1:]), local.roi)) for s in local.row(z))
                for start, outputs in self._passes.run(row):
                    self.windows += outputs is not None
                    bar.update()
                    if alone and outputs is not None:
                        # One window is the volume: as in memory, not even a rounding.
                        yield z, outputs[0].to(slab.sums[0].dtype)
                        return
                    slab.add(start, outputs)
                (planes,) = slab.take(following - z)
                yield z, planes

    def _window(
        self, held: Tensor, mask: Tensor | None, start: Sequence[int], roi: Sequence[int]
    ) -> Tensor | None:
        window = self._inferer.cut(held, start, roi, mask)
        return None if window is None else self._prepared(window)

    def _prepared(self, window: Tensor) -> Tensor:
        if self._prepare is not None:
            window = self._prepare(window.clone())  # it may write into what other windows share
        return window.to(self._device)

    @functools.cached_property
    def _first_window(self) -> Tensor:
        """A window `(C, *roi)` from the middle of the volume: it tells more than an empty one."""
        grid = self._inferer.grid(self._source.shape)
        middle = [axis[len(axis) // 2] for axis in grid.starts]
        padding = [(g - n) // 2 for g, n in zip(grid.size, self._source.shape, strict=True)]
        shift = [p - m for p, m in zip(padding, middle, strict=True)]
        alone = Grid(grid.roi, grid.roi, ((0,),) * len(grid.roi))
        reader = SlabReader(self._source, alone, shift, self._inferer.padding_mode)
        window = self._prepared(reader.planes(0))
        if tuple(window.shape[1:]) != grid.roi:
            raise ConfigurationError(
                f"prepare gives {list(window.shape)} for a window of {list(grid.roi)}; expected "
                "(C, *window)"
            )
        return window

    @functools.cached_property
    def _passes(self) -> Passes:
        if isinstance(self._predictor, nn.Module) and self._predictor.training:
            raise ConfigurationError("the network is in training mode; call network.eval() first")
        with torch.no_grad():
            return self._inferer.passes(self._predictor, self._first_window[None])


def _moved_to(grid: Grid, origin: Sequence[int]) -> Grid:
    """Return `grid` in a frame that begins at `origin` and ends with its last windows."""
    starts = tuple(tuple(s - o for s in axis) for axis, o in zip(grid.starts, origin, strict=True))
    size = tuple(axis[-1] + p for axis, p in zip(starts, grid.roi, strict=True))
    return Grid(size, grid.roi, starts)
