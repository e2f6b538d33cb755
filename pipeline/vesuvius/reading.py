"""A volume read and scaled, with the seconds that took; or left on disk to be streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from pipeline.data.budget import available_bytes, decoded_limit_bytes
from pipeline.data.volumes import Volume, open_volume
from pipeline.errors import ConfigurationError
from pipeline.inference.stages import StageClock

__all__ = ["ReadVolume", "Stream", "is_streamed"]

Stream = bool | Literal["auto"]

# At the peak of network and repair, beside the volume itself; benchmarks/surface_end_to_end.py
# prints the peak of each stage.
_BYTES_PER_VOXEL = 40


class ReadVolume:
    """The transforms of a case, each of them timed, unless its volume is to be streamed.

    A case whose volume is streamed comes back as it is, with `streamed` true. Arrays are never
    streamed.

    Args:
        transforms: the first one reads.
        stages: names of the transforms, for the record of their seconds.
        stream: `auto`: what does not fit into half of the memory; true, false: everything, nothing.

    Raises:
        ConfigurationError: not as many stages as transforms, or another value of `stream`.
    """

    def __init__(
        self,
        transforms: Sequence[Callable[[Any], Any]],
        stages: Sequence[str],
        stream: Stream = "auto",
    ) -> None:
        if len(stages) != len(transforms):
            raise ConfigurationError(
                f"{len(stages)} stages for {len(transforms)} transforms; name each"
            )
        if stream not in ("auto", True, False):
            raise ConfigurationError(f"stream must be auto, true or false, got {stream!r}")
        self.transforms = list(transforms)
        self.stages = list(stages)
        self.stream: Stream = stream

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case read, with `stages` (the record of a `StageClock`), or with `streamed`.

        Raises:
            InputError: the volume cannot be read.
        """
        case = {key: value for key, value in data.items() if value is not None}
        source = case["image"]
        if isinstance(source, str | Path) and self.stream is not False:
            with open_volume(source) as volume:
                if is_streamed(volume, self.stream):
                    return {"image": str(source), "name": case.get("name", ""), "streamed": True}
        clock = StageClock()
        for transform, stage in zip(self.transforms, self.stages, strict=True):
            case = transform(case)
            clock.lap(stage)
        return {**case, "stages": clock.record()}


def is_streamed(volume: Volume, stream: Stream = "auto") -> bool:
    """Return whether a volume is computed piece by piece, without repair.

    Args:
        volume: opened.
        stream: `auto`: where the volume with all that inference makes of it would take more than
            half of the memory that this process may still have.
    """
    if stream != "auto":
        return stream
    voxels = math.prod(volume.shape)
    decoded = voxels * volume.dtype.itemsize
    needed = decoded + voxels * _BYTES_PER_VOXEL
    return needed > _memory_bytes() // 2 or decoded > decoded_limit_bytes()


def _memory_bytes() -> int:
    """Return the memory that this process may still take: by machine, container and `ulimit -d`."""
    try:
        import resource
    except ImportError:  # Windows knows no such limit
        return available_bytes()
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return available_bytes()
    held = getattr(psutil.Process().memory_info(), "data", 0)  # Linux tells, others do not
    return min(available_bytes(), max(limit - held, 0))
