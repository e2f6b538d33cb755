"""Predicted rows to HDF5, B-scan by B-scan, under the file's name once it is whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path, check_free_bytes, write_json
from pipeline.errors import ConfigurationError
from pipeline.oct.prediction_rows import PredictedRows
from pipeline.oct.prediction_summary import LayerSummary
from pipeline.oct.prediction_tree import (
    BOUNDARIES,
    CONVENTIONS,
    MAPS,
    expected_array,
    row_arrays,
    storage,
)
from pipeline.oct.volume import OctVolume

__all__ = ["PredictionWriter"]

_CLASSES = 3
_FACTS = ("source_format", "scale_x_um", "scale_y_um", "spacing_um", "laterality", "scan_pattern")
_SPARE_BYTES = 1 << 20  # for the tables of an HDF5 file, which are written at its end
_ATTRIBUTE_BYTES = 60_000  # HDF5 keeps an attribute in a header of 64 KiB


class PredictionWriter:
    """Write the predictions for one volume as they come; use it in a `with` statement.

    The file has its name once every B-scan is written, and never after an error. A summary in JSON
    follows it.

    Args:
        path: the HDF5 file.
        volume: what the predictions are for; its B-scans, truth and names are copied.
        model_path: the checkpoint, as the file is to say it.
        model_architecture: likewise.
        split: the part of the dataset, such as `test`.
        metadata: further attributes of `/metadata`; what is no scalar is written as text.
        timestamp: of the inference; now, by default.
        summary_path: where the summary goes; by default `inference_summary_<stem>.json` beside
            `path`.

    Raises:
        ConfigurationError: `path` is the file that the volume is read from.
        ValueError: layers, names or subjects of the volume do not fit its B-scans.
    """

    def __init__(
        self,
        path: Path | str,
        volume: OctVolume,
        *,
        model_path: str = "",
        model_architecture: str = "",
        split: str = "",
        metadata: Mapping[str, Any] | None = None,
        timestamp: str | None = None,
        summary_path: Path | str | None = None,
    ) -> None:
        self.path = Path(path)
        beside = self.path.with_name(f"inference_summary_{self.path.stem}.json")
        self.summary_path = beside if summary_path is None else Path(summary_path)
        self.volume = _consistent(volume)
        if self.path.resolve() == volume.path.resolve():
            raise ConfigurationError(
                f"{path}: the predictions would replace the file they are made from; choose "
                "another output"
            )
        count, height, width = volume.bscans.shape
        when = datetime.now(UTC).isoformat(timespec="seconds") if timestamp is None else timestamp
        self.metadata = {
            **(metadata or {}),
            "split": split,
            "dataset_size": count,
            "model_architecture": model_architecture,
            "inference_timestamp": when,
        }
        self.dataset_info = {
            "num_samples": count,
            "image_height": height,
            "image_width": width,
            "prediction_classes": _CLASSES,
            "creation_date": when,
            "model_path": model_path,
        }
        self.written = 0
        self._summaries = {name: LayerSummary() for name in (*BOUNDARIES, "thickness")}
        self._file: Any = None
        self._writing: AbstractContextManager[None] | None = None

    def __enter__(self) -> PredictionWriter:
        self._writing = self._open()
        self._writing.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return None if self._writing is None else self._writing.__exit__(kind, error, trace)

    def append(
        self,
        rows: PredictedRows,
        *,
        images: NDArray[np.generic] | None = None,
        masks: NDArray[np.generic] | None = None,
        confidence: NDArray[np.generic] | None = None,
    ) -> None:
        """Write the next n B-scans.

        Args:
            rows: what is predicted for them, `(n, W)` each.
            images: the B-scans `(n, H, W)` as stored, where they are at hand; read otherwise.
            masks: classes 0, 1, 2 `(n, h, w)` in the network's frame; always or never.
            confidence: largest probability `(n, h, w)`, likewise.

        Raises:
            ValueError: shapes or types do not fit the volume or what was written before.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: not open; append inside `with PredictionWriter(...)`")
        count, height, width = len(np.asarray(rows.ilm_px)), *self.volume.bscans.shape[1:]
        block = slice(self.written, self.written + count)
        if images is None:
            images = self.volume.bscans[block]
        dtype = self.volume.bscans.dtype
        arrays = {"images": expected_array("images", images, (count, height, width), dtype)}
        arrays |= row_arrays(rows, (count, width))
        if masks is not None:
            arrays["prediction_masks"] = _classes(masks)
        if confidence is not None:
            arrays["confidence_maps"] = np.asarray(confidence).astype(np.float32, copy=False)
        self._put(arrays, block)
        self._count(arrays)
        self.written += count

    def summary(self) -> dict[str, Any]:
        """Return what the B-scans written so far come to, as it stands in the JSON file."""
        thickness, scale_um = self._summaries["thickness"].mean_px, self.volume.scale_y_um
        in_um = None if thickness is None or scale_um is None else thickness * scale_um
        return {
            "predictions": self.path.name,
            **self.metadata,
            **self.dataset_info,
            **CONVENTIONS,
            "scale_y_um": scale_um,
            "layers": {name: self._summaries[name].figures() for name in BOUNDARIES},
            "mean_thickness_px": thickness,
            "mean_thickness_um": in_um,
        }

    @contextmanager
    def _open(self) -> Iterator[None]:
        count = self.volume.bscans.shape[0]
        with (
            atomic_path(self.path) as temporary,
            _write_errors(),
            h5py.File(temporary, "w", rdcc_nbytes=0) as file,
        ):
            self._file = file  # without a cache, whose write errors h5py would drop
            try:
                self._write_given()
                yield
                if self.written != count:
                    raise ValueError(
                        f"{self.path}: {self.written} of {count} B-scans were written; append all "
                        "of them"
                    )
            finally:
                self._file = None
        write_json(self.summary_path, self.summary())

    def _write_given(self) -> None:
        """Write what is known before the first prediction."""
        file, volume = self._file, self.volume
        facts = {name: getattr(volume, name) for name in _FACTS}
        known = {name: value for name, value in facts.items() if value is not None}
        _set_attributes(file, {**CONVENTIONS, **known, "white": float(volume.white)})
        if volume.notes:
            file.attrs["notes"] = np.array(list(volume.notes), dtype=h5py.string_dtype())
        _set_attributes(file.create_group("metadata"), self.metadata)
        _set_attributes(file.create_group("dataset_info"), self.dataset_info)
        file.create_group("layers")
        for name, rows in sorted(volume.layers.items()):  # as HDF5 lists them
            how = storage(rows.shape[1:], rows.dtype)
            file.create_dataset(f"layers/{name}", data=rows, **how)
        for name, texts in (("names", volume.names), ("subjects", volume.subjects)):
            # What a name in a file system may hold is not always UTF-8.
            data = [text.encode("utf-8", "surrogateescape") for text in texts]
            file.create_dataset(name, data=data, dtype=h5py.string_dtype(), compression="gzip")

    def _put(self, arrays: Mapping[str, NDArray[Any]], block: slice) -> None:
        """Write the arrays of one block; those of the first one make the datasets."""
        count = self.volume.bscans.shape[0]
        if block.stop > count or block.stop == block.start:
            raise ValueError(
                f"{self.path}: {block.stop - block.start} B-scans to append, "
                f"{count - block.start} of {count} are left to be written"
            )
        # HDF5 itself does not end well on a full disk.
        size = sum(array.nbytes for array in arrays.values())
        check_free_bytes(self.path.parent, size + _SPARE_BYTES)
        if self.written == 0:
            self._create(arrays, count)
        uneven = [name for name in MAPS if (name in self._file) != (name in arrays)]
        if uneven:
            raise ValueError(f"{self.path}: {' and '.join(uneven)} given for some B-scans only")
        for name, array in arrays.items():
            dataset = self._file[name]
            shape = (block.stop - block.start, *dataset.shape[1:])
            dataset[block] = expected_array(name, array, shape, dataset.dtype)

    def _create(self, arrays: Mapping[str, NDArray[Any]], count: int) -> None:
        for name, array in arrays.items():
            shape = array.shape[1:]
            how = storage(shape, array.dtype)
            self._file.create_dataset(name, (count, *shape), array.dtype, **how)
            if name in MAPS:
                self._file.attrs["mask_frame"] = "x".join(map(str, shape))

    def _count(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        rows, valid = {}, {}
        for name in BOUNDARIES:
            rows[name] = arrays[f"predicted_layers_raw/{name}"]
            valid[name] = arrays[f"column_valid/{name}"].astype(bool)
            self._summaries[name].add(rows[name], valid[name], arrays[f"column_sigma/{name}"])
        with np.errstate(invalid="ignore", over="ignore"):
            thickness = rows["BM"] - rows["ILM"]
        self._summaries["thickness"].add(thickness, valid["ILM"] & valid["BM"])


@contextmanager
def _write_errors() -> Iterator[None]:
    """Raise as OSError what h5py raises as RuntimeError though the system refused to write."""
    try:
        yield
    except RuntimeError as error:
        number = re.search(r"errno = (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _consistent(volume: OctVolume) -> OctVolume:
    """Return the volume if everything in it fits its B-scans."""
    count, _, width = volume.bscans.shape
    for name, texts in (("names", volume.names), ("subjects", volume.subjects)):
        if len(texts) != count:
            raise ValueError(f"{volume.path}: {len(texts)} {name} for {count} B-scans")
        if any("\0" in text for text in texts):
            raise ValueError(f"{volume.path}: {name} hold a NUL character, which ends text in HDF5")
    for name, rows in volume.layers.items():
        expected_array(f"{volume.path}: layer {name}", rows, (count, width))
    return volume


def _classes(masks: Any) -> NDArray[np.uint8]:
    array = np.asarray(masks)
    if array.dtype.kind not in "ui" or (array.size and not 0 <= array.min() <= array.max() < 3):
        raise ValueError(f"masks are {array.dtype}, expected the classes 0, 1 and 2 as integers")
    return array.astype(np.uint8, copy=False)


def _set_attributes(node: Any, values: Mapping[str, Any]) -> None:
    """Write scalars as they are and everything else as text."""
    for name, value in values.items():
        scalar = isinstance(value, str | bool | int | float | np.generic)
        kept = value if scalar else str(value)
        size = len(kept.encode("utf-8", "surrogateescape")) if isinstance(kept, str) else 0
        if size > _ATTRIBUTE_BYTES:
            raise ConfigurationError(
                f"{name} as an attribute of an HDF5 file takes {size} bytes, at most "
                f"{_ATTRIBUTE_BYTES} have room; shorten it"
            )
        node.attrs[name] = kept
