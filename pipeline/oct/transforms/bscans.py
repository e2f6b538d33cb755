"""From a file of B-scans to the network's frame, and from rows to the label of each pixel."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigurationError, InputError
from pipeline.oct.formats import read_oct
from pipeline.oct.frames import columns_to_width, rows_to_height
from pipeline.oct.losses import IGNORE_LABEL
from pipeline.oct.volume import OctVolume

__all__ = ["FitToFramed", "LoadBScand", "RenderLabeld", "render_label"]

logger = logging.getLogger(__name__)

ROW_KEYS = ("ilm", "bm")
OPEN_FILES = 4


class LoadBScand(MapTransform):
    """Read one B-scan of a file, and the rows of its boundaries.

    Takes `image`, a path with `index`, or an array `(H, W)`, for which `white` may say which grey
    value is white and `ilm` and `bm` may hold rows. Gives `image` `(1, H, W)` float32, white as 1;
    `ilm` and `bm` `(W,)` float32 where the file has one of them, NaN where nobody annotated;
    `name`, `image_path`, `source_shape` `(2,)`, `scale_y_um` (NaN where unknown), `white`, and
    `crossed_columns`, the number of columns with the ILM below BM.

    Args:
        keys: `image`.
    """

    def __init__(self, keys: KeysCollection = "image") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with tensors in place of the path.

        Raises:
            InputError: the file cannot be read, has no such B-scan, or holds pixels that are not
                finite.
        """
        case: dict[Any, Any] = {key: value for key, value in data.items() if value is not None}
        source = case["image"]
        if isinstance(source, str | Path):
            case |= _read(str(source), int(case.get("index", 0)), case.get("name"))
        else:
            pixels = np.asarray(source)
            case |= {"name": case.get("name", "array"), "image_path": ""}
            case |= {"scale_y_um": float(case.get("scale_y_um", np.nan)), "pixels": pixels}
            case["white"] = float(case.get("white") or _white(pixels))
        pixels = case.pop("pixels")
        if pixels.ndim != 2:
            raise InputError(f"{case['name']}: found shape {pixels.shape}, expected (H, W)")
        image = np.asarray(pixels, np.float32) / np.float32(case["white"])
        if pixels.dtype.kind == "f" and not np.isfinite(image).all():
            raise InputError(f"{case['name']}: pixels are NaN or infinite; replace them by 0")
        case["image"] = torch.from_numpy(image)[None]
        case["source_shape"] = np.array(pixels.shape)
        return case | _checked_rows(case)


class FitToFramed(MapTransform):
    """Resize a B-scan to the network's frame, and map its rows.

    Pixel centres are aligned, `y_new = (y + 0.5) * H_new / H - 0.5`, and likewise the columns; a
    row between an annotated column and one that is not is NaN. Where the B-scan shrinks it is
    smoothed.

    Args:
        keys: B-scans `(1, H, W)`.
        frame: rows and columns; None leaves every size as it is.
        row_keys: rows `(W,)` in the frame of the first key; those that a case lacks are passed
            over.
        allow_missing_keys: keys that a case does not have are passed over.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        frame: Sequence[int] | None = (480, 768),
        row_keys: Sequence[str] = ROW_KEYS,
        allow_missing_keys: bool = False,
    ) -> None:
        if frame is not None and (len(frame) != 2 or min(frame) < 1):
            raise ConfigurationError(f"frame must be rows and columns or null, got {list(frame)!r}")
        super().__init__(keys, allow_missing_keys)
        self.frame = None if frame is None else (int(frame[0]), int(frame[1]))
        self.row_keys = tuple(row_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case in the network's frame."""
        case = dict(data)
        if self.frame is None:
            return case
        for key in self.row_keys:
            if key in case:
                height = case[self.keys[0]].shape[1]
                case[key] = _fitted_rows(torch.as_tensor(case[key]), height, self.frame)
        for key in self.key_iterator(case):
            image = torch.as_tensor(case[key])[None]
            if image.shape[2:] != self.frame:
                image = functional.interpolate(image, self.frame, mode="bilinear", antialias=True)
            case[key] = image[0]
        return case


