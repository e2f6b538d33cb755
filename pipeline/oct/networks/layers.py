"""What the networks for B-scans share: size handling, and edges as a fixed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["AnySizeNetwork", "SobelMagnitude", "pad_to_multiple", "positive_widths"]


def positive_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Return the channels of each level as a tuple.

    Raises:
        ConfigurationError: fewer than two levels, or a width that is not a positive integer; `name`
            is the setting it speaks of.
    """
    if len(widths) < 2 or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ConfigurationError(
            f"{name} must be two or more positive widths, one per level, got {list(widths)!r}"
        )
    return tuple(widths)


def pad_to_multiple(image: Tensor, divisor: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad `image` by reflection until height and width are multiples of `divisor`.

    Args:
        image: `(B, C, H, W)`.
        divisor: what both sizes must divide by.

    Returns:
        The padded image, and how many rows and columns stand before the original ones; the
        padding is spread over both sides.

    Raises:
        ConfigurationError: the image is too small to be reflected that far.
    """
    height, width = image.shape[-2:]
    rows, columns = -height % divisor, -width % divisor
    if rows == 0 and columns == 0:
        return image, (0, 0)
    top, left = rows // 2, columns // 2
    bottom, right = rows - top, columns - left
    if bottom >= height or right >= width:
        raise ConfigurationError(
            f"B-scan of {height}x{width} px is too small for a network that halves it to multiples "
            f"of {divisor}; pad it to {height + rows}x{width + columns} px first, or use fewer "
            "levels"
        )
    return functional.pad(image, (left, right, top, bottom), mode="reflect"), (top, left)


class AnySizeNetwork(nn.Module):
    """Run a network that needs multiples of `divisor` on B-scans of any size.

    Sizes that do not divide are padded by reflection and the result is cropped back. Subclasses
    define `logits`.

    Args:
        in_channels: channels of the B-scan.
        out_channels: channels of the logits, one per class.
        divisor: what height and width must divide by inside the network.
    """

    encoder_prefixes: ClassVar[tuple[str, ...]] = ("encoder", "bottleneck")
    stem_prefixes: ClassVar[tuple[str, ...]] = ("encoder.0",)
    head_prefixes: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, in_channels: int, out_channels: int, divisor: int) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int) or channels < 1:
                raise ConfigurationError(
                    f"{name} must be an integer of at least 1, got {channels!r}"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.divisor = divisor

    def logits(self, image: Tensor) -> Tensor:
        """Return logits of an `image` whose height and width are multiples of `divisor`."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Return logits `(B, out_channels, H, W)` of `image`, `(B, in_channels, H, W)`.

        Raises:
            ConfigurationError: the shape does not suit the network.
        """
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ConfigurationError(
                f"{type(self).__name__} expects (B, {self.in_channels}, H, W), got a B-scan of "
                f"shape {tuple(image.shape)}; set in_channels or the transforms to match"
            )
        height, width = image.shape[-2:]
        padded, (top, left) = pad_to_multiple(image, self.divisor)
        return self.logits(padded)[..., top : top + height, left : left + width]


class SobelMagnitude(nn.Module):
    """Return the strength of edges `(B, 1, H, W)` in the mean of an image's channels.

    A ramp that climbs by 1 per pixel has an edge of 1. The kernels are no parameters and no part of
    the state dict. Beyond the border the image goes on as it ends, so that the border is no edge.
    """

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        kernels = torch.stack([across, across.T])[:, None]
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the edges of `image`, `(B, C, H, W)`."""
        mean = image.mean(dim=1, keepdim=True)
        padded = functional.pad(mean, (1, 1, 1, 1), mode="replicate")
        # Single precision: the square of a weak edge is 0 in half, and the root's slope infinite.
        slopes = functional.conv2d(padded, self.kernels.to(padded.dtype)).float()
        edges = (slopes.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
        return edges.to(image.dtype)
