"""MONAI's door to `read_image`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, ensure_tuple
from numpy.typing import NDArray

from pipeline.data.images import IMAGE_SUFFIXES, read_image_and_header
from pipeline.errors import InputError

__all__ = ["ImageFileReader"]


class ImageFileReader(ImageReader):
    """Read image files as `(H, W)`, `(H, W, C)` or `(D, H, W)`: all pages, never transposed.

    For `LoadImaged(reader="pipeline.data.readers.ImageFileReader")`; several files in one entry
    become the channels of one image.

    Args:
        limit: decoded bytes allowed for one file; by default a quarter of the memory available.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether all the names end in a suffix of `IMAGE_SUFFIXES`."""
        return all(str(name).lower().endswith(IMAGE_SUFFIXES) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[Path]:
        """Return the paths; `get_data` reads them.

        LoadImage answers an exception from here by trying its other readers, one of which would
        return the first page of a damaged stack. An exception from `get_data` reaches the user.
        """
        return [Path(str(name)) for name in ensure_tuple(data)]

    def get_data(self, img: Sequence[Path]) -> tuple[NDArray[Any], dict[str, Any]]:
        """Return pixels and metadata of the files in `img`.

        Returns:
            The array as stored; and `spatial_shape`, `original_channel_dim` (NaN without a
            channel axis) and `source_dtype`.

        Raises:
            InputError: a file cannot be read, or several do not agree in shape and type.
        """
        read = [read_image_and_header(path, limit=self.limit) for path in img]
        first, header = read[0]
        for path, (array, _) in zip(img, read, strict=True):
            if array.shape != first.shape or array.dtype != first.dtype:
                raise InputError(
                    f"{path}: {array.shape} {array.dtype}, but {img[0]} is "
                    f"{first.shape} {first.dtype}; channels of one image must agree"
                )
        channels_last = header.channels > 1
        if len(read) > 1 and channels_last:
            raise InputError(f"{img[0]}: has channels already; give one file or plain gray ones")
        spatial = first.shape[:-1] if channels_last else first.shape
        without = float("nan") if len(read) == 1 else 0
        meta: dict[str, Any] = {
            MetaKeys.SPATIAL_SHAPE: np.asarray(spatial),
            MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if channels_last else without,
            "source_dtype": str(first.dtype),
        }
        return (first if len(read) == 1 else np.stack([array for array, _ in read])), meta
