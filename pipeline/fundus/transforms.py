"""From a photograph to the network's frame and back.

The network sees the field of view (FOV) cropped, at one scale, normalised inside the FOV, and
padded. MONAI's `Invertd` runs the geometric steps backwards for a prediction, and `ZeroOutsided`
clears what lies outside the FOV: scores and results are always in the photograph's own frame.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Resized
from monai.transforms.spatial.functional import resize
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from skimage.exposure import equalize_adapthist

from pipeline.data.images import read_image
from pipeline.data.labels import AUTO, label_classes
from pipeline.data.photographs import rgb_photograph
from pipeline.errors import ConfigurationError, InputError
from pipeline.fundus.fov import derive_fov

__all__ = [
    "IgnoreOutsided",
    "LoadFundusd",
    "NormalizeInsided",
    "ScaleToFOVd",
    "SelectChannelsd",
    "ZeroIgnoredd",
    "ZeroOutsided",
]

IGNORE_LABEL = 255


class LoadFundusd(MapTransform):
    """Read a case's photograph, FOV and vessel mask.

    Takes `image`, and `label` and `fov` where present and not None: paths or arrays in `(H, W[,
    C])` order. Gives `image` `(3, H, W)` float32 in 0..1, `label` `(1, H, W)` uint8 0/1, `fov`
    `(1, H, W)` uint8 0/1, `fov_source` (`given`, or `derived` from the photograph),
    `source_dtype` and `image_path`.

    Raises:
        InputError: a file is unreadable or the sizes differ; the message names the files.
    """

    def __init__(self) -> None:
        super().__init__(["image", "label", "fov"], allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with arrays in place of paths."""
        case = dict(data)
        names = {key: _name(case.get(key), str(key)) for key in self.keys}
        pixels = _pixels(case["image"])
        case["source_dtype"] = str(pixels.dtype)
        photograph = rgb_photograph(pixels, names["image"])
        case["image"] = _channel_first(np.moveaxis(photograph, -1, 0), names["image"])
        if case.get("label") is None:
            case.pop("label", None)
        else:
            label = _mask(case["label"], names["label"])
            _check_size(label, names["label"], photograph, names["image"])
            case["label"] = _channel_first(label[None], names["label"])
        case["image_path"] = names["image"]
        case["fov_source"] = "derived" if case.get("fov") is None else "given"
        if case.get("fov") is None:
            fov = derive_fov(photograph)
        else:
            fov = _mask(case["fov"], names["fov"]) > 0
            _check_size(fov, names["fov"], photograph, names["image"])
            if not fov.any():
                raise InputError(
                    f"{names['fov']}: the field-of-view mask is empty; remove it to derive one"
                )
        case["fov"] = _channel_first(fov.astype(np.uint8)[None], names["image"])
        return case


class SelectChannelsd(MapTransform):
    """Keep RGB `(3, H, W)`, or only the green channel `(1, H, W)`, where vessels show best.

    Args:
        keys: keys of the photographs, in 0..1.
        channels: `rgb` or `green`; the network's `in_channels` is 3 or 1.
        clip_limit: contrast limit of CLAHE on the green channel (scikit-image's
            `equalize_adapthist`); 0 leaves it out.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channels: Literal["rgb", "green"] = "rgb",
        clip_limit: float = 0.02,
    ) -> None:
        if channels not in ("rgb", "green"):
            raise ConfigurationError(f"channels must be 'rgb' or 'green', got {channels!r}")
        super().__init__(keys)
        self.channels = channels
        self.clip_limit = clip_limit

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the chosen channels."""
        case = dict(data)
        if self.channels == "rgb":
            return case
        for key in self.key_iterator(case):
            green = case[key][1:2]
            if self.clip_limit > 0:
                equalised = equalize_adapthist(np.asarray(green[0]), clip_limit=self.clip_limit)
                green = _like(green, torch.from_numpy(equalised.astype(np.float32))[None])
            case[key] = green
        return case


class ScaleToFOVd(Resized):
    """Resize so that the longer side of a photograph cropped to its FOV has `fov_size_px` pixels.

    Vessels then have the width that the network was trained for, whatever the camera's resolution.
    Masks are resized by nearest neighbour and stay binary. Invertible like MONAI's `Resized`.

    Args:
        keys: what is resized; the first key gives the size.
        fov_size_px: length of the longer side; None leaves every size as it is.
        tolerance: relative difference up to which the size is left as it is, so that truth drawn at
            nearly the right scale is not resampled.
        mode: interpolation per key.
        allow_missing_keys: keys that a case does not have are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        fov_size_px: int | None,
        tolerance: float = 0.1,
        mode: Any = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, spatial_size=-1, mode=mode, allow_missing_keys=allow_missing_keys)
        self.fov_size_px = fov_size_px
        self.tolerance = tolerance

    def __call__(
        self, data: Mapping[Hashable, Any], lazy: bool | None = None
    ) -> dict[Hashable, Any]:
        """Return the case at the network's scale."""
        case = dict(data)
        size = self._size(*case[self.keys[0]].shape[1:])
        for key, mode in self.key_iterator(case, self.mode):
            # Smoothing before shrinking is right for photographs; a smoothed mask is no mask.
            smooth = "nearest" not in str(mode)
            track = self.resizer.get_transform_info()
            case[key] = resize(
                case[key], size, mode, None, torch.float32, 2, smooth, None, bool(lazy), track
            )
        return case

    def _size(self, height: int, width: int) -> tuple[int, int]:
        factor = 1.0 if self.fov_size_px is None else self.fov_size_px / max(height, width)
        if abs(factor - 1) <= self.tolerance:
            return height, width
        return max(round(height * factor), 1), max(round(width * factor), 1)


