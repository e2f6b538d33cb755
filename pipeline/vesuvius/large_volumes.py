"""Volumes that do not fit into memory, on the way of a run over files: streamed, not repaired."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import ScaleIntensityRange
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.atomic import check_writable
from pipeline.data.budget import decoded_limit_bytes
from pipeline.data.volume_pieces import flat_pieces
from pipeline.data.volume_statistics import intensity_fault, intensity_percentiles
from pipeline.data.volumes import Volume, open_volume
from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.accepted import AcceptedLoader
from pipeline.inference.batch import BatchRun
from pipeline.inference.finishing import Finish
from pipeline.inference.sidecars import path_sha256
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.stages import StageClock
from pipeline.inference.streaming import StreamResult, VolumeStream
from pipeline.vesuvius.geometry import VoxelSize
from pipeline.vesuvius.pictures import three_planes
from pipeline.vesuvius.result_facts import foreground_facts

__all__ = ["StreamedOnTheWay"]

logger = logging.getLogger(__name__)

_SLAB_BYTES = 1 << 26
_SHOWN = 128  # voxels along an axis of what is read for the picture
# As `LoadVolumed` converts them: with these torch computes little, or less exactly.
_NOT_COMPUTED_WITH = {
    torch.bool: torch.uint8,
    torch.uint16: torch.float32,
    torch.float16: torch.float32,
}


class StreamedOnTheWay:
    """The batches of a loader; the volumes that `ReadVolume` has left on disk are done in between.

    Their logits are those of the volume in memory, bit for bit; the probability is cut at the
    threshold and written as OME-Zarr, `<name>_surface.zarr`. There is no repair, which needs the
    whole; sidecar and log say so. A run that was killed goes on where it was. Reading and writing
    are part of the seconds of `network`.

    Args:
        loader: the run's.
        batch: the run, which is told what becomes of each.
        network: from windows to logits.
        inferer: windows and what runs the network.
        percentiles: of a volume, which become 0 and 1.
        threshold: probability from which a voxel is surface.
        save_probability: write the probability instead of the mask, in uint8 (255 is certain), as
            `<name>_probability.zarr`.
        device: where the network computes.
        checkpoint: plain data of the checkpoint for the sidecar.
        overwrite: begin anew where there is something of an earlier run.
    """

    def __init__(
        self,
        loader: AcceptedLoader,
        batch: BatchRun,
        network: nn.Module,
        inferer: SlidingWindow,
        percentiles: Sequence[float],
        threshold: float,
        save_probability: bool = False,
        device: str | torch.device = "cpu",
        checkpoint: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.loader = loader
        self.batch = batch
        self.network = network
        self.inferer = inferer
        self.low, self.high = percentiles
        self.threshold = float(threshold)
        self.save_probability = save_probability
        self.device = torch.device(device)
        self.checkpoint = dict(checkpoint or {})
        self.overwrite = overwrite

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            items = next(self.loader)
            if "streamed" not in items:
                return items
            for name, source in zip(items["name"], items["image"], strict=True):
                with self.batch.attempt(str(name)):
                    self._stream(str(name), str(source))

    def _stream(self, name: str, source: str) -> None:
        """Compute, write and record one volume."""
        clock = StageClock()
        with open_volume(source) as volume:
            logger.info(
                "%s: %s of %s is streamed, and not repaired: it would take more than half of the "
                "memory, or stream is true", name, volume.shape, volume.dtype,
            )  # fmt: skip
            scale = _Scaled(volume, self.low, self.high)
            clock.lap("scale")
            result = self._run(name, volume, scale)
            clock.lap("network")
            with open_volume(result.path) as found:
                foreground = self._foreground(found)
                picture = self._picture(name, volume, found)
            size = VoxelSize(volume.spacing, volume.unit)
            counted = foreground_facts(foreground, int(np.prod(volume.shape)), name)
            clock.lap("write")
            details = {
                "shape": list(volume.shape),
                "source_dtype": str(volume.dtype),
                **size.facts(),
                "checkpoint": self.checkpoint,
                "streamed": {
                    "content": "probability" if self.save_probability else "mask",
                    "threshold": self.threshold,
                    "repaired": False,
                    "windows": result.windows,
                    "planned_memory_bytes": result.plan.memory_bytes,
                },
                **counted,
                **clock.record(),
            }
        row = {
            "foreground": foreground,
            "streamed": True,
            "warning": "; ".join(counted["warnings"]),
        }
        self.batch.record(name, [result.path, picture], row, details)

    def _run(self, name: str, volume: Volume, scale: _Scaled) -> StreamResult:
        content = "probability" if self.save_probability else "surface"
        kept: dict[str, Any] = {"threshold": self.threshold}
        target = self.batch.path(name, f"_{content}.zarr")
        check_writable(target.parent)
        identity = {
            **self.batch.origins.of_the_run,
            "input_sha256": path_sha256(volume.path, self.batch.origins.identity),
        }
        stream = VolumeStream(
            volume, target, self.network.eval(),
            inferer=self.inferer, prepare=scale, device=self.device, identity=identity,
            finish=Finish("sigmoid", **({"dtype": "uint8"} if self.save_probability else kept)),
            overwrite=self.overwrite,
        )  # fmt: skip
        if not self.overwrite:
            try:  # a result of other settings stops this volume, and not the others
                stream.store.open()
            except ConfigurationError as error:
                raise InputError(str(error)) from error
        return stream.run()

    def _foreground(self, result: Volume) -> int:
        return sum(int(self._mask(part).sum()) for _, part in flat_pieces(result, _slab_bytes()))

    def _mask(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        return values >= (round(self.threshold * 255) if self.save_probability else 1)

    def _picture(self, name: str, volume: Volume, result: Volume) -> Any:
        """Show the middle of the volume; without repair both masks are one."""
        starts = [max(0, (n - _SHOWN) // 2) for n in volume.shape]
        z, y, x = (slice(start, start + _SHOWN) for start in starts)
        image = volume[z, y, x].reshape(result[z, y, x].shape).astype(np.float32)
        mask = self._mask(result[z, y, x])
        path = self.batch.path(f"pictures/{name}", ".png")
        return write_png(path, three_planes(image, mask, mask.astype(np.uint8)))


def _slab_bytes() -> int:
    """Return how much is read at once where the order does not matter."""
    return min(_SLAB_BYTES, decoded_limit_bytes())


class _Scaled:
    """The percentiles of a volume to 0 and 1, window by window, as `ScalePercentilesd` does it.

    Raises:
        InputError: the volume has values that are not finite, only one, or several channels.
    """

    def __init__(self, volume: Volume, low: float, high: float) -> None:
        if volume.channels not in (None, 1):
            raise InputError(f"{volume.path}: {volume.channels} channels, expected one")
        found = intensity_percentiles(volume, low, high, _slab_bytes())
        if fault := intensity_fault(found):
            raise InputError(f"{volume.path}: {fault}")
        self._scale = ScaleIntensityRange(found["low"], found["high"], 0.0, 1.0, clip=True)

    def __call__(self, window: Tensor) -> Tensor:
        if window.dtype in _NOT_COMPUTED_WITH:
            window = window.to(_NOT_COMPUTED_WITH[window.dtype])
        return torch.as_tensor(self._scale(window))
