"""The grey values that a network sees: smoothed, equalised and normalised B-scans.

Each step takes tensors `(1, H, W)` between 0 and 1, needs no rows, and may be left out, so that a
chain of them serves training and inference alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy.ndimage import gaussian_filter
from skimage.exposure import equalize_adapthist
from torch import Tensor

from pipeline.errors import ConfigurationError

__all__ = ["BlurGaussiand", "EqualizeTiles", "EqualizeTilesd", "NormalizeGreyd"]

GREY_VALUES = 256


class BlurGaussiand(MapTransform):
    """Smooth by a Gaussian of a few pixels, mirrored at the border.

    Args:
        keys: B-scans.
        sigma_px: its standard deviation; None leaves the B-scan as it is.
        size_px: side of the square that it is cut to, odd.
        allow_missing_keys: keys that a case does not have are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        sigma_px: float | None = 1.0,
        size_px: int = 5,
        allow_missing_keys: bool = False,
    ) -> None:
        if sigma_px is not None and not sigma_px > 0:
            raise ConfigurationError(f"sigma_px must be positive or null, got {sigma_px!r}")
        if size_px < 1 or size_px % 2 == 0:
            raise ConfigurationError(f"size_px must be odd and positive, got {size_px!r}")
        super().__init__(keys, allow_missing_keys)
        self.sigma_px = sigma_px
        self.size_px = size_px

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with smoothed B-scans."""
        case = dict(data)
        if self.sigma_px is None:
            return case
        radius = (0, *[self.size_px // 2] * 2)
        sigma = (0.0, self.sigma_px, self.sigma_px)
        for key in self.key_iterator(case):
            pixels = np.asarray(case[key], np.float32)
            case[key] = torch.from_numpy(
                gaussian_filter(pixels, sigma, radius=radius, mode="mirror")
            )
        return case


class EqualizeTiles:
    """Equalise the histogram of each tile, with limited contrast (CLAHE).

    The limit is that of OpenCV: how often a grey value may occur in a tile, in units of the mean
    over 256 grey values; 2 allows twice the mean. The work is scikit-image's, whose `clip_limit` is
    a share of the tile's pixels, here `clip_limit / 256`. Three things differ from OpenCV: the
    B-scan is stretched to its full range before and after, what is clipped is spread again until
    none is left over, and so grey values differ by a few per cent.

    Args:
        clip_limit: above 0; 1 and less hardly change a B-scan.
        tiles: how many, down and across.
    """

    def __init__(self, clip_limit: float = 2.0, tiles: Sequence[int] = (8, 8)) -> None:
        if not 0 < clip_limit < GREY_VALUES:
            raise ConfigurationError(
                f"clip_limit must be above 0 and below {GREY_VALUES}, got {clip_limit!r}"
            )
        if len(tiles) != 2 or min(tiles) < 1:
            raise ConfigurationError(f"tiles must be two positive numbers, got {list(tiles)!r}")
        self.clip_limit = clip_limit
        self.tiles = tuple(tiles)

    def __call__(self, image: Tensor) -> Tensor:
        """Return `image` `(1, H, W)`, values in 0..1, equalised; a constant one as it is."""
        pixels = np.asarray(image, np.float32)[0].clip(0.0, 1.0)
        if pixels.min() == pixels.max():
            return image
        tile = [max(-(-side // n), 1) for side, n in zip(pixels.shape, self.tiles, strict=True)]
        equalised = equalize_adapthist(pixels, tile, self.clip_limit / GREY_VALUES, GREY_VALUES)
        return torch.from_numpy(np.asarray(equalised, np.float32))[None]


class EqualizeTilesd(MapTransform):
    """Equalise B-scans by `EqualizeTiles`.

    Args:
        keys: B-scans.
        clip_limit: see `EqualizeTiles`; None leaves the B-scan as it is.
        tiles: how many, down and across.
        allow_missing_keys: keys that a case does not have are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        clip_limit: float | None = 2.0,
        tiles: Sequence[int] = (8, 8),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.equalize = None if clip_limit is None else EqualizeTiles(clip_limit, tiles)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with equalised B-scans."""
        case = dict(data)
        if self.equalize is not None:
            for key in self.key_iterator(case):
                case[key] = self.equalize(case[key])
        return case


class NormalizeGreyd(MapTransform):
    """Subtract a mean from grey values between 0 and 1, and divide by a standard deviation.

    Args:
        keys: B-scans.
        mean, std: fixed numbers, the same for every B-scan.
        allow_missing_keys: keys that a case does not have are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        mean: float = 0.0,
        std: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        if not std > 0:
            raise ConfigurationError(f"std must be positive, got {std!r}")
        super().__init__(keys, allow_missing_keys)
        self.mean = mean
        self.std = std

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with normalised B-scans."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[key] = (case[key] - self.mean) / self.std
        return case
