"""UTrans: a U-Net whose bottleneck attends over the whole picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.fundus.networks.attention import PixelTransformer
from pipeline.fundus.networks.layers import DoubleConv, FinalActivation, Norm
from pipeline.fundus.networks.unet import UNet

__all__ = ["UTrans"]


class UTrans(UNet):
    """Segment by a U-Net with transformer blocks and a double convolution below its bottleneck.

    The blocks work at the lowest resolution: 1,024 tokens for 512x512 px with the defaults, which
    have 100,300,993 parameters. Weights of a `UNet` of the same `depths` fit all other layers.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        depths: channels of each level; each further level halves the resolution.
        transformer_depth: number of transformer blocks.
        transformer_heads: heads of each block; divides the last of `depths`.
        transformer_mlp_ratio: hidden width of a block's perceptron in units of its channels.
        transformer_dropout: dropout probability inside the blocks.
        norm: normalisation layer, `batch`, `instance` or `group`.
        final_activation: `none` for logits, `sigmoid` for export.

    Attributes:
        divisor: 2 to the number of halvings; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        depths: Sequence[int] = (64, 128, 256, 512, 1024),
        transformer_depth: int = 4,
        transformer_heads: int = 8,
        transformer_mlp_ratio: float = 4.0,
        transformer_dropout: float = 0.1,
        norm: Norm = "batch",
        final_activation: FinalActivation = "none",
    ) -> None:
        super().__init__(in_channels, out_channels, depths, norm, final_activation)
        width = depths[-1]
        self.context = nn.Sequential(
            PixelTransformer(
                width,
                transformer_depth,
                transformer_heads,
                transformer_mlp_ratio,
                transformer_dropout,
            ),
            DoubleConv(width, width, norm),
        )
