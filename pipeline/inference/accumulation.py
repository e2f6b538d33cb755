"""Sums of weighted predictions, over a whole image or over a slab that moves along it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.blending import Blending, Weights
from pipeline.inference.windows import Grid

__all__ = ["Slab"]

logger = logging.getLogger(__name__)


class Slab:
    """The planes of an image that are being summed up.

    Sums are made in the order of `add`, in float32, or in float64 where the network gives that.

    Args:
        grid: the windows.
        weights: how windows are blended.
        depth: planes held, at least a window's; None holds the image, which then never moves.
        device: of the sums; where its memory runs out, the CPU.
        empty_value: what a window predicts that was not run.
    """

    def __init__(
        self,
        grid: Grid,
        weights: Weights,
        depth: int | None = None,
        device: torch.device | str = "cpu",
        empty_value: float = 0.0,
    ) -> None:
        self.grid = grid
        self.depth = depth or grid.size[0]
        self.first = 0  # plane of the image with which the slab begins
        self.sums: list[Tensor] = []  # one per output of the network, `(C, depth, *rest)`
        self._weights = weights
        self._device = torch.device(device)
        self._empty_value = empty_value
        self._blending: Blending | None = None
        self._waiting: list[Sequence[int]] = []  # empty windows before the first that was run

    def add(self, start: Sequence[int], outputs: Sequence[Tensor] | None) -> None:
        """Add a window.

        Args:
            start: its first index along each axis of the image.
            outputs: `(C, *roi)` each; None for a window that was not run.
        """
        if outputs is not None and not self.sums:
            self.begin(outputs)
        if outputs is None and not self.sums:
            self._waiting.append(start)
            return
        window = self._weights_of_window()
        box = self._box(start)
        for index, total in enumerate(self.sums):
            part = total[(slice(None), *box)]
            if outputs is None:
                part += window * self._empty_value
            else:
                part.addcmul_(outputs[index].to(total.device, total.dtype), window)

    def begin(self, outputs: Sequence[Tensor]) -> None:
        """Allocate the sums for outputs like these; those of empty windows before are added."""
        dtype = torch.float32
        for output in outputs:
            dtype = torch.promote_types(dtype, output.dtype)
        shape = (self.depth, *self.grid.size[1:])
        try:
            self.sums = [
                torch.zeros((len(output), *shape), dtype=dtype, device=self._device)
                for output in outputs
            ]
            self._blending = Blending(self.grid, self._weights, device=self._device, dtype=dtype)
        except RuntimeError as error:
            if self._device.type == "cpu" or not is_out_of_memory(error):
                raise
            self.sums, self._device = [], torch.device("cpu")
            logger.warning("out of memory: windows are blended on the CPU")
        if not self.sums:
            self.begin(outputs)
            return
        waiting, self._waiting = self._waiting, []
        for start in waiting:
            self.add(start, None)

    def move_to_cpu(self) -> bool:
        """Free the memory of the device; return whether there was anything to free."""
        if self._device.type == "cpu" or not self.sums:
            return False
        dtype = self.sums[0].dtype
        self._device = torch.device("cpu")
        self.sums = [total.cpu() for total in self.sums]
        self._blending = Blending(self.grid, self._weights, dtype=dtype)
        logger.warning("out of memory: windows are blended on the CPU")
        return True

    def take(self, count: int) -> list[Tensor]:
        """Return the first `count` planes, finished, and move on behind them: no window comes back.

        Returns:
            Blended outputs `(C, count, *rest)`.
        """
        if self._blending is None:
            raise RuntimeError("no window was added")
        done = [total[:, :count] for total in self.sums]
        for total in done:
            self._blending.normalise(total, self.first)
        if count < self.depth:
            done = [total.clone() for total in done]
        else:
            done, self.sums = list(self.sums), []
        for total in self.sums:
            _move_up(total, count)
        self.first += count
        return done

    def _weights_of_window(self) -> Tensor:
        if self._blending is None:
            raise RuntimeError("no sums were allocated")
        return self._blending.window

    def _box(self, start: Sequence[int]) -> tuple[slice, ...]:
        begins = (start[0] - self.first, *start[1:])
        return tuple(slice(b, b + p) for b, p in zip(begins, self.grid.roi, strict=True))


def _move_up(total: Tensor, count: int) -> None:
    """Move the planes of `total` up by `count`, and zero those that come in at the end."""
    depth = total.shape[1]
    # Plane by plane, ascending: source and target overlap, and a copy of the slab would cost as
    # much memory as the slab.
    for plane in range(depth - count):
        total[:, plane].copy_(total[:, plane + count])
    total[:, depth - count :].zero_()
