"""SmallUNet3D: the default, light enough to train and run on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pipeline.training.any_size import positive_widths
from pipeline.vesuvius.networks.layers import ConvNorm, Norm, SkipNetwork

__all__ = ["SmallUNet3D"]


class SmallUNet3D(SkipNetwork):
    """Segment with two convolutions at full size and the others below.

    Time on a CPU goes into the full size. With few channels and one convolution on each side there,
    this network takes less than half the time of a plain U-Net of half its parameters. The defaults
    have 659,857 parameters.

    Args:
        in_channels: channels of the volume.
        out_channels: channels of the logits.
        widths: channels of each level; each further level halves the size by a convolution.
        norm: normalisation layer, `group` or `instance`.
        deep_supervision: how many levels below the full size give logits too, in training.

    Attributes:
        divisor: 2 to the number of halvings; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Sequence[int] = (8, 24, 48, 96),
        norm: Norm = "group",
        deep_supervision: int = 0,
    ) -> None:
        widths = positive_widths("widths", widths)
        below = (
            nn.Sequential(ConvNorm(before, after, norm, stride=2), ConvNorm(after, after, norm))
            for before, after in pairwise(widths)
        )
        super().__init__(
            in_channels,
            out_channels,
            widths,
            encoder=[ConvNorm(in_channels, widths[0], norm), *below],
            decoder=[
                *(
                    nn.Sequential(ConvNorm(2 * width, width, norm), ConvNorm(width, width, norm))
                    for width in widths[-2:0:-1]
                ),
                ConvNorm(2 * widths[0], widths[0], norm),
            ],
            deep_supervision=deep_supervision,
        )
