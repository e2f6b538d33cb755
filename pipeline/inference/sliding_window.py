"""Sliding windows over images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from monai.inferers import Inferer, sliding_window_inference
from torch import Tensor

__all__ = ["SlidingWindow"]


class SlidingWindow(Inferer):
    """Run a network window by window and blend the overlaps.

    A window is never larger than the image: an image that fits into one window is run once, as it
    is, where MONAI's inferer would pad it to the window's size.

    Args:
        roi_size: largest window, in pixels or voxels per axis.
        overlap: share of a window that its neighbour covers, in [0, 1).
        weights: `gaussian` weights a window's middle more than its border, as MONAI's inferer does;
            `constant` does not.
        sw_batch_size: windows per forward pass.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.25,
        weights: Literal["gaussian", "constant"] = "gaussian",
        sw_batch_size: int = 1,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ValueError(
                f"overlap must be in [0, 1), got {overlap!r}; pass a fraction: 32 of 128 px is 0.25"
            )
        if weights not in ("gaussian", "constant"):
            raise ValueError(f"weights must be 'gaussian' or 'constant', got {weights!r}")
        self.roi_size = tuple(roi_size)
        self.overlap = overlap
        self.weights = weights
        self.sw_batch_size = sw_batch_size

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the blended output for `inputs` `(B, C, *spatial)`."""
        spatial = tuple(inputs.shape[2:])
        roi = tuple(min(r, s) for r, s in zip(self.roi_size, spatial, strict=True))
        output: Any
        if roi == spatial:
            output = network(inputs, *args, **kwargs)
        else:
            output = sliding_window_inference(
                inputs,
                roi,
                self.sw_batch_size,
                network,
                self.overlap,
                self.weights,
                *args,
                **kwargs,
            )
        blended: Tensor = output
        return blended
