"""Building blocks of the fundus networks: convolutions, residual blocks, size handling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = [
    "AnySizeNetwork",
    "DoubleConv",
    "FinalActivation",
    "Norm",
    "ResidualConv",
    "check_depths",
    "make_norm",
    "merge_conv",
    "pad_to_multiple",
]

Norm = Literal["batch", "instance", "group"]
FinalActivation = Literal["none", "sigmoid"]
GROUPS = 8


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation layer called `norm` for `channels` channels.

    `instance` and `group` have the parameters of `batch` and no running statistics: for
    micro-batches of one or two, where batch statistics are noise.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if norm == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    raise ConfigurationError(f"norm must be 'batch', 'instance' or 'group', got {norm!r}")


def check_depths(depths: Sequence[int], expected: str, *, valid: bool) -> tuple[int, ...]:
    """Return `depths` as a tuple of widths.

    Args:
        depths: channels of each level.
        expected: what the network wants, for the message.
        valid: whether the number of levels suits the network.

    Raises:
        ConfigurationError: the number of levels is wrong or a width is not a positive integer.
    """
    widths_are_positive = all(isinstance(width, int) and width > 0 for width in depths)
    if not (valid and widths_are_positive):
        raise ConfigurationError(f"depths must be {expected}, got {list(depths)!r}")
    return tuple(depths)


class DoubleConv(nn.Sequential):
    """Convolve twice by 3x3 without bias, each followed by normalisation and ReLU.

    Args:
        in_channels: channels of the input `(B, C, H, W)`.
        out_channels: channels of the output, same height and width.
        norm: normalisation layer.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "batch") -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            make_norm(norm, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            make_norm(norm, out_channels),
            nn.ReLU(inplace=True),
        )


class ResidualConv(nn.Module):
    """Add two `kernel_size` convolutions to a shortcut, then apply ReLU.

    The shortcut is the identity, or a normalised 1x1 convolution where the width changes.

    Args:
        in_channels: channels of the input `(B, C, H, W)`.
        out_channels: channels of the output, same height and width.
        kernel_size: odd size of both kernels.
        norm: normalisation layer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigurationError(f"kernel_size must be odd and positive, got {kernel_size!r}")
        padding = kernel_size // 2
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False),
            make_norm(norm, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size, padding=padding, bias=False),
            make_norm(norm, out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), make_norm(norm, out_channels)
            )

    def forward(self, image: Tensor) -> Tensor:
        """Return features `(B, out_channels, H, W)` of `image`."""
        return functional.relu(self.body(image) + self.shortcut(image))


def merge_conv(in_channels: int, out_channels: int, norm: Norm = "batch") -> nn.Sequential:
    """Return the 3x3 convolution, normalisation and ReLU that join a skip to its decoder level."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        make_norm(norm, out_channels),
        nn.ReLU(inplace=True),
    )


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
            f"image of {height}x{width} px is too small for a network that halves it to multiples "
            f"of {divisor}; pad it to {height + rows}x{width + columns} px first, or use fewer "
            "levels"
        )
    return functional.pad(image, (left, right, top, bottom), mode="reflect"), (top, left)


class AnySizeNetwork(nn.Module):
    """Run a network that needs multiples of `divisor` on an image of any size.

    Subclasses set `divisor` and define `logits`. Sizes that do not divide are padded by reflection
    and the result is cropped back, so `(B, C, H, W)` always gives `(B, out_channels, H, W)`.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result.
        divisor: what height and width must divide by inside the network.
        final_activation: `none` returns logits, which the losses expect; `sigmoid` is for export.
    """

    encoder_prefixes: ClassVar[tuple[str, ...]] = ()
    stem_prefixes: ClassVar[tuple[str, ...]] = ()
    head_prefixes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, in_channels: int, out_channels: int, divisor: int, final_activation: FinalActivation
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {channels!r}")
        if final_activation not in ("none", "sigmoid"):
            raise ConfigurationError(
                f"final_activation must be 'none' or 'sigmoid', got {final_activation!r}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.divisor = divisor
        self.final_activation = final_activation

    def logits(self, image: Tensor) -> Tensor:
        """Return logits of an `image` whose height and width are multiples of `divisor`."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Return `(B, out_channels, H, W)` for `image`, `(B, in_channels, H, W)`, of any size."""
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ConfigurationError(
                f"{type(self).__name__} expects (B, {self.in_channels}, H, W), got an image of "
                f"shape {tuple(image.shape)}; set in_channels or the channel transform to match"
            )
        height, width = image.shape[-2:]
        padded, (top, left) = pad_to_multiple(image, self.divisor)
        result = self.logits(padded)[..., top : top + height, left : left + width]
        return torch.sigmoid(result) if self.final_activation == "sigmoid" else result
