"""U-Net: the baseline of vessel segmentation, and the small default."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.fundus.networks.layers import DoubleConv, FinalActivation, Norm, VesselNetwork
from pipeline.training.any_size import positive_widths

__all__ = ["UNet"]


class UNet(VesselNetwork):
    """Segment by an encoder and a decoder joined by skips at every level.

    The defaults have 7,763,041 parameters; `depths=[16, 32, 64, 128]` has 482,737.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        depths: channels of each level; each further level halves the resolution.
        norm: normalisation layer, `batch`, `instance` or `group`.
        final_activation: `none` for logits, `sigmoid` for export.

    Attributes:
        divisor: 2 to the number of halvings; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        depths: Sequence[int] = (32, 64, 128, 256, 512),
        norm: Norm = "batch",
        final_activation: FinalActivation = "none",
    ) -> None:
        widths = positive_widths("depths", depths)
        super().__init__(in_channels, out_channels, 2 ** (len(widths) - 1), final_activation)
        self.encoder = nn.ModuleList(
            DoubleConv(before, after, norm) for before, after in pairwise((in_channels, *widths))
        )
        self.bottleneck = self.encoder.pop(-1)
        self.context: nn.Module = nn.Identity()  # where a hybrid puts its transformer
        upward = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, width, 2, stride=2) for below, width in upward
        )
        self.decoder = nn.ModuleList(DoubleConv(2 * width, width, norm) for _, width in upward)
        self.head = nn.Conv2d(widths[0], out_channels, 1)

    def logits(self, image: Tensor) -> Tensor:
        """Return logits `(B, out_channels, H, W)`; H and W are multiples of `divisor`."""
        skips: list[Tensor] = []
        features = image
        for level in self.encoder:
            features = level(features)
            skips.append(features)
            features = functional.max_pool2d(features, 2)
        features = self.context(self.bottleneck(features))
        for up, level in zip(self.up, self.decoder, strict=True):
            features = level(torch.cat([up(features), skips.pop()], dim=1))
        result: Tensor = self.head(features)
        return result