class RenderLabeld(MapTransform):
    """Draw the label of each pixel from the rows: `label` `(1, H, W)` uint8.

    It stands after what moves rows, so that the label is exact. A case without rows is passed over.
    See `render_label`.

    Args:
        keys: the rows of ILM and BM, `(W,)`.
        image_key: what has the label's size, `(1, H, W)`.
        label_key: where the label goes.
        with_rows: make it `(1, H + 2, W)` float32, the rows below the classes, as `BoundaryLoss`
            needs it.
    """

    def __init__(
        self,
        keys: KeysCollection = ROW_KEYS,
        image_key: str = "image",
        label_key: str = "label",
        with_rows: bool = False,
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.label_key = label_key
        self.with_rows = with_rows

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with its label."""
        case = dict(data)
        if any(key not in case for key in self.keys):
            return case
        ilm, bm = (torch.as_tensor(case[key]) for key in self.keys)
        label = render_label(ilm, bm, int(case[self.image_key].shape[1]))
        if self.with_rows:
            rows = torch.stack([ilm, bm]).masked_fill(ilm > bm, torch.nan)
            label = torch.cat([label.float(), rows.float()])
        case[self.label_key] = label[None]
        return case


def render_label(ilm: Tensor, bm: Tensor, height: int) -> Tensor:
    """Return the class of each pixel, `(H, W)` uint8.

    A row is rounded, halves to the even one, and is the first of the layer below: 0 above the ILM,
    1 from it, 2 from BM on, BM in the last row of the B-scan included. A column where a row is
    missing, or the ILM lies below BM, is 255.

    Args:
        ilm: rows `(W,)`, NaN where nobody annotated.
        bm: the same.
        height: rows of the B-scan.
    """
    row = torch.arange(height, dtype=ilm.dtype)[:, None]
    label = (row >= ilm.round()).byte() + (row >= bm.round()).byte()
    known = ilm <= bm  # false where one of them is NaN
    return label.masked_fill(~known, IGNORE_LABEL)


def _read(path: str, index: int, name: Any) -> dict[str, Any]:
    """Return B-scan `index` of a file as stored, its rows and what is known of it."""
    volume = _opened(path, _stamp(path), os.getpid())
    if not 0 <= index < volume.bscans.shape[0]:
        raise InputError(
            f"{path}: B-scan {index} was asked for, expected 0 to {volume.bscans.shape[0] - 1}"
        )
    case: dict[str, Any] = {
        "pixels": np.asarray(volume.bscans[index]),
        "name": name or volume.names[index],
        "image_path": path,
        "white": float(volume.white),
        "scale_y_um": np.nan if volume.scale_y_um is None else float(volume.scale_y_um),
    }
    if {key.upper() for key in ROW_KEYS} & volume.layers.keys():
        unknown = np.full(volume.bscans.shape[2], np.nan, np.float32)
        for key in ROW_KEYS:
            rows = volume.layers.get(key.upper())
            case[key] = unknown if rows is None else rows[index]
    return case


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, stamp: tuple[int, int], process: int) -> OctVolume:
    """Return an opened file; a forked worker opens its own, and a changed file is read anew."""
    del stamp, process
    return read_oct(path)


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0  # the reader says what is wrong
    return status.st_mtime_ns, status.st_size


def _white(pixels: NDArray[Any]) -> float:
    """Return the grey value that is white in an array that does not say."""
    if pixels.dtype.kind == "u":
        return float(np.iinfo(pixels.dtype).max)
    finite = pixels[np.isfinite(pixels)]
    if pixels.dtype.kind != "f" or ((finite < 0) | (finite > 1)).any():
        raise InputError(
            f"array: found {pixels.dtype} from {pixels.min()} to {pixels.max()}, expected unsigned "
            "integers or floats in 0..1; give the grey value of white as `white`"
        )
    return 1.0


def _checked_rows(case: Mapping[Hashable, Any]) -> dict[str, Any]:
    """Return the rows as tensors, and the number of columns in which they cross."""
    rows: dict[str, Any] = {}
    columns = int(case["source_shape"][1])
    for key in ROW_KEYS:
        if key in case:
            rows[key] = torch.from_numpy(np.array(case[key], np.float32))
            if rows[key].shape != (columns,):
                raise InputError(
                    f"{case['name']}: {key} has shape {tuple(rows[key].shape)}, expected one row "
                    f"for each of the {columns} columns"
                )
    if len(rows) == len(ROW_KEYS):
        crossed = int((rows["ilm"] > rows["bm"]).sum())
        if crossed:
            logger.warning(
                "%s: the ILM lies below BM in %d columns; they are ignored", case["name"], crossed
            )
        rows["crossed_columns"] = crossed
    return rows


def _fitted_rows(rows: Tensor, height: int, frame: tuple[int, int]) -> Tensor:
    """Return `rows` of a B-scan of `height` rows in `frame`."""
    fitted = rows_to_height(columns_to_width(rows.numpy(), frame[1]), height, frame[0])
    return torch.from_numpy(fitted).to(rows.dtype)
