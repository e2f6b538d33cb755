"""ResidualEncoderUNet: a deep encoder of residual blocks and a light decoder."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.training.any_size import positive_widths
from pipeline.vesuvius.networks.layers import ConvNorm, SkipNetwork

__all__ = ["ResidualEncoderUNet"]

NORM = ("instance", {"affine": True})


class ResidualEncoderUNet(SkipNetwork):
    """Segment as nnU-Net's residual encoder presets do: most of the depth lies in the encoder.

    Isensee et al. (2024), arXiv 2404.09556. The blocks are MONAI's; where a block halves the size,
    its shortcut is a 1x1x1 convolution with a stride, not pooling. The defaults have the widths and
    depths of the preset M and 102,410,561 parameters: a network for a GPU.

    Args:
        in_channels: channels of the volume.
        out_channels: channels of the logits.
        widths: channels of each level; each further level halves the size.
        blocks: residual blocks of each level of the encoder.
        deep_supervision: how many levels below the full size give logits too, in training.

    Attributes:
        divisor: 2 to the number of halvings; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Sequence[int] = (32, 64, 128, 256, 320, 320),
        blocks: Sequence[int] = (1, 3, 4, 6, 6, 6),
        deep_supervision: int = 0,
    ) -> None:
        widths = positive_widths("widths", widths)
        if len(blocks) != len(widths) or not all(
            isinstance(count, int) and count > 0 for count in blocks
        ):
            raise ConfigurationError(
                f"blocks must be {len(widths)} positive numbers, one per level of widths, "
                f"got {list(blocks)!r}"
            )
        before = (in_channels, *widths[:-1])
        super().__init__(
            in_channels,
            out_channels,
            widths,
            encoder=[
                _residual_stage(*level, stride=2 if index else 1)
                for index, level in enumerate(zip(before, widths, blocks, strict=True))
            ],
            decoder=[ConvNorm(2 * width, width) for width in widths[-2::-1]],
            deep_supervision=deep_supervision,
        )


def _residual_stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Return `blocks` residual blocks, of which the first one has the `stride`."""
    first = UnetResBlock(3, in_channels, out_channels, 3, stride, NORM)
    others = (UnetResBlock(3, out_channels, out_channels, 3, 1, NORM) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
