"""TopologyAwareUNet3D: the plain 3-D U-Net of the reference recipe."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.vesuvius.networks.layers import ConvNorm, SkipNetwork

__all__ = ["TopologyAwareUNet3D"]


class TopologyAwareUNet3D(SkipNetwork):
    """Segment by double convolutions of 3x3x3, max pooling and transposed convolutions.

    The defaults have 22,575,329 parameters and multiply 14 times as often as those of
    `SmallUNet3D`: a network for a GPU. Instance normalisation, here without weights of its own,
    cannot train on a single voxel: the lowest level must hold two at least, as it does where one
    side of a patch is longer than `divisor`.

    Args:
        in_channels: channels of the volume.
        out_channels: channels of the logits.
        initial_filters: channels at full size; each level below has twice as many.
        depth: number of halvings.
        deep_supervision: how many levels below the full size give logits too, in training.

    Attributes:
        divisor: 2 to the power of `depth`; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        initial_filters: int = 32,
        depth: int = 4,
        deep_supervision: int = 0,
    ) -> None:
        for name, value in (("initial_filters", initial_filters), ("depth", depth)):
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be an integer of at least 1, got {value!r}")
        widths = [initial_filters * 2**level for level in range(depth + 1)]
        below = (
            nn.Sequential(nn.MaxPool3d(2), _double_conv(before, after))
            for before, after in pairwise(widths)
        )
        super().__init__(
            in_channels,
            out_channels,
            widths,
            encoder=[_double_conv(in_channels, widths[0]), *below],
            decoder=[_double_conv(2 * width, width) for width in widths[-2::-1]],
            deep_supervision=deep_supervision,
        )


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNorm(in_channels, out_channels, affine=False, bias=True),
        ConvNorm(out_channels, out_channels, affine=False, bias=True),
    )
