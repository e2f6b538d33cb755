"""Networks that halve what they see, on images and volumes of any size.

What `forward` calls here is written for TorchScript too, which knows no `super()`, no generators
and no tuples of any length: a scripted network still pads and crops, and names what does not fit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["AnySizeNetwork", "check_shape", "cropped", "pad_to_multiple", "positive_widths"]


class AnySizeNetwork(nn.Module, ABC):
    """Run a network that needs multiples of `divisor` on images of any size.

    Sizes that do not divide are padded by reflection and the result is cropped back. Subclasses
    define `logits`, `activated` where logits are not the result, and name their parts where these
    are not called as a U-Net's are here.

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

    def activated(self, logits: Tensor) -> Tensor:
        """Return the result for `logits`, here these themselves."""
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """Return `(B, out_channels, H, W)` for `image`, `(B, in_channels, H, W)`, of any size.

        Raises:
            ConfigurationError: the shape does not suit the network.
        """
        check_shape(image, self.in_channels, axes=2)
        padded, before = pad_to_multiple(image, self.divisor)
        return self.activated(cropped(self.logits(padded), before, list(image.shape[2:])))


def check_shape(image: Tensor, channels: int, axes: int) -> None:
    """Check that an image `(B, channels, H, W)` or a volume `(B, channels, D, H, W)` is one.

    Args:
        image: what a network was given.
        channels: how many it expects.
        axes: 2 for images, 3 for volumes.

    Raises:
        ConfigurationError: another number of axes or channels.
    """
    if image.ndim != axes + 2 or image.shape[1] != channels:
        kind, sides = ("an image", "H, W") if axes == 2 else ("a volume", "D, H, W")
        raise ConfigurationError(
            f"the network expects (B, {channels}, {sides}), got {kind} of shape "
            f"{list(image.shape)}; set in_channels or the transforms to match"
        )


def pad_to_multiple(image: Tensor, divisor: int) -> tuple[Tensor, list[int]]:
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
    sizes = list(image.shape[2:])
    missing = [-size % divisor for size in sizes]
    before = [count // 2 for count in missing]
    if not any(missing):
        return image, before
    _check_reflection(sizes, missing, divisor)
    margins: list[int] = []  # the last axis first
    for count in missing[::-1]:
        margins += [count // 2, count - count // 2]
    return functional.pad(image, margins, mode="reflect"), before


def cropped(image: Tensor, before: list[int], sizes: list[int]) -> Tensor:
    """Return the part of `image` `(B, C, ...)` of the given `sizes` that begins at `before`."""
    for axis, size in enumerate(sizes, start=2):
        if image.shape[axis] != size:  # a part that is the whole would cost a copy in the backward
            image = image.narrow(axis, before[axis - 2], size)
    return image


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


def _check_reflection(sizes: list[int], missing: list[int], divisor: int) -> None:
    """Check that each side of the image can be mirrored as far as it must."""
    too_small = [count - count // 2 >= size for size, count in zip(sizes, missing, strict=True)]
    if any(too_small):
        kind, unit = ("image", "px") if len(sizes) == 2 else ("volume", "voxels")
        target = [size + count for size, count in zip(sizes, missing, strict=True)]
        raise ConfigurationError(
            f"{kind} of {_by(sizes)} {unit} is too small for a network that halves it to multiples "
            f"of {divisor}; pad it to {_by(target)} {unit} first, or use fewer levels"
        )


def _by(sizes: list[int]) -> str:
    return "x".join([str(size) for size in sizes])
