"""Networks that halve what they see, on images and volumes of any size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["AnySizeNetwork", "cropped", "pad_to_multiple", "positive_widths"]


class AnySizeNetwork(nn.Module, ABC):
    """Run a network that needs multiples of `divisor` on images of any size.

    Sizes that do not divide are padded by reflection and the result is cropped back. Subclasses
    define `logits`, and name their parts where these are not called as a U-Net's are here.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits.
        divisor: what height and width must divide by inside the network.

    Raises:
        ConfigurationError: a number of channels is not a positive integer.
    """

    encoder_prefixes: ClassVar[tuple[str, ...]] = ("encoder", "bottleneck")
    stem_prefixes: ClassVar[tuple[str, ...]] = ("encoder.0",)
    head_prefixes: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, in_channels: int, out_channels: int, divisor: int) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int) or channels < 1:
                raise ConfigurationError(
                    f"{name} must be an integer of at least 1, got {channels!r}"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.divisor = divisor

    @abstractmethod
    def logits(self, image: Tensor) -> Tensor:
        """Return logits of an `image` whose height and width are multiples of `divisor`."""

    def forward(self, image: Tensor) -> Tensor:
        """Return logits `(B, out_channels, H, W)` of `image`, `(B, in_channels, H, W)`.

        Raises:
            ConfigurationError: the shape does not suit the network.
        """
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ConfigurationError(
                f"{type(self).__name__} expects (B, {self.in_channels}, H, W), got an image of "
                f"shape {tuple(image.shape)}; set in_channels or the transforms to match"
            )
        padded, before = pad_to_multiple(image, self.divisor)
        return cropped(self.logits(padded), before, image.shape[2:])


def pad_to_multiple(image: Tensor, divisor: int) -> tuple[Tensor, tuple[int, ...]]:
    """Pad an image or a volume by reflection until its sizes are multiples of `divisor`.

    Args:
        image: `(B, C, H, W)` or `(B, C, D, H, W)`.
        divisor: what all sizes must divide by.

    Returns:
        The padded image, the given one where nothing is missing, and how many pixels of each axis
        stand before the original ones; the padding is spread over both sides.

    Raises:
        ConfigurationError: the image is too small to be reflected that far.
    """
    sizes = tuple(image.shape[2:])
    missing = tuple(-size % divisor for size in sizes)
    if all(count == 0 for count in missing):
        return image, (0,) * len(sizes)
    before = tuple(count // 2 for count in missing)
    after = tuple(count - first for count, first in zip(missing, before, strict=True))
    if any(count >= size for count, size in zip(after, sizes, strict=True)):
        kind, unit = ("image", "px") if len(sizes) == 2 else ("volume", "voxels")
        target = "x".join(str(size + count) for size, count in zip(sizes, missing, strict=True))
        raise ConfigurationError(
            f"{kind} of {'x'.join(map(str, sizes))} {unit} is too small for a network that halves "
            f"it to multiples of {divisor}; pad it to {target} {unit} first, or use fewer levels"
        )
    margins = [count for pair in zip(before[::-1], after[::-1], strict=True) for count in pair]
    return functional.pad(image, margins, mode="reflect"), before


def cropped(image: Tensor, before: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return the part of `image` `(B, C, ...)` of the given `sizes` that begins at `before`."""
    slices = (slice(start, start + size) for start, size in zip(before, sizes, strict=True))
    box: tuple[Any, ...] = (..., *slices)
    return image[box]


def positive_widths(name: str, widths: Sequence[int], levels: int | None = None) -> tuple[int, ...]:
    """Return the channels of each level as a tuple.

    Args:
        name: the setting that an error speaks of.
        widths: channels of each level.
        levels: how many there must be; None: two or more.

    Raises:
        ConfigurationError: another number of levels, or a width that is not a positive integer.
    """
    right_number = len(widths) == levels if levels is not None else len(widths) >= 2
    if not right_number or not all(isinstance(width, int) and width > 0 for width in widths):
        number = "two or more" if levels is None else levels
        raise ConfigurationError(
            f"{name} must be {number} positive widths, one per level, got {list(widths)!r}"
        )
    return tuple(widths)
