"""Random changes of a B-scan's looks that leave its layers where they are.

For tensors `(1, H, W)` between 0 and 1, before normalisation. Gamma, gain and Gaussian noise are
MONAI's `RandAdjustContrastd`, `RandScaleIntensityd` and `RandGaussianNoised`. Randomness comes from
MONAI's `self.R`; a probability of 0 changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from pipeline.errors import ConfigurationError

__all__ = ["RandHazed", "RandNoiseFloord", "RandShadowsd"]

Range = tuple[float, float]
RAYLEIGH_SCALE = 0.8  # its mean is then 1, so that a level is the mean of the noise


class _RandAppearanced(RandomizableTransform, MapTransform):
    """Change B-scans at random; subclasses define `changed`.

    Args:
        keys: B-scans `(1, H, W)`, each with its own draw.
        prob: of a change.
    """

    def __init__(self, keys: KeysCollection, prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    @abstractmethod
    def changed(self, image: Tensor) -> Tensor:
        """Return a changed copy of `image`, with numbers from `self.R`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case, changed or not."""
        case = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(case):
                case[key] = self.changed(torch.as_tensor(case[key]))
        return case


class RandNoiseFloord(_RandAppearanced):
    """Lift dark pixels to speckle, as in a scan of few averaged frames: a grey, grainy vitreous.

    Args:
        keys: B-scans `(1, H, W)`.
        prob: of a change.
        level: range of the noise's mean.
    """

    def __init__(
        self, keys: KeysCollection = "image", prob: float = 0.7, level: Range = (0.02, 0.4)
    ) -> None:
        super().__init__(keys, prob)
        self.level = _checked_range("level", level)

    def changed(self, image: Tensor) -> Tensor:
        """Return `image`, nowhere darker than the noise."""
        level = self.R.uniform(*self.level)
        noise = self.R.rayleigh(RAYLEIGH_SCALE * level, tuple(image.shape)).clip(max=1.0)
        return torch.maximum(image, torch.from_numpy(noise).to(image))


class RandHazed(_RandAppearanced):
    """Brighten a band of rows, as a cloudy vitreous or a reflex of the lens does.

    Args:
        keys: B-scans `(1, H, W)`.
        prob: of a change.
        rows_px: range of the band's height.
        strength: range of the grey value that is added.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob: float = 0.3,
        rows_px: tuple[int, int] = (4, 30),
        strength: Range = (0.0, 0.35),
    ) -> None:
        super().__init__(keys, prob)
        self.rows_px = _checked_range("rows_px", rows_px)
        self.strength = _checked_range("strength", strength)

    def changed(self, image: Tensor) -> Tensor:
        """Return `image` with a band, at most 1."""
        height = image.shape[-2]
        band = min(int(self.R.randint(int(self.rows_px[0]), int(self.rows_px[1]) + 1)), height)
        first = int(self.R.randint(height - band + 1))
        hazy = image.clone()
        hazy[..., first : first + band, :] += float(self.R.uniform(*self.strength))
        return hazy.clamp_(max=1.0)


class RandShadowsd(_RandAppearanced):
    """Darken groups of neighbouring columns, as vessels do.

    Args:
        keys: B-scans `(1, H, W)`.
        prob: of a change.
        count: range of the number of shadows.
        columns_px: range of their widths.
        remaining: range of what a shadow leaves of the light; 0 is black.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob: float = 0.3,
        count: tuple[int, int] = (1, 3),
        columns_px: tuple[int, int] = (4, 16),
        remaining: Range = (0.0, 0.6),
    ) -> None:
        super().__init__(keys, prob)
        self.count = _checked_range("count", count)
        self.columns_px = _checked_range("columns_px", columns_px)
        self.remaining = _checked_range("remaining", remaining)

    def changed(self, image: Tensor) -> Tensor:
        """Return `image` with shadows."""
        columns = image.shape[-1]
        light = np.ones(columns, np.float32)
        for _ in range(self.R.randint(int(self.count[0]), int(self.count[1]) + 1)):
            width = self.R.randint(int(self.columns_px[0]), int(self.columns_px[1]) + 1)
            first = self.R.randint(max(columns - width, 0) + 1)
            light[first : first + width] *= self.R.uniform(*self.remaining)
        return image * torch.from_numpy(light).to(image)


def _checked_range(name: str, limits: tuple[float, float]) -> tuple[float, float]:
    if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
        raise ConfigurationError(
            f"{name} must be two numbers from 0, the smaller first, got {list(limits)!r}"
        )
    return limits[0], limits[1]
