"""HybridAttentionUNet: a U-Net whose skips are gated by edges above and by position below."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError
from pipeline.oct.networks.sobel import SobelMagnitude
from pipeline.training.any_size import AnySizeNetwork

__all__ = ["AttentionGate", "EdgeGate", "HybridAttentionUNet", "SpatialGate"]

LEVELS = 5
EDGE_LEVELS = 2  # the two skips of the highest resolution


class AttentionGate(nn.Module):
    """Weigh the pixels of a skip by what the level below has seen.

    Args:
        channels: of the skip.
        below: channels of the level below.
        inner: channels in which both are compared.
    """

    def __init__(self, channels: int, below: int, inner: int) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(below, inner, 1), nn.BatchNorm2d(inner))
        self.skip = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.weight = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1))

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return `skip` `(B, C, H, W)` times weights between 0 and 1, `(B, 1, H, W)`."""
        context = functional.interpolate(self.below(below), skip.shape[-2:], mode="bilinear")
        weight: Tensor = self.weight(functional.relu(context + self.skip(skip)))
        return skip * torch.sigmoid(weight)


class EdgeGate(nn.Module):
    """Join a gated skip and its edges.

    Args:
        channels: of the skip.
        below: channels of the level below.
    """

    def __init__(self, channels: int, below: int) -> None:
        super().__init__()
        self.gate = AttentionGate(channels, below, channels)
        self.edges = SobelMagnitude()
        self.join = nn.Sequential(
            nn.Conv2d(channels + 1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return `(B, C, H, W)`, the size of `skip`."""
        joined: Tensor = self.join(torch.cat([self.gate(skip, below), self.edges(skip)], dim=1))
        return joined


class SpatialGate(nn.Module):
    """Add two convolutions of a gated skip to the skip.

    Args:
        channels: of the skip.
        below: channels of the level below.
    """

    def __init__(self, channels: int, below: int) -> None:
        super().__init__()
        self.gate = AttentionGate(channels, below, channels // 2)
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return `(B, C, H, W)`, the size of `skip`."""
        refined: Tensor = self.refine(self.gate(skip, below))
        return skip + refined


class HybridAttentionUNet(AnySizeNetwork):
    """Segment by five levels of double convolutions, the two upper skips gated by edges.

    After Karn and Abdulla (2024), Bioengineering 11(3):240, with Sobel's edges in place of Canny's:
    these export, compile and pass gradients. 37,688,975 parameters with `base_channels=64`,
    9,429,839 with 32.

    Args:
        in_channels: channels of the B-scan.
        out_channels: channels of the logits, one per class.
        base_channels: channels at full size; each level below has twice as many.

    Attributes:
        divisor: 16; other sizes are padded and cropped.
    """

    def __init__(
        self, in_channels: int = 1, out_channels: int = 3, base_channels: int = 64
    ) -> None:
        super().__init__(in_channels, out_channels, 2 ** (LEVELS - 1))
        if not isinstance(base_channels, int) or base_channels < 1:
            raise ConfigurationError(
                f"base_channels must be an integer of at least 1, got {base_channels!r}"
            )
        widths = [base_channels * 2**level for level in range(LEVELS)]
        pairs = list(pairwise(widths))
        *down, lowest = (_double_conv(*pair) for pair in pairwise((in_channels, *widths)))
        self.encoder = nn.ModuleList(down)
        self.bottleneck = lowest
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, width, 2, stride=2) for width, below in pairs[::-1]
        )
        self.gates = nn.ModuleList(
            (EdgeGate if level < EDGE_LEVELS else SpatialGate)(*pairs[level])
            for level in range(LEVELS - 2, -1, -1)
        )
        self.decoder = nn.ModuleList(_double_conv(2 * width, width) for width in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], out_channels, 1)
        self.apply(_initialise)

    def logits(self, image: Tensor) -> Tensor:
        """Return logits `(B, out_channels, H, W)`; H and W are multiples of `divisor`."""
        skips: list[Tensor] = []
        features = image
        for level in self.encoder:
            features = level(features)
            skips.append(features)
            features = functional.max_pool2d(features, 2)
        features = self.bottleneck(features)
        for up, gate, level in zip(self.up, self.gates, self.decoder, strict=True):
            features = level(torch.cat([up(features), gate(skips.pop(), features)], dim=1))
        result: Tensor = self.head(features)
        return result


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _initialise(module: nn.Module) -> None:
    """Draw a convolution's weights as He et al. (2015) do for ReLU; batch norm is 1 and 0 as is."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
