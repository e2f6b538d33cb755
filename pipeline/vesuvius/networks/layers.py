"""What the networks for volumes share: convolutions, and levels joined by skips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.training.any_size import check_shape, cropped, pad_to_multiple

__all__ = ["ConvNorm", "Norm", "SkipNetwork"]

Norm = Literal["instance", "group"]
GROUPS = 8


class ConvNorm(nn.Sequential):
    """Convolve, normalise, and apply LeakyReLU with a slope of 0.01.

    Neither normalisation mixes the samples of a batch: volumes come one or two at a time.

    Args:
        in_channels: channels of the input `(B, C, D, H, W)`.
        out_channels: channels of the output.
        norm: normalisation layer, `instance` or `group`.
        stride: 1 convolves by 3x3x3 and keeps the size; 2 convolves by 2x2x2 and halves it.
        affine: whether the normalisation has weights of its own.
        bias: whether the convolution has one, which the normalisation takes away again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Norm = "instance",
        stride: Literal[1, 2] = 1,
        affine: bool = True,
        bias: bool = False,
    ) -> None:
        if norm not in ("instance", "group"):
            raise ConfigurationError(f"norm must be 'instance' or 'group', got {norm!r}")
        kernel_size, padding = (3, 1) if stride == 1 else (2, 0)
        normalise: nn.Module = (
            nn.InstanceNorm3d(out_channels, affine=affine)
            if norm == "instance"
            else nn.GroupNorm(math.gcd(GROUPS, out_channels), out_channels, affine=affine)
        )
        super().__init__(
            nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=bias),
            normalise,
            nn.LeakyReLU(0.01, inplace=True),
        )


class SkipNetwork(nn.Module):
    """Run an encoder and a decoder that skips join at every level, on a volume of any size.

    Sizes that do not divide are padded by reflection and the result is cropped back. Subclasses
    give the blocks; an encoder block below the first one halves the size, and a decoder block gets
    the upsampled features and the skip, joined along the channels.

    Args:
        in_channels: channels of the volume.
        out_channels: channels of the logits.
        widths: channels of each level, the full size first.
        encoder: a block per level, the full size first.
        decoder: a block per level but the lowest, the full size last; from twice a level's channels
            to its channels.
        deep_supervision: how many levels below the full size give logits too, in training.

    Attributes:
        divisor: 2 to the number of halvings; other sizes are padded and cropped.
    """

    encoder_prefixes: ClassVar[tuple[str, ...]] = ("encoder",)
    stem_prefixes: ClassVar[tuple[str, ...]] = ("encoder.0",)
    head_prefixes: ClassVar[tuple[str, ...]] = ("heads",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        encoder: Iterable[nn.Module],
        decoder: Iterable[nn.Module],
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if out_channels < 1:
            raise ConfigurationError(f"out_channels must be at least 1, got {out_channels!r}")
        if not 0 <= deep_supervision < len(widths) - 1:
            raise ConfigurationError(
                f"deep_supervision must be a number of decoder levels from 0 to {len(widths) - 2}, "
                f"got {deep_supervision!r}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.divisor = 2 ** (len(widths) - 1)
        self.encoder = nn.ModuleList(encoder)
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(below, width, 2, stride=2)
            for below, width in pairwise(reversed(widths))
        )
        self.decoder = nn.ModuleList(decoder)
        self.heads = nn.ModuleList(  # the full size first
            nn.Conv3d(width, out_channels, 1) for width in widths[: deep_supervision + 1]
        )

    def forward(self, volume: Tensor) -> Tensor | list[Tensor]:
        """Return logits of `volume`.

        Args:
            volume: `(B, in_channels, D, H, W)` of any size; in training with deep supervision, the
                sizes are multiples of `divisor`.

        Returns:
            `(B, out_channels, D, H, W)`. In training with deep supervision a list of it and of the
            logits at a half, a quarter and so on of its size.

        Raises:
            ConfigurationError: the shape does not suit the network.
        """
        check_shape(volume, self.in_channels, axes=3)
        padded, before = pad_to_multiple(volume, self.divisor)
        levels = self._levels(padded)
        if len(levels) == 1:
            return cropped(levels[0], before, list(volume.shape[2:]))
        if padded is not volume:
            raise ConfigurationError(
                f"deep supervision needs patches whose sizes are multiples of {self.divisor}, "
                f"got {'x'.join([str(size) for size in volume.shape[2:]])}; set patch_size"
            )
        return levels

    def _levels(self, volume: Tensor) -> list[Tensor]:
        """Return logits of every supervised level, the full size first; sizes must divide."""
        skips: list[Tensor] = []
        features = volume
        for block in self.encoder:
            features = block(features)
            skips.append(features)
        features = skips.pop()
        supervised = len(self.heads) if self.training else 1
        decoded: list[Tensor] = []
        for up, block in zip(self.up, self.decoder, strict=True):
            features = block(torch.cat([up(features), skips.pop()], dim=1))
            decoded.append(features)
            decoded = decoded[-supervised:]  # the others are no longer held
        levels: list[Tensor] = []
        for below, head in enumerate(self.heads):
            if below < supervised:
                levels.append(head(decoded[-1 - below]))
        return levels
