"""The sizes an image is seen at: checked, and made from one base image where they are needed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["checked_scale", "checked_scales", "resize"]


def resize(images: Tensor, size_px: int) -> Tensor:
    """Return images at another size, on their own device.

    Args:
        images: `(B, C, H, W)`, floating-point.
        size_px: height and width of the result.

    Returns:
        `(B, C, size_px, size_px)`, each pixel a mean over the area it covers; `images` themselves
        where they have that size.
    """
    if images.shape[2:] == (size_px, size_px):
        return images
    plain = images.as_subclass(Tensor)  # MetaTensor would keep a record of it
    return functional.interpolate(plain, (size_px, size_px), mode="bilinear", antialias=True)


def checked_scale(name: str, size_px: int) -> int:
    """Return the setting `name`, a size in pixels.

    Raises:
        ConfigurationError: it is no whole number above 0.
    """
    if isinstance(size_px, bool) or not isinstance(size_px, int) or size_px < 1:
        raise ConfigurationError(f"{name} must be a size in pixels such as 128, got {size_px!r}")
    return size_px


def checked_scales(name: str, sizes_px: Sequence[int]) -> tuple[int, ...]:
    """Return the setting `name`, a list of different sizes in pixels, the largest first.

    Raises:
        ConfigurationError: it is no list of sizes, is empty, or has a size twice.
    """
    if isinstance(sizes_px, str | int) or not sizes_px:
        raise ConfigurationError(f"{name} must be a list such as [128, 96, 64], got {sizes_px!r}")
    sizes = sorted((checked_scale(name, size) for size in sizes_px), reverse=True)
    if len(set(sizes)) < len(sizes):
        raise ConfigurationError(f"{name} must be different sizes, got {list(sizes_px)}")
    return tuple(sizes)
