"""A residual network of a third of a million parameters, for small sets and plain processors."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from pipeline.classification.networks.layers import ClassifierHead, Norm, check_sizes, make_norm

__all__ = ["SmallResNet"]

WIDTHS = (16, 32, 64, 128)


class SmallResNet(nn.Module):
    """Classify by a 5x5 convolution, max-pooling and four residual blocks of growing width.

    The image is halved five times. With three channels and one logit it has 308,433 parameters.

    Args:
        num_classes: logits; 1 for two classes told by one logit.
        in_channels: channels of the image.
        dropout: probability with which a feature before the last layer is dropped in training.
        norm: `group` or `batch`.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    encoder_prefixes: ClassVar[tuple[str, ...]] = ("stem", "blocks")
    stem_prefixes: ClassVar[tuple[str, ...]] = ("stem",)
    head_prefixes: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(
        self, num_classes: int = 1, in_channels: int = 3, dropout: float = 0.0, norm: Norm = "group"
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        first = WIDTHS[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, first, 5, stride=2, padding=2, bias=False),
            make_norm(norm, first),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(
            *(ResidualBlock(*widths, norm) for widths in pairwise((first, *WIDTHS)))
        )
        self.head = ClassifierHead(WIDTHS[-1], num_classes, dropout)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of an image `(B, in_channels, H, W)`, 32 px or more."""
        features = self.blocks(self.stem(image))
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions to a shortcut, then apply ReLU.

    Where the width changes, the image is halved and the shortcut is a normalised 1x1 convolution.

    Args:
        in_channels: channels of the input `(B, C, H, W)`.
        out_channels: channels of the output.
        norm: normalisation layer.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        stride = 1 if in_channels == out_channels else 2
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            make_norm(norm, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            make_norm(norm, out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False),
                make_norm(norm, out_channels),
            )

    def forward(self, image: Tensor) -> Tensor:
        """Return features `(B, out_channels, H, W)`, or half that height and width."""
        return functional.relu(self.body(image) + self.shortcut(image))
