"""TransRoiNet: a RoiNet that attends over the whole picture at a quarter of the resolution."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.fundus.networks.attention import PixelTransformer
from pipeline.fundus.networks.layers import FinalActivation, Norm
from pipeline.fundus.networks.roinet import RoiNet

__all__ = ["TransRoiNet"]


class TransRoiNet(RoiNet):
    """Segment by a RoiNet with transformer blocks between its two bottleneck convolutions.

    The blocks see 16,384 tokens for 512x512 px and 65,536 for 1024x1024 px, whose attention costs
    16 times as much: tile large images. The defaults have 32,297,536 parameters. Weights of a
    `RoiNet` of the same `depths` fit all other layers.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        depths: widths of the six residual blocks `conv0` to `conv5`; the fourth and fifth are even.
        kernel_size: odd size of the residual kernels.
        transformer_depth: number of transformer blocks.
        transformer_heads: heads of each block; divides twice the third of `depths`.
        transformer_mlp_ratio: hidden width of a block's perceptron in units of its channels.
        transformer_dropout: dropout probability inside the blocks.
        norm: normalisation layer, `batch`, `instance` or `group`.
        final_activation: `none` for logits, `sigmoid` for export.

    Attributes:
        divisor: 4; other sizes are padded and cropped.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        depths: Sequence[int] = (32, 64, 128, 128, 64, 32),
        kernel_size: int = 9,
        transformer_depth: int = 2,
        transformer_heads: int = 8,
        transformer_mlp_ratio: float = 4.0,
        transformer_dropout: float = 0.1,
        norm: Norm = "batch",
        final_activation: FinalActivation = "none",
    ) -> None:
        super().__init__(in_channels, out_channels, depths, kernel_size, norm, final_activation)
        self.context = PixelTransformer(
            2 * depths[2],
            transformer_depth,
            transformer_heads,
            transformer_mlp_ratio,
            transformer_dropout,
        )
