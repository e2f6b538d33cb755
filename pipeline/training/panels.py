"""Pictures of validated cases: input, truth and prediction beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.nn.functional import interpolate, pad

from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError

__all__ = ["PanelCollector", "SideBySide"]

GAP_PX = 4


@dataclass(frozen=True)
class SideBySide:
    """Draw one case as a row: input, truth, prediction.

    An input that is not 8-bit is stretched from its darkest to its brightest value; of a volume the
    middle slice is drawn. Truth and prediction are drawn from black (0) to white (1, or the highest
    class; of several channels the index of the largest); what the truth leaves out is dark grey.

    Args:
        image: key of the input `(C, H, W)` or `(C, D, H, W)`.
        truth: key of the label.
        prediction: key of the prediction.
        ignore_label: value of the label where there is no truth.
        max_side_px: larger pictures are shrunk to this.
    """

    image: str = "image"
    truth: str = "label"
    prediction: str = "pred"
    ignore_label: int | None = 255
    max_side_px: int = 512

    def __call__(self, item: Mapping[str, Any]) -> Tensor:
        """Return the row `(3, H, W)` as uint8."""
        columns = [
            _picture(_plane(item, self.image)),
            _mask(_plane(item, self.truth), self.ignore_label),
            _mask(_plane(item, self.prediction)),
        ]
        height, width = columns[0].shape[-2:]
        scale = min(1.0, self.max_side_px / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        fitted = [
            _resize(column, size).round().byte().cpu().expand(3, -1, -1) for column in columns
        ]
        gap = torch.full((3, size[0], GAP_PX), 255, dtype=torch.uint8)
        return torch.cat([fitted[0], gap, fitted[1], gap, fitted[2]], dim=2)


def _plane(item: Mapping[str, Any], key: str) -> Tensor:
    """Return `item[key]` as `(C, H, W)`."""
    if key not in item:
        raise ConfigurationError(
            f"panels: no key {key!r} in a validated item, found {sorted(item)}"
        )
    array = torch.as_tensor(item[key]).detach().as_subclass(torch.Tensor)
    if array.ndim == 4:
        array = array[:, array.shape[1] // 2]
    if array.ndim != 3:
        raise ConfigurationError(
            f"panels: {key!r} must be (C, H, W) or (C, D, H, W), got shape {tuple(array.shape)}"
        )
    return array


def _picture(plane: Tensor) -> Tensor:
    """Return `plane` `(C, H, W)` as RGB or, below three channels, as grey, on 0..255."""
    rgb = plane[:3] if len(plane) >= 3 else plane[:1]
    if plane.dtype == torch.uint8:
        return rgb.float()
    rgb = torch.nan_to_num(rgb.float(), posinf=0.0, neginf=0.0)
    low, high = rgb.aminmax()
    return (rgb - low) / (high - low).clamp_min(1e-12) * 255


def _mask(plane: Tensor, ignore_label: int | None = None) -> Tensor:
    """Return a mask, a probability or classes `(C, H, W)` as grey `(1, H, W)` on 0..255."""
    if len(plane) > 1:
        plane = plane.argmax(0, keepdim=True)
    ignored = torch.zeros_like(plane, dtype=torch.bool)
    if ignore_label is not None:
        ignored = plane == ignore_label
    values = torch.nan_to_num(plane.float()).masked_fill(ignored, 0.0)
    grey = (values / values.max().clamp_min(1.0)).clamp(0, 1) * 255
    return grey.masked_fill(ignored, 64.0)


def _resize(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `rgb` at `size`: averaged where it shrinks, so that thin vessels stay visible."""
    if rgb.shape[-2:] == size:
        return rgb
    mode = "area" if rgb.shape[-2] >= size[0] else "nearest"
    return interpolate(rgb[None], size=size, mode=mode)[0]


class PanelCollector:
    """Keep the panels of the first cases of each validation.

    Args:
        to_rgb: draws one case from its validated item, which has the keys of the batch and, after
            post-processing, of the output; returns `(3, H, W)` uint8, of any size.
        max_cases: how many cases are kept.
    """

    def __init__(
        self, max_cases: int = 4, to_rgb: Callable[[Mapping[str, Any]], Tensor] | None = None
    ) -> None:
        self.max_cases = max_cases
        self.to_rgb = to_rgb or SideBySide()
        self.rows: list[Tensor] = []

    def attach(self, validator: Engine) -> None:
        """Collect from `validator`, which must decollate its output as MONAI's do by default."""
        validator.add_event_handler(Events.EPOCH_STARTED, lambda _: self.rows.clear())
        validator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)

    def _collect(self, validator: Any) -> None:
        wanted = self.max_cases - len(self.rows)
        if wanted <= 0:
            return
        batch, output = validator.state.batch, validator.state.output
        if not isinstance(batch, list) or not isinstance(output, list):
            raise ConfigurationError("panels: the evaluator must have decollate: true")
        for given, result in zip(batch[:wanted], output[:wanted], strict=True):
            row = torch.as_tensor(self.to_rgb({**given, **result})).cpu()
            if row.dtype != torch.uint8 or row.ndim != 3 or row.shape[0] != 3:
                raise ConfigurationError(
                    f"panels: expected uint8 (3, H, W), got {row.dtype} {tuple(row.shape)}"
                )
            self.rows.append(row)

    def sheet(self) -> Tensor:
        """Return the panels below each other, `(3, H, W)` uint8."""
        width = max(row.shape[2] for row in self.rows)
        rows = [pad(row, (0, width - row.shape[2], 0, GAP_PX), value=255) for row in self.rows]
        return torch.cat(rows, dim=1)

    def write_pictures(self, folder: Path) -> None:
        """Write each panel as `best_<n>.png`, counted from 1."""
        for number, row in enumerate(self.rows, start=1):
            write_png(folder / f"best_{number}.png", row.permute(1, 2, 0).contiguous().numpy())
