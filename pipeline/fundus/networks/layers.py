"""Building blocks of the fundus networks: convolutions, residual blocks, the last activation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError
from pipeline.training.any_size import AnySizeNetwork

__all__ = [
    "DoubleConv",
    "FinalActivation",
    "Norm",
    "ResidualConv",
    "VesselNetwork",
    "make_norm",
    "merge_conv",
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


class VesselNetwork(AnySizeNetwork):
    """A network for images of any size that gives logits, or probabilities.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result.
        divisor: what height and width must divide by inside the network.
        final_activation: `none` returns logits, which the losses expect; `sigmoid` is for export.

    Raises:
        ConfigurationError: another activation, or a number of channels that is not positive.
    """

    def __init__(
        self, in_channels: int, out_channels: int, divisor: int, final_activation: FinalActivation
    ) -> None:
        super().__init__(in_channels, out_channels, divisor)
        if final_activation not in ("none", "sigmoid"):
            raise ConfigurationError(
                f"final_activation must be 'none' or 'sigmoid', got {final_activation!r}"
            )
        self.final_activation = final_activation

    def activated(self, logits: Tensor) -> Tensor:
        """Return `logits`, or the probabilities that they stand for."""
        return torch.sigmoid(logits) if self.final_activation == "sigmoid" else logits
