"""What the original project's augmentation needs beyond MONAI, with labels that stay right.

Its vertical flip is left out: it puts the choroid above the vitreous, which no scanner does.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform, Rotate
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.oct.losses import IGNORE_LABEL

__all__ = ["RandRotateIgnoredd", "RandSnowd"]


class RandRotateIgnoredd(RandomizableTransform, MapTransform):
    """Rotate a B-scan and its label around the middle; nothing is known of what comes in.

    It stands after `RenderLabeld`. Rows are removed from a rotated case, as none of its columns is
    an annotated one; a further `RenderLabeld` then leaves the label alone. `SelectItemsd` must
    choose what goes into a batch.

    Args:
        keys: B-scans `(1, H, W)`, 0 where nothing was scanned.
        label_key: label `(1, H, W)`, `ignore_label` where nothing was scanned; may be missing.
        prob: of a rotation.
        degrees: largest angle.
        row_keys: rows `(W,)`, removed by a rotation.
        ignore_label: the value that losses leave out, the largest that the label's type has.

    Raises:
        ConfigurationError: the label has another size, as one with rows.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        label_key: str = "label",
        prob: float = 0.5,
        degrees: float = 25.0,
        row_keys: Sequence[str] = ("ilm", "bm"),
        ignore_label: int = IGNORE_LABEL,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.label_key = label_key
        self.degrees = degrees
        self.row_keys = tuple(row_keys)
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case, rotated or not."""
        case = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return case
        angle = math.radians(float(self.R.uniform(-self.degrees, self.degrees)))
        for key in self.key_iterator(case):
            case[key] = _rotated(case[key], angle, "bilinear")
        if self.label_key in case:
            label = torch.as_tensor(case[self.label_key])
            if label.shape[1:] != case[self.keys[0]].shape[1:]:
                raise ConfigurationError(
                    f"label of {tuple(label.shape)} cannot be rotated with a B-scan of "
                    f"{tuple(case[self.keys[0]].shape)}; leave with_rows of RenderLabeld false"
                )
            # Rotating fills with 0: of what is missing to the ignored value, that is this value.
            missing = _rotated(self.ignore_label - label.float(), angle, "nearest")
            case[self.label_key] = (self.ignore_label - missing).round().to(label.dtype)
        for key in self.row_keys:
            case.pop(key, None)
        return case


class RandSnowd(RandomizableTransform, MapTransform):
    """Brighten all pixels that are darker than a random grey value.

    Args:
        keys: B-scans `(1, H, W)` between 0 and 1.
        prob: of a change.
        point: range of a number; half of it and a third are the grey value.
        brightness: what darker pixels are multiplied by.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob: float = 0.5,
        point: tuple[float, float] = (0.1, 0.3),
        brightness: float = 2.5,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.point = point
        self.brightness = brightness

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case, changed or not."""
        case = dict(data)
        self.randomize(None)
        if self._do_transform:
            limit = float(self.R.uniform(*self.point)) / 2 + 1 / 3
            for key in self.key_iterator(case):
                image = torch.as_tensor(case[key])
                bright = (image * self.brightness).clamp(max=1.0)
                case[key] = torch.where(image < limit, bright, image)
        return case


def _rotated(image: Any, angle: float, mode: str) -> Tensor:
    """Return `image` `(1, H, W)` rotated by `angle` radians, 0 where nothing was."""
    rotate = Rotate(angle, keep_size=True, mode=mode, padding_mode="zeros")
    rotated: Tensor = rotate(torch.as_tensor(image)).as_subclass(Tensor)
    return rotated
