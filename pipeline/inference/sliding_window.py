"""Sliding windows over images of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from monai.inferers import Inferer, sliding_window_inference
from torch import Tensor

from pipeline.errors import ConfigurationError

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
            raise ConfigurationError(
                f"overlap must be in [0, 1), got {overlap!r}; pass a fraction: 32 of 128 px is 0.25"
            )
        if weights not in ("gaussian", "constant"):
            raise ConfigurationError(f"weights must be gaussian or constant, got {weights!r}")
        if min(roi_size, default=0) < 1:
            raise ConfigurationError(f"roi_size must be positive, got {list(roi_size)}")
        if sw_batch_size < 1:
            raise ConfigurationError(f"sw_batch_size must be at least 1, got {sw_batch_size!r}")
        self.roi_size = tuple(roi_size)
        self.overlap = overlap
        self.weights = weights
        self.sw_batch_size = sw_batch_size

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the blended output for `inputs` `(B, C, *spatial)`.

        Further arguments go to the network, with every window.
        """
        spatial = tuple(inputs.shape[2:])
        if len(spatial) != len(self.roi_size):
            raise ConfigurationError(
                f"roi_size {list(self.roi_size)} has {len(self.roi_size)} axes, the image "
                f"{list(spatial)} has {len(spatial)}; give one size per axis"
            )
        roi = tuple(min(r, s) for r, s in zip(self.roi_size, spatial, strict=True))
        output: Any
        if roi == spatial:
            output = network(inputs, *args, **kwargs)
        else:
            output = sliding_window_inference(
                inputs,
                roi,
                self.sw_batch_size,
                # Bound here: behind `weights` MONAI's function has settings of its own.
                partial(_call, network, args, kwargs),
                self.overlap,
                self.weights,
            )
        blended: Tensor = output
        return blended


def _call(
    network: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], window: Tensor
) -> Any:
    output = network(window, *args, **kwargs)
    # MONAI weights what it gets in place, and the window is a view of the image: a network that
    # passes its input on would have the image weighted too.
    if isinstance(output, Tensor) and _storage(output) == _storage(window):
        return output.clone()
    return output


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
