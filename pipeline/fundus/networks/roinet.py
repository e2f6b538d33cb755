"""RoiNet: two halvings, wide kernels and residual blocks for thin vessels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.fundus.networks.layers import (
    FinalActivation,
    Norm,
    ResidualConv,
    VesselNetwork,
    merge_conv,
)
from pipeline.training.any_size import positive_widths

__all__ = ["RoiNet"]


class RoiNet(VesselNetwork):
    """Segment at a quarter of the resolution at least, with large residual convolutions.

    The defaults have 30,718,016 parameters and cost about 18 times the multiplications of the
    default `UNet`: a network for a GPU. A 3x3 kernel brings them down to 4,685,120.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        depths: widths of the six residual blocks `conv0` to `conv5`; the fourth and fifth are even.
        kernel_size: odd size of the residual kernels.
        norm: normalisation layer, `batch`, `instance` or `group`.
        final_activation: `none` for logits, `sigmoid` for export.

    Attributes:
        divisor: 4; other sizes are padded and cropped.
    """

    encoder_prefixes: ClassVar[tuple[str, ...]] = (
        "conv0",
        "conv1",
        "pool1",
        "conv2",
        "pool2",
        "bottle1",
    )
    stem_prefixes: ClassVar[tuple[str, ...]] = ("conv0",)
    head_prefixes: ClassVar[tuple[str, ...]] = ("final",)

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        depths: Sequence[int] = (32, 64, 128, 128, 64, 32),
        kernel_size: int = 9,
        norm: Norm = "batch",
        final_activation: FinalActivation = "none",
    ) -> None:
        widths = positive_widths("depths", depths, levels=6)
        if widths[3] % 2 or widths[4] % 2:
            raise ConfigurationError(
                f"depths must be even in the fourth and fifth place, got {list(widths)!r}"
            )
        super().__init__(in_channels, out_channels, 4, final_activation)
        d0, d1, d2, d3, d4, d5 = widths
        half, quarter = 2 * d1, 2 * d2  # widths after the first and second halving

        def residual(before: int, after: int) -> ResidualConv:
            return ResidualConv(before, after, kernel_size, norm)

        self.conv0 = residual(in_channels, d0)
        self.conv1 = residual(d0, d1)
        self.pool1 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(d1, half, 1))
        self.conv2 = residual(half, d2)
        self.pool2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(d2, quarter, 1))
        self.bottle1 = residual(quarter, quarter)
        self.context: nn.Module = nn.Identity()  # where the hybrid puts its transformer
        self.bottle2 = residual(quarter, quarter)
        self.merge2 = merge_conv(2 * quarter, quarter, norm)
        self.conv3 = residual(quarter, d3)
        self.up3 = nn.ConvTranspose2d(d3, d3 // 2, 2, stride=2)
        self.merge3 = merge_conv(d3 // 2 + half, d1, norm)
        self.conv4 = residual(d1, d4)
        self.up4 = nn.ConvTranspose2d(d4, d4 // 2, 2, stride=2)
        self.merge4 = merge_conv(d4 // 2 + d0, d0, norm)
        self.conv5 = residual(d0, d5)
        self.final = nn.Conv2d(d5, out_channels, 1, bias=False)

    def logits(self, image: Tensor) -> Tensor:
        """Return logits `(B, out_channels, H, W)`; H and W are multiples of 4."""
        skip0 = self.conv0(image)
        skip1 = self.pool1(self.conv1(skip0))
        skip2 = self.pool2(self.conv2(skip1))
        features = self.bottle2(self.context(self.bottle1(skip2)))
        features = self.merge2(torch.cat([features, skip2], dim=1))
        features = self.merge3(torch.cat([self.up3(self.conv3(features)), skip1], dim=1))
        features = self.merge4(torch.cat([self.up4(self.conv4(features)), skip0], dim=1))
        result: Tensor = self.final(self.conv5(features))
        return result
