"""From a photograph to the network's input, and what training varies on the way.

Pixels are between 0 and 1 until MONAI's `NormalizeIntensityd`, the last step, which takes mean and
standard deviation from the configuration. MONAI has the flips (`RandFlipd`), the turns
(`RandRotated`) and the crop of validation (`CenterSpatialCropd`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from torch import Tensor
from torch.nn import functional

from pipeline.data.photographs import read_photograph, rgb_photograph
from pipeline.errors import ConfigurationError

__all__ = ["LoadRGBd", "RandColourJitterd", "RandResizedCropd", "ResizeShorterSided"]

_GREY = (0.299, 0.587, 0.114)  # what the eye makes of red, green and blue (ITU-R BT.601)
_ATTEMPTS = 10


class LoadRGBd(MapTransform):
    """Read photographs as `(3, H, W)` float32 between 0 and 1, upright.

    Takes paths, or arrays `(H, W[, C])`. Grey and 16-bit images, transparency and the rotation in
    EXIF data are seen to.

    Args:
        keys: of the photographs.

    Raises:
        InputError: a file cannot be read; the message names it.
    """

    def __init__(self, keys: KeysCollection = "image") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with tensors in place of paths."""
        case = dict(data)
        for key in self.key_iterator(case):
            given = case[key]
            is_path = isinstance(given, str | Path)
            pixels = (
                read_photograph(given) if is_path else rgb_photograph(np.asarray(given), str(key))
            )
            tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
            name = str(given) if is_path else str(key)
            case[key] = MetaTensor(tensor, meta={"filename_or_obj": name})
        return case


class ResizeShorterSided(MapTransform):
    """Resize images so that the shorter side has `size_px` pixels and the form stays.

    Args:
        keys: of images `(C, H, W)`.
        size_px: length of the shorter side afterwards.

    Raises:
        ConfigurationError: `size_px` is below 1.
    """

    def __init__(self, keys: KeysCollection, size_px: int) -> None:
        if size_px < 1:
            raise ConfigurationError(f"size_px must be 1 or more, got {size_px!r}")
        super().__init__(keys)
        self.size_px = int(size_px)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the images resized."""
        case = dict(data)
        for key in self.key_iterator(case):
            sides = case[key].shape[-2:]
            factor = self.size_px / min(sides)
            height, width = (max(round(side * factor), self.size_px) for side in sides)
            case[key] = _resized(case[key], (height, width))
        return case


class RandResizedCropd(Randomizable, MapTransform):
    """Cut out a part of random size, form and place, and resize it to a square.

    MONAI's `RandScaleCropd` draws height and width apart, which distorts more the smaller the part.

    Args:
        keys: of images `(C, H, W)`; they share a draw.
        size_px: side of the result.
        scale: least and largest share of the area.
        ratio: least and largest width over height of the part.

    Raises:
        ConfigurationError: a range is out of bounds.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size_px: int,
        scale: Sequence[float] = (0.35, 1.0),
        ratio: Sequence[float] = (0.75, 4 / 3),
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1] or size_px < 1:
            raise ConfigurationError(
                f"size_px {size_px!r}, scale {list(scale)}, ratio {list(ratio)}; expected 1 pixel "
                "or more, shares of the area in (0, 1], and ratios above 0, the smaller one first"
            )
        MapTransform.__init__(self, keys)
        self.size_px = int(size_px)
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.box = (0, 0, 1, 1)

    def randomize(self, data: tuple[int, int]) -> None:
        """Draw top, left, height and width of the part for an image of these sides."""
        height, width = data
        for _ in range(_ATTEMPTS):
            area = height * width * self.R.uniform(*self.scale)
            ratio = np.exp(self.R.uniform(*np.log(self.ratio)))
            rows, columns = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = self.R.randint(height - rows + 1), self.R.randint(width - columns + 1)
                self.box = (int(top), int(left), int(rows), int(columns))
                return
        side = min(height, width)  # a long narrow image has no such part: its middle
        self.box = ((height - side) // 2, (width - side) // 2, side, side)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with a part of each image."""
        case = dict(data)
        first = True
        for key in self.key_iterator(case):
            if first:
                self.randomize(tuple(case[key].shape[-2:]))
                first = False
            top, left, height, width = self.box
            part = case[key][..., top : top + height, left : left + width]
            case[key] = _resized(part, (self.size_px, self.size_px))
        return case


class RandColourJitterd(Randomizable, MapTransform):
    """Vary brightness, contrast, saturation and hue of RGB images between 0 and 1.

    The four are one linear map of a pixel's colour, applied at once and clipped to 0..1. A setting
    of 0 leaves its part out; all 0 is the identity.

    Args:
        keys: of images `(3, H, W)`; they share a draw.
        brightness, contrast, saturation: a factor is drawn from `1 - value` to `1 + value`.
        hue: colours are turned around the grey axis by up to this share of a full turn.
        prob: how often anything is done.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.02,
        prob: float = 1.0,
    ) -> None:
        settings = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, value in {**settings, "prob": prob}.items():
            if not 0 <= value <= 1:
                raise ConfigurationError(f"{name} must be in [0, 1], got {value!r}")
        if not 0 <= hue <= 0.5:
            raise ConfigurationError(f"hue must be in [0, 0.5], got {hue!r}")
        MapTransform.__init__(self, keys)
        self.ranges = {**settings, "hue": hue}
        self.prob = prob
        self.drawn = dict.fromkeys(self.ranges, 0.0)
        self.active = False

    def randomize(self, data: Any | None = None) -> None:
        """Draw whether anything is done, and by how much each property changes."""
        self.active = bool(self.R.random() < self.prob)
        self.drawn = {name: float(self.R.uniform(-v, v)) for name, v in self.ranges.items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with its colours changed."""
        case = dict(data)
        self.randomize()
        if self.active and any(self.ranges.values()):
            for key in self.key_iterator(case):
                case[key] = self._jittered(case[key])
        return case

    def _jittered(self, image: Tensor) -> Tensor:
        grey = torch.tensor(_GREY, dtype=image.dtype)
        contrast, bright = 1 + self.drawn["contrast"], 1 + self.drawn["brightness"]
        colour = 1 + self.drawn["saturation"]
        to_grey = grey.expand(3, 3)
        turned = _turn_about_grey(2 * np.pi * self.drawn["hue"]).to(image.dtype)
        saturated = colour * turned + (1 - colour) * to_grey @ turned
        level = (1 - contrast) * (grey @ image.flatten(1).mean(1).as_subclass(Tensor))
        plain = image.as_subclass(Tensor)
        changed = bright * (torch.einsum("ij,jhw->ihw", contrast * saturated, plain) + level)
        return _like(image, changed.clamp(0, 1))


def _turn_about_grey(angle: float) -> Tensor:
    """Return the rotation of colours `(3, 3)` about the axis of greys, by radians."""
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3)
    onto = torch.full((3, 3), 1 / 3)
    turned: Tensor = np.cos(angle) * torch.eye(3) + np.sin(angle) * cross
    turned += (1 - np.cos(angle)) * onto
    return turned


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image `(C, H, W)` at another size, each pixel a mean over the area it covers."""
    if tuple(image.shape[-2:]) == size:
        return image
    plain = image.as_subclass(Tensor)[None]
    resized = functional.interpolate(plain, size, mode="bilinear", antialias=True)[0]
    return _like(image, resized)


def _like(original: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with the name of the file that `original` came from."""
    return MetaTensor(tensor, meta=original.meta) if isinstance(original, MetaTensor) else tensor
