"""A network over a volume of any size: planes in, windows blended, planes out.

What is in memory at a time is a slab as deep as a window, whatever the volume's depth.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.budget import available_bytes
from pipeline.data.ome_metadata import SPACE_UNITS
from pipeline.data.volumes import Volume, open_volume
from pipeline.errors import ConfigurationError
from pipeline.inference.finishing import Finish
from pipeline.inference.plane_writer import PlaneWriter
from pipeline.inference.slab_engine import SlabEngine
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.stream_agreement import agreement_of, made_with
from pipeline.inference.stream_plan import Block, StreamPlan, growth_table, plan_stream
from pipeline.inference.stream_store import StreamStore

__all__ = ["StreamResult", "VolumeStream", "stream_volume"]

logger = logging.getLogger(__name__)

Prepare = Callable[[Tensor], Tensor]
_CHUNK = 128  # voxels of a chunk along the axes in the plane
_CHUNK_PLANES = 32  # of a chunk at least: fewer make many small files
_AT_ONCE = 2**20  # voxels that are finished together: their copies stay small
_NOTE_EVERY_S = 60


@dataclass(frozen=True)
class StreamResult:
    """What a call of `stream_volume` did.

    Attributes:
        path: of the result.
        complete: whether all blocks are done and the result has its final name.
        windows: that the network was run on.
        seconds: from start to end.
        plan: of the whole run.
    """

    path: Path
    complete: bool
    windows: int
    seconds: float
    plan: StreamPlan


def stream_volume(
    source: str | Path | Volume,
    target: str | Path,
    predictor: Callable[[Tensor], Any],
    *,
    inferer: SlidingWindow,
    block: tuple[int, int] | None = None,
    **settings: Any,
) -> StreamResult:
    """Run a network over a volume on disk, and write the blended result as OME-Zarr.

    A run that was killed goes on where it was. With `block=(i, n)` the call computes the i-th of n
    blocks only, from 0: n calls in any order, on any machines that share the disk, give bit for bit
    what one call for the whole volume gives; the last of them completes the result.

    Args:
        source: OME-Zarr, Zarr, HDF5, TIFF, a folder of slices, npy or NIfTI; see `open_volume`.
        target: the result, `name.zarr`.
        predictor: from windows `(N, C, *roi)` to logits `(N, C', *roi)`.
        inferer: windows, their blending, and what runs the network.
        block: which of how many.
        **settings: of `VolumeStream`.

    Raises:
        InputError: the source is no volume.
        ConfigurationError: blocks would share a chunk, or the target belongs to another run.
        ResourceError: the disk is full, or one window does not fit into memory.
    """
    if block is None:
        return VolumeStream(source, target, predictor, inferer=inferer, **settings).run()
    index, count = block
    if not 0 <= index < count:
        raise ConfigurationError(f"block is {block}; expected (i, n) with i from 0 to n - 1")
    if settings.get("overwrite"):
        raise ConfigurationError(
            "overwrite with block: each job would remove what the others have written; remove the "
            "target before the jobs start"
        )
    if settings.setdefault("blocks", count) != count:
        raise ConfigurationError(f"block is {block}, but blocks is {settings['blocks']}; leave one")
    return VolumeStream(source, target, predictor, inferer=inferer, **settings).run([index])


class VolumeStream:
    """A run of `stream_volume`, whose plan can be read before it starts.

    Nothing is written before `run`.

    Args:
        source, target, predictor, inferer: see `stream_volume`.
        prepare: from a window `(C, *roi)` in the source's type to the network's input of that size;
            None converts the type only. Padding comes before it, and so does the inferer's
            `skip_below`.
        finish: from blended logits to what is written; None writes the logits as float32.
        channels: of the network's output; None asks the network with a window at once.
        blocks, tiles, bounds: how the volume is cut; see `plan_stream`.
        chunks: of the result, voxels per axis; None: as deep as the windows' stride.
        shards: of the result, each one file of many chunks; None writes a file per chunk.
        zarr_format: 3, or 2 for readers of OME-Zarr 0.4.
        levels: of the pyramid; None: until it is small.
        reduce: how a coarser level is made: `mean`, `nearest`, `max`; None: as `finish` asks for.
        identity: plain data that stands for predictor and preparation, such as the checkpoint's
            sha256: a run with another one does not go on where this one was.
        mask: a volume of the source's shape; windows where it is 0 are not run.
        device: where the network computes.
        overwrite: remove what has the target's name when `run` begins.

    Raises:
        InputError: source or mask are no volumes.
        ConfigurationError: as `stream_volume`.
    """

    def __init__(
        self,
        source: str | Path | Volume,
        target: str | Path,
        predictor: Callable[[Tensor], Any],
        *,
        inferer: SlidingWindow,
        prepare: Prepare | None = None,
        finish: Finish | None = None,
        channels: int | None = None,
        blocks: int | None = None,
        tiles: Sequence[int] = (1, 1),
        bounds: Sequence[int] | None = None,
        chunks: Sequence[int] | None = None,
        shards: Sequence[int] | None = None,
        zarr_format: int = 3,
        levels: int | None = None,
        reduce: str | None = None,
        identity: Mapping[str, Any] | None = None,
        mask: str | Path | Volume | None = None,
        device: str | torch.device = "cpu",
        overwrite: bool = False,
    ) -> None:
        self.source = source if isinstance(source, Volume) else open_volume(source)
        self.target = Path(target)
        self.mask = open_volume(mask) if isinstance(mask, str | Path) else mask
        for volume in (self.source, self.mask):
            if volume is not None:
                _check_apart(volume.path, self.target)
        self.inferer = inferer
        self.finish = finish or Finish()
        self.overwrite = overwrite
        self._engine = SlabEngine(
            self.source, self.mask, predictor, inferer, prepare, torch.device(device), channels
        )
        channels = channels or len(self._engine.output)
        chunks = tuple(chunks) if chunks else _default_chunks(inferer, self.source.shape)
        self.plan = plan_stream(
            self.source.shape,
            inferer.grid(self.source.shape),
            tuple(shards) if shards else chunks,
            blocks=blocks,
            tiles=tiles,
            bounds=bounds,
            channels_in=self.source.channels or 1,
            channels_summed=channels,
            channels_out=self.finish.channels(channels),
            in_bytes=self.source.dtype.itemsize,
            out_bytes=self.finish.dtype.itemsize,
            gaussian=inferer.weights == "gaussian",
        )
        reduce = reduce or self.finish.reduce
        layout = {"chunks": chunks, "shards": shards, "zarr_format": zarr_format}
        agreement = agreement_of(
            self.source,
            self.mask,
            inferer,
            self.finish,
            self.plan,
            {**layout, "levels": levels, "reduce": reduce},
            identity,
        )
        created = {**layout, **self._content()}
        self.store = StreamStore(self.target, self.plan, agreement, created, levels, reduce)

    def table(self) -> str:
        """Return the plan, and how it grows with the volume, as lines of text."""
        growth = self.plan.growth(self.inferer.grid)
        return f"{self.plan.table()}\n{growth_table(growth)}"

    def begin(self) -> Any | None:
        """Create what blocks are written to, and log the plan; None where the result is whole."""
        array = self._open()
        if array is not None:
            self._announce()
        return array

    def run(self, blocks: Sequence[int] | None = None) -> StreamResult:
        """Compute blocks that are not done yet, and complete the result if all are.

        Args:
            blocks: their numbers; all by default.
        """
        started = time.monotonic()
        chosen = range(self.plan.count) if blocks is None else blocks
        if not all(0 <= index < self.plan.count for index in chosen):
            raise ConfigurationError(f"blocks {list(chosen)}: there are 0 to {self.plan.count - 1}")
        before = self._engine.windows
        if self.overwrite or not self.store.is_complete():
            self._engine.make_ready()
        array = self.begin() if blocks is None else self._open()
        if array is not None:
            for index in chosen:
                self._run_block(index, array)
        complete = self.store.finish()
        windows, seconds = self._engine.windows - before, time.monotonic() - started
        return StreamResult(self.target, complete, windows, seconds, self.plan)

    def _open(self) -> Any | None:
        if self.overwrite:
            self.store.remove()
            self.overwrite = False  # what a second call finds is this run's own
        return self.store.open()

    def _run_block(self, index: int, array: Any) -> None:
        """Compute what is missing of a block."""
        block = self.plan.blocks[index]
        with self.store.claim(index) as written:
            if written >= block.shape[0]:
                logger.info("block %d of %d is done", index, self.plan.count)
                return
            rest = Block((block.low[0] + written, *block.low[1:]), block.high)
            logger.info(
                "block %d of %d: planes %d to %d, %d windows",
                index, self.plan.count, rest.low[0], rest.high[0], self.plan.windows_of(rest).count,
            )  # fmt: skip
            writer = PlaneWriter(array, rest, self._noting(index, written))
            step = max(1, _AT_ONCE // math.prod(block.shape[1:]))
            with torch.no_grad():
                for planes in self._engine.planes(self.plan, rest):
                    for some in planes.split(step, 1):
                        writer.add(self.finish(some))

    def _noting(self, index: int, before: int) -> Callable[[int], None]:
        """Return what notes how far a block is, and says so now and then."""
        depth, begun = self.plan.blocks[index].shape[0], time.monotonic()
        said = begun

        def note(planes: int) -> None:
            nonlocal said
            self.store.note(index, before + planes, made_with(self.inferer))
            now, left = time.monotonic(), depth - before - planes
            if left and now - said >= _NOTE_EVERY_S:
                said = now
                hours = (now - begun) / planes * left / 3600
                logger.info(
                    "block %d: %d of %d planes, %.1f h left", index, before + planes, depth, hours
                )

        return note

    def _content(self) -> dict[str, Any]:
        unit = self.source.unit
        if unit is not None and unit not in SPACE_UNITS:
            logger.warning("%s: unit %r is none of OME-Zarr's, left out", self.source.path, unit)
            unit = None
        return {
            "dtype": self.finish.dtype,
            "spacing": self.source.spacing,
            "unit": unit,
            "channels": self.plan.channels_out if self.plan.channels_out > 1 else None,
        }

    def _announce(self) -> None:
        logger.info("%s\n%s", self.target, self.table())
        available, free = available_bytes(), shutil.disk_usage(self.store.partial).free
        if self.plan.memory_bytes > available:
            logger.warning(
                "memory: %.3g GB needed, %.3g available; cut the planes into tiles",
                self.plan.memory_bytes / 1e9, available / 1e9,
            )  # fmt: skip
        if self.plan.result_bytes > free:
            logger.warning(
                "disk: up to %.3g GB needed, %.3g free; compression may or may not suffice",
                self.plan.result_bytes / 1e9, free / 1e9,
            )  # fmt: skip


def _check_apart(source: Path, target: Path) -> None:
    if source.resolve().is_relative_to(target.resolve()):
        raise ConfigurationError(f"{target}: {source.name} lies there; choose another target")


def _default_chunks(inferer: SlidingWindow, shape: Sequence[int]) -> tuple[int, ...]:
    """Return chunks as deep as the stride, or some strides, so that blocks begin on windows."""
    long = inferer.grid([4 * length for length in inferer.roi_size]).starts[0]
    stride = long[1] - long[0]
    depth = stride * math.ceil(_CHUNK_PLANES / stride)
    return (min(depth, shape[0]), *(min(_CHUNK, n) for n in shape[1:]))