class NormalizeInsided(MapTransform):
    """Give each channel mean 0 and standard deviation 1 inside the FOV, and 0 outside.

    Args:
        keys: keys of the photographs.
        fov_key: key of the FOV.
    """

    def __init__(self, keys: KeysCollection, fov_key: str = "fov") -> None:
        super().__init__(keys)
        self.fov_key = fov_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case normalised."""
        case = dict(data)
        inside = torch.as_tensor(case[self.fov_key])[0] > 0
        for key in self.key_iterator(case):
            values = case[key][:, inside]
            mean = values.mean(dim=1)[:, None, None]
            # A constant channel carries nothing: it becomes 0 instead of noise blown up.
            deviation = values.std(dim=1, correction=0)[:, None, None].clamp(min=1e-3)
            case[key] = (case[key] - mean) / deviation * inside
        return case


class IgnoreOutsided(MapTransform):
    """Mark a label's pixels outside the FOV as `ignore_label`, so that no loss counts them.

    Args:
        keys: keys of the labels.
        fov_key: key of the FOV.
        ignore_label: the value that losses leave out.
        allow_missing_keys: cases without a label are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        fov_key: str = "fov",
        ignore_label: int = IGNORE_LABEL,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fov_key = fov_key
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with marked labels."""
        case = dict(data)
        for key in self.key_iterator(case):
            label = case[key]
            inside = torch.as_tensor(case[self.fov_key]) > 0
            case[key] = _like(label, torch.where(inside, label, self.ignore_label))
        return case


class ZeroOutsided(MapTransform):
    """Set a prediction to 0 outside the FOV.

    Args:
        keys: keys of the predictions, in the photograph's frame.
        fov_key: key of the FOV in the same frame.
    """

    def __init__(self, keys: KeysCollection, fov_key: str = "native_fov") -> None:
        super().__init__(keys)
        self.fov_key = fov_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with cleared predictions."""
        case = dict(data)
        for key in self.key_iterator(case):
            inside = torch.as_tensor(case[self.fov_key]).to(case[key].device) > 0
            case[key] = case[key] * inside
        return case


class ZeroIgnoredd(MapTransform):
    """Set a photograph to 0 where its label is ignored, as the network sees it outside the FOV.

    Args:
        keys: keys of the photographs, after intensities were changed at random.
        label_key: key of the label.
        ignore_label: the label's value outside the FOV.
    """

    def __init__(
        self, keys: KeysCollection, label_key: str = "label", ignore_label: int = IGNORE_LABEL
    ) -> None:
        super().__init__(keys)
        self.label_key = label_key
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the photograph cleared outside."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[key] = case[key] * (case[self.label_key] != self.ignore_label)
        return case


def _name(source: Any, key: str) -> str:
    return str(source) if isinstance(source, str | Path) else key


def _pixels(source: Any) -> NDArray[Any]:
    return read_image(Path(source)) if isinstance(source, str | Path) else np.asarray(source)


def _mask(source: Any, name: str) -> NDArray[np.uint8]:
    """Return a mask as 0 and 1; its coding (0/1, 0/255, artery and vein codes) shows in it."""
    return (label_classes(_pixels(source), AUTO, name) > 0).astype(np.uint8)


def _channel_first(array: NDArray[Any], name: str) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), meta={"filename_or_obj": name})


def _like(original: Any, tensor: torch.Tensor) -> Any:
    """Return `tensor` with the history of `original`, so that it can be inverted."""
    if isinstance(original, MetaTensor):
        return MetaTensor(
            tensor, meta=original.meta, applied_operations=original.applied_operations
        )
    return convert_to_tensor(tensor)


def _check_size(mask: NDArray[Any], name: str, photograph: NDArray[Any], image: str) -> None:
    if mask.shape != photograph.shape[:2]:
        raise InputError(
            f"{name}: found {mask.shape[0]}x{mask.shape[1]} pixels (H x W), expected "
            f"{photograph.shape[0]}x{photograph.shape[1]} as in {image}; pair the right files"
        )
