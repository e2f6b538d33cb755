"""SmallUNet: the default, light enough to train and run on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.training.any_size import AnySizeNetwork, positive_widths

__all__ = ["SmallUNet"]


class SmallUNet(AnySizeNetwork):
    """Segment by an encoder and a decoder of few channels, joined by skips at every level.

    The decoder repeats pixels to go up a level, without weights. The defaults have 124,195
    parameters.

    Args:
        in_channels: channels of the B-scan.
        out_channels: channels of the logits, one per class.
        widths: channels of each level; each further level halves height and width.

    Attributes:
        divisor: 2 to the number of halvings; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        widths: Sequence[int] = (8, 16, 24, 32, 48),
    ) -> None:
        levels = positive_widths("widths", widths)
        super().__init__(in_channels, out_channels, 2 ** (len(levels) - 1))
        *down, lowest = (_double_conv(*pair) for pair in pairwise((in_channels, *levels)))
        self.encoder = nn.ModuleList(down)
        self.bottleneck = lowest
        self.decoder = nn.ModuleList(
            _double_conv(below + width, width) for below, width in pairwise(levels[::-1])
        )
        self.head = nn.Conv2d(levels[0], out_channels, 1)

    def logits(self, image: Tensor) -> Tensor:
        """Return logits `(B, out_channels, H, W)`; H and W are multiples of `divisor`."""
        skips: list[Tensor] = []
        features = image
        for level in self.encoder:
            features = level(features)
            skips.append(features)
            features = functional.max_pool2d(features, 2)
        features = self.bottleneck(features)
        for level in self.decoder:
            above = functional.interpolate(features, scale_factor=2.0, mode="nearest")
            features = level(torch.cat([above, skips.pop()], dim=1))
        result: Tensor = self.head(features)
        return result


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
