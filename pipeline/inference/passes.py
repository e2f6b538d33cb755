"""The network's passes over windows: in batches that fit into memory, in a fixed order."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.replicas import Replicas

__all__ = ["Passes", "Structure"]

logger = logging.getLogger(__name__)

Place = TypeVar("Place")
Predict = Callable[[Tensor], Any]

_LARGEST_BATCH = 16  # more windows at once gain nothing and cost memory
_MEMORY_SHARE = 0.8  # of what is free


class Structure:
    """How a network gives its outputs: one tensor, several in a row, or several by name."""

    def __init__(self, outputs: Any) -> None:
        self.names = tuple(outputs) if isinstance(outputs, Mapping) else None
        self.single = isinstance(outputs, Tensor)

    def flatten(self, outputs: Any) -> tuple[Tensor, ...]:
        """Return the tensors of `outputs`."""
        if self.single:
            return (outputs,)
        return tuple(outputs[name] for name in self.names) if self.names else tuple(outputs)

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """Return `tensors` in the network's own form."""
        if self.single:
            return tensors[0]
        return dict(zip(self.names, tensors, strict=True)) if self.names else tuple(tensors)


class Passes:
    """Run windows through a network, several at a time.

    Where memory runs out, a batch is halved, and so are all later ones; with a single window left,
    `release` is asked to free memory; after that the run ends.

    Args:
        predictors: one per device, each from windows `(N, C, *roi)` to what the network gives.
        devices: of the predictors.
        batch_size: windows per pass; `auto` takes one on a CPU, where more gain nothing, and on a
            GPU as many as fit into its free memory, by what the first one took.
        release: frees memory on the device and returns whether it could.
        spatial: whether outputs have the size of the windows; else they are `(N, C')`.

    Attributes:
        structure: of the network's outputs, known after the first pass.
    """

    def __init__(
        self,
        predictors: Sequence[Predict],
        devices: Sequence[torch.device],
        batch_size: int | Literal["auto"] = 1,
        release: Callable[[], bool] = lambda: False,
        *,
        spatial: bool = True,
    ) -> None:
        self.release = release
        self.spatial = spatial
        self.structure: Structure | None = None
        guarded = [functools.partial(self._with_enough_memory, predict) for predict in predictors]
        self._replicas = Replicas(guarded, devices)
        self._batch_size = None if batch_size == "auto" else batch_size
        self._writes_input: bool | None = None

    def run(
        self, windows: Iterable[tuple[Place, Tensor | None]]
    ) -> Iterator[tuple[Place, tuple[Tensor, ...] | None]]:
        """Yield what the network gives for every window, in the order of `windows`.

        Args:
            windows: places and windows `(C, *roi)`; None is a window not to be run.

        Yields:
            The place, and output tensors `(C', *roi)`, or None.
        """
        batches = _Batches(windows, lambda: self._batch_size or 1)
        for outputs in self._replicas.run(batches):
            for place, index in batches.places.popleft():
                yield place, None if index is None else tuple(part[index] for part in outputs)
        for place, _ in batches.left:
            yield place, None

    def _with_enough_memory(self, predict: Predict, batch: Tensor) -> tuple[Tensor, ...]:
        while True:
            try:
                return self._measured(predict, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
            # Outside the handler, whose exception would keep the pass's memory.
            if batch.is_cuda:
                torch.cuda.empty_cache()
            if len(batch) > 1:
                return self._halved(predict, batch)
            if not self.release():
                raise ResourceError(
                    f"out of memory with one window of {list(batch.shape[2:])} ({reason}); use a "
                    "smaller roi_size or network, or a device with more memory"
                )

    def _halved(self, predict: Predict, batch: Tensor) -> tuple[Tensor, ...]:
        half = len(batch) // 2
        if self._batch_size is None or half < self._batch_size:
            self._batch_size = half
            logger.warning("out of memory: %d windows per pass from now on", half)
        halves = [self._with_enough_memory(predict, part) for part in batch.split(half)]
        return tuple(torch.cat(parts) for parts in zip(*halves, strict=True))

    def _measured(self, predict: Predict, batch: Tensor) -> tuple[Tensor, ...]:
        if self._batch_size is not None or not batch.is_cuda:
            return self._outputs(predict, batch)
        before = torch.cuda.memory_allocated(batch.device)
        torch.cuda.reset_peak_memory_stats(batch.device)
        outputs = self._outputs(predict, batch)
        taken = torch.cuda.max_memory_allocated(batch.device) - before
        free, _ = torch.cuda.mem_get_info(batch.device)
        fitting = int(free * _MEMORY_SHARE / max(1, taken))
        self._batch_size = max(1, min(_LARGEST_BATCH, fitting))
        logger.info("%d windows per pass (%d MiB each)", self._batch_size, taken >> 20)
        return outputs

    def _outputs(self, predict: Predict, batch: Tensor) -> tuple[Tensor, ...]:
        given = self._without_writing(predict, batch)
        if self.structure is None:
            self.structure = Structure(given)
        outputs = self.structure.flatten(given)
        for output in outputs:
            wanted = batch.shape[2:] if self.spatial else torch.Size()
            if output.shape[2:] != wanted or len(output) != len(batch):
                size = "of the window's own size" if self.spatial else "of one row per image"
                raise ConfigurationError(
                    f"the network gives {list(output.shape)} for windows {list(batch.shape)}; "
                    f"expected an output {size}"
                )
        return outputs

    def _without_writing(self, predict: Predict, batch: Tensor) -> Any:
        """Call `predict` so that the image, of which `batch` may be a view, stays as it is."""
        if self._writes_input is False:
            return predict(batch)
        copy = batch.clone()
        outputs = predict(copy)
        if self._writes_input is None:  # the first pass tells
            self._writes_input = not torch.equal(copy, batch)
        return outputs


class _Batches:
    """Windows in batches, and which places each batch stands for."""

    def __init__(
        self, windows: Iterable[tuple[Any, Tensor | None]], size: Callable[[], int]
    ) -> None:
        self._windows = windows
        self._size = size
        self.places: collections.deque[list[tuple[Any, int | None]]] = collections.deque()
        self.left: list[tuple[Any, int | None]] = []  # without a window to run behind them

    def __iter__(self) -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for place, window in self._windows:
            if window is None:
                self.left.append((place, None))
                continue
            self.left.append((place, len(batch)))
            batch.append(window)
            if len(batch) >= self._size():
                yield self._close(batch)
                batch = []
        if batch:
            yield self._close(batch)

    def _close(self, batch: list[Tensor]) -> Tensor:
        self.places.append(self.left)
        self.left = []
        # One window is a view of the image: a copy would cost as much as blending it.
        return torch.stack(batch) if len(batch) > 1 else batch[0][None]
